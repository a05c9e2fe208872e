"""The address of a storage: a path, or a bucket of the service that its scheme names. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

AN_ADDRESS = "a path, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"
"""What is expected, in words."""

_BUCKETS = {
    "s3": (
        re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"),
        "s3://bucket/prefix with a bucket of 3 to 63 small letters, digits, dots and hyphens",
    ),
    "gs": (
        re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]"),
        "gs://bucket/prefix with a bucket of 3 to 63 small letters, digits, dots, hyphens and"
        " underscores",
    ),
    "az": (
        re.compile(r"(?!.*--)[a-z0-9][a-z0-9-]{1,61}[a-z0-9]"),
        "az://container/prefix with a container of 3 to 63 small letters, digits and hyphens",
    ),
}


@dataclass(frozen=True)
class Bucket:
    """Of Azure, a container. `prefix` neither begins nor ends with a slash."""

    scheme: str
    name: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.name}/{self.prefix}"


def bucket_at(address: str) -> Bucket | None:
    """None where the scheme is none of a bucket. Raises ValueError with what was expected."""
    scheme, separator, rest = address.partition("://")
    if not separator or scheme not in _BUCKETS:
        return None
    name, _, prefix = rest.partition("/")
    pattern, expected = _BUCKETS[scheme]
    if not pattern.fullmatch(name):
        raise ValueError(expected)
    return Bucket(scheme, name, prefix.strip("/"))
