"""What keeps copies of checkpoints, whatever it is, and how its address opens it.

All hold the same tree, `<address>/<run>/<checkpoint id>/<file>`, so that runs that share an address
never touch each other's copies. Files are immutable: equal name and size mean equal content, which
is proven by digests when they are read.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol

from autoglm_resume.checkpoint.storage.address import AN_ADDRESS, Bucket, bucket_at
from autoglm_resume.checkpoint.storage.directory import Directory
from autoglm_resume.checkpoint.storage.object_store import ObjectStore
from autoglm_resume.errors import UsageError


class Storage(Protocol):
    """Files by name; a name is `<checkpoint id>/<file>`. All methods raise OSError."""

    def names(self, prefix: str = "") -> dict[str, int]:
        """Name and bytes of every file that is there completely, below the directory `prefix`."""

    def put(self, name: str, path: Path) -> int:
        """Store the file at `path`; returns the bytes that had to be sent.

        An interrupted `put` is continued by the next one as far as the backend can.
        """

    def get(self, name: str, path: Path) -> None:
        """Write the file to `path`."""

    def remove(self, id: str) -> None:
        """Remove a checkpoint, and what is left of an incomplete one. Its manifest goes first."""


def check(address: str) -> Bucket | None:
    """The bucket at `address`, None for a directory, without touching it or the network.

    Raises UsageError if it cannot be a storage.
    """
    try:
        bucket = bucket_at(address)
    except ValueError as error:
        raise UsageError(f"{address}: expected {error}") from None
    if bucket is None and not Path(address).is_absolute():
        raise UsageError(f"{address}: expected {AN_ADDRESS}, the path an absolute one")
    if bucket is not None and importlib.util.find_spec("obstore") is None:
        raise UsageError(
            f"{address}: object storage needs the package obstore, which is not installed",
            hint="pip install autoglm-resume[s3]",
        )
    return bucket


def open_storage(address: str, run: str = "") -> Storage:
    """The storage of `run` at `address`; without a run, of all runs: names begin with theirs.

    Raises UsageError as `check` does.
    """
    bucket = check(address)
    return Directory(Path(address), run) if bucket is None else ObjectStore(bucket, run)
