"""Versions of the API: a major version serves on for six months after its successor came.

While it does, its answers carry Deprecation (RFC 9745) and Sunset (RFC 8594); afterwards it is
gone (410).
"""

from __future__ import annotations

import datetime
import email.utils
from dataclasses import dataclass

SUPPORT = datetime.timedelta(days=183)


@dataclass(frozen=True)
class ApiVersion:
    """A major version. `deprecated` is when its successor came, `sunset` when it goes."""

    major: int
    deprecated: datetime.datetime | None = None
    sunset: datetime.datetime | None = None

    def __post_init__(self) -> None:
        if (self.deprecated is None) is not (self.sunset is None):
            raise ValueError("a deprecated version needs a sunset, and the other way round")
        if self.deprecated and self.sunset and self.sunset - self.deprecated < SUPPORT:
            raise ValueError(f"v{self.major} must serve on for {SUPPORT.days} days")

    @property
    def prefix(self) -> str:
        """Of its paths."""
        return f"/v{self.major}/"

    def headers(self) -> dict[str, str]:
        """What its answers say about its end."""
        if self.deprecated is None or self.sunset is None:
            return {}
        return {
            "Deprecation": f"@{int(self.deprecated.timestamp())}",
            "Sunset": email.utils.format_datetime(
                self.sunset.astimezone(datetime.UTC), usegmt=True
            ),
            "Link": f'</v{self.major + 1}/>; rel="successor-version"',
        }

    def is_gone(self, now: datetime.datetime) -> bool:
        """Whether it is served no more."""
        return self.sunset is not None and now >= self.sunset


VERSIONS = (ApiVersion(1),)


def version_of(path: str, versions: tuple[ApiVersion, ...] = VERSIONS) -> ApiVersion | None:
    """The version that a path belongs to."""
    return next((v for v in versions if path.startswith(v.prefix)), None)
