"""Signatures of webhooks, over the raw body, before anything is parsed.

github    X-Hub-Signature-256: the body's HMAC
gitlab    webhook-signature as Standard Webhooks where a signing token is set, else X-Gitlab-Token
standard  Standard Webhooks: HMAC of id, time and body; no older or newer than five minutes

All comparisons take the same time whatever is compared, and each valid secret is tried, so
that time does not tell which one matched.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Mapping

from rave_dispatcher.application.errors import (
    MalformedError,
    NotFoundError,
    UnauthenticatedError,
)
from rave_dispatcher.application.ports import Verified
from rave_dispatcher.config import Source

TOLERANCE_SECONDS = 300
TOKEN_VERIFIED = "gitlab-token"  # noqa: S105 - what is kept in place of the token
STANDARD_PREFIX = "whsec_"

Headers = Mapping[str, str]


class Signatures:
    """Verifies deliveries of the configured sources."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        secrets: Callable[[str], tuple[bytes, ...]],
        now: Callable[[], float],
    ) -> None:
        self._sources, self._secrets, self._now = sources, secrets, now

    def verify(self, source: str, headers: Headers, body: bytes) -> Verified:
        """What a delivery's headers say, once its signature held."""
        known = self._sources.get(source)
        if known is None:
            raise NotFoundError("no such source of webhooks is configured")
        secrets = self._secrets(known.secret)
        if not secrets:
            raise UnauthenticatedError("no secret is configured for this source", "no-secret")
        if known.scheme == "github":
            return _github(headers, body, secrets)
        if known.scheme == "gitlab":
            return _gitlab(headers, body, secrets, self._now())
        signature = _standard(headers, body, secrets, self._now())
        return Verified(headers.get("webhook-id", ""), None, signature)


def _github(headers: Headers, body: bytes, secrets: tuple[bytes, ...]) -> Verified:
    given = _header(headers, "x-hub-signature-256")
    expected = ["sha256=" + hmac.digest(s, body, "sha256").hex() for s in secrets]
    _require_any(given, expected)
    delivery = _header(headers, "x-github-delivery", malformed=True)
    return Verified(delivery, _header(headers, "x-github-event", malformed=True), given)


def _gitlab(headers: Headers, body: bytes, secrets: tuple[bytes, ...], now: float) -> Verified:
    signed = "webhook-signature" in headers
    if signed:
        signature = _standard(headers, body, secrets, now)
    else:
        _require_any(_header(headers, "x-gitlab-token"), [s.decode("latin-1") for s in secrets])
        signature = TOKEN_VERIFIED
    kind = _header(headers, "x-gitlab-event", malformed=True)
    # the same when GitLab tries again. Of a signed delivery only webhook-id is signed with it:
    # under another key, whoever saw it could send it again
    for name in ("webhook-id",) if signed else ("idempotency-key", "webhook-id"):
        if headers.get(name):
            return Verified(headers[name], kind, signature)
    # an older GitLab: events that follow from one another share this id, so the body counts too
    shared = _header(headers, "x-gitlab-event-uuid", malformed=True)
    return Verified(f"{shared}:{hashlib.sha256(body).hexdigest()[:32]}", kind, signature)


def _standard(headers: Headers, body: bytes, secrets: tuple[bytes, ...], now: float) -> str:
    message_id = _header(headers, "webhook-id")
    stamp = _header(headers, "webhook-timestamp")
    given = _header(headers, "webhook-signature")
    if not (stamp.isascii() and stamp.isdigit() and len(stamp) < 13):
        raise UnauthenticatedError("webhook-timestamp is no time", "timestamp")
    signed = f"{message_id}.{stamp}.".encode("latin-1") + body
    expected = [
        "v1," + base64.b64encode(hmac.digest(standard_key(s), signed, "sha256")).decode()
        for s in secrets
    ]
    for candidate in given.split(" ")[:10]:
        if _is_any(candidate, expected):
            break
    else:
        raise UnauthenticatedError("the signature does not match", "signature")
    # after the signature: who cannot sign does not learn what our clock says
    if abs(now - int(stamp)) > TOLERANCE_SECONDS:
        raise UnauthenticatedError(
            f"the delivery is not within {TOLERANCE_SECONDS} s of now", "timestamp"
        )
    return given


def standard_key(secret: bytes) -> bytes:
    """The HMAC key in a secret: what follows whsec_ is base64, all else is the key itself."""
    prefix = STANDARD_PREFIX.encode()
    if secret.startswith(prefix):
        try:
            return base64.b64decode(secret[len(prefix) :], validate=True)
        except binascii.Error:
            pass
    return secret


def _header(headers: Headers, name: str, *, malformed: bool = False) -> str:
    value = headers.get(name, "")
    if not value:
        if malformed:
            raise MalformedError(f"the header {name} is missing")
        raise UnauthenticatedError(f"the header {name} is missing", "missing")
    return value


def _require_any(given: str, expected: list[str]) -> None:
    if not _is_any(given, expected):
        raise UnauthenticatedError("the signature does not match", "signature")


def _is_any(given: str, expected: list[str]) -> bool:
    found = False
    for value in expected:
        found |= hmac.compare_digest(given.encode("latin-1", "replace"), value.encode("latin-1"))
    return found
