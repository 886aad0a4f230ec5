"""What a request is refused for. Adapters turn each into an answer; none carries a secret."""

from __future__ import annotations

from collections.abc import Mapping


class DispatcherError(Exception):
    """A request that is refused. `slug` names the kind for programs, `detail` is for people."""

    status = 500
    slug = "internal"
    title = "The dispatcher failed"

    def __init__(self, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = dict(headers or {})


class MalformedError(DispatcherError):
    """The request is not of the form that it must have."""

    status, slug, title = 400, "malformed", "The request is malformed"


class UnauthenticatedError(DispatcherError):
    """Who asks could not prove who they are. `reason` is for the metrics."""

    status, slug, title = 401, "unauthenticated", "The request is not authenticated"

    def __init__(self, detail: str, reason: str = "credentials") -> None:
        super().__init__(detail)
        self.reason = reason


class NotFoundError(DispatcherError):
    """There is no such thing."""

    status, slug, title = 404, "not-found", "Not found"


class ConflictError(DispatcherError):
    """The thing is in a state that does not allow it."""

    status, slug, title = 409, "conflict", "Not possible in this state"


class TooLargeError(DispatcherError):
    """The body is larger than is taken."""

    status, slug, title = 413, "too-large", "The body is too large"


class WrongMediaTypeError(DispatcherError):
    """The body is of another type than is taken."""

    status, slug, title = 415, "media-type", "The media type is not supported"


class InvalidError(DispatcherError):
    """JSON, but not what is asked for."""

    status, slug, title = 422, "invalid", "The content is not valid"


class RateLimitedError(DispatcherError):
    """Too many requests; `headers` say when to come back."""

    status, slug, title = 429, "rate-limited", "Too many requests"


class UnavailableError(DispatcherError):
    """Not now: starting, stopping or with a damaged store."""

    status, slug, title = 503, "unavailable", "The dispatcher is not available"


class StorageFullError(DispatcherError):
    """What cannot be kept is not accepted: the sender delivers it again."""

    status, slug, title = 507, "storage-full", "The event store is full"


class StoreError(DispatcherError):
    """The store failed in another way."""

    status, slug, title = 503, "store-failed", "The event store cannot be written"


class CorruptStoreError(Exception):
    """The store's file is damaged. The text says how to restore it."""
