"""Where copies of checkpoints are kept: a directory (local, NFS) or S3-compatible object storage.

Both hold the same tree, `<target>/<run>/<checkpoint id>/<file>`, so that runs that share a target
never touch each other's copies. Files are immutable: equal name and size mean equal content, which
is proven by digests when they are read.
"""

from __future__ import annotations

import errno
import importlib.util
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from autoglm_resume import files
from autoglm_resume.checkpoint.chunks.verify import on_threads
from autoglm_resume.checkpoint.format.manifest import MANIFEST
from autoglm_resume.checkpoint.replicas.plan import A_BUCKET, BUCKET
from autoglm_resume.errors import UsageError

if TYPE_CHECKING:
    from obstore.store import S3Store

SEGMENT_BYTES = 64 << 20
PIECE_BYTES = 8 << 20
"""Of what is in memory at once, by each connection."""
CONNECTIONS = 4
REQUEST_SECONDS = 300
"""For at most a segment, so that anything faster than 230 KB/s gets through."""
RETRIES = 2

_SEGMENT = re.compile(r"(?P<file>.+)\.(?P<index>\d{5})-of-(?P<count>\d{5})\Z")
_NO_BUCKET = re.compile(r"\((NoSuchBucket|InvalidBucketName)\)")
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_CAUSE = re.compile(r'(?:message|error): "([^"]*)"')


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


def check(target: str) -> None:
    """Raise UsageError if `target` cannot be a storage, without touching it or the network."""
    if target.startswith("s3://"):
        if not BUCKET.match(target):
            raise UsageError(f"{target}: expected {A_BUCKET}")
        if importlib.util.find_spec("obstore") is None:
            raise UsageError(
                f"{target}: object storage needs the package obstore, which is not installed",
                hint="pip install autoglm-resume[s3]",
            )
    elif not Path(target).is_absolute():
        raise UsageError(f"{target}: expected an absolute path or s3://bucket/prefix")


def open_storage(target: str, run: str = "") -> Storage:
    """The storage of `run` in `target`; without a run, of all runs: names begin with theirs.

    Raises UsageError as `check` does.
    """
    check(target)
    if not target.startswith("s3://"):
        return Directory(Path(target), run)
    return S3(target, run)


class Directory:
    """A directory that exists already, because one that does not may be a mount that is missing."""

    def __init__(self, root: Path, run: str = "") -> None:
        self._mount = root
        self._root = root / run

    def __str__(self) -> str:
        return str(self._root)

    def _require(self) -> None:
        if not self._mount.is_dir():
            text = "expected a directory (make it, or mount it), found none"
            raise FileNotFoundError(errno.ENOENT, text, str(self._mount))

    def names(self, prefix: str = "") -> dict[str, int]:
        self._require()
        found = {}
        for directory, below, names in os.walk(self._root / prefix, onerror=_unless_missing):
            below[:] = [name for name in below if not name.startswith(files.TEMPORARY)]
            for name in names:
                if not name.startswith(files.TEMPORARY):
                    path = Path(directory, name)
                    found[path.relative_to(self._root).as_posix()] = path.stat().st_size
        return found

    def put(self, name: str, path: Path) -> int:
        self._require()
        target = self._root / name
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True)
            files.sync_directory(self._root)
            files.sync_directory(self._mount)
        for leftover in target.parent.glob(f"{files.TEMPORARY}*-{target.name}"):
            leftover.unlink()
        with path.open("rb") as source, files.writing(target) as output:
            shutil.copyfileobj(source, output, PIECE_BYTES)
            return output.tell()

    def get(self, name: str, path: Path) -> None:
        with (self._root / name).open("rb") as source, files.writing(path) as output:
            shutil.copyfileobj(source, output, PIECE_BYTES)

    def remove(self, id: str) -> None:
        (self._root / id).rename(self._root / f"{files.TEMPORARY}{os.urandom(4).hex()}-{id}")
        files.sync_directory(self._root)
        for grave in self._root.glob(f"{files.TEMPORARY}*"):
            shutil.rmtree(grave)


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


class S3:
    """A prefix of a bucket of S3, or of anything that speaks its protocol.

    A file of more than SEGMENT_BYTES is stored as objects `<file>.00000-of-00012` and so on, of
    that size, each by a multipart upload; it is there when all of them are. That makes an upload
    resumable: obstore (0.12) gives out no upload id that a later process could go on with, and a
    bucket's own incomplete uploads expire unseen. Whoever continues sends only missing segments;
    `cat` puts them together again. What S3 keeps of an upload that was cut off is removed by a
    lifecycle rule of the bucket (AbortIncompleteMultipartUpload).

    Endpoint, region and credentials are what the environment says, under the names of AWS
    (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN,
    instance and container roles); ~/.aws is not read.
    """

    def __init__(self, target: str, run: str = "", segment: int = SEGMENT_BYTES) -> None:
        from datetime import timedelta

        from obstore.store import S3Store

        match = BUCKET.match(target)
        assert match is not None, "check() was not asked"
        prefix = "/".join(part for part in (match["prefix"], run) if part)
        self._bucket = match["bucket"]
        self._target = f"s3://{match['bucket']}/{prefix}"
        self._segment = segment
        self._store: S3Store = S3Store(
            match["bucket"],
            prefix=prefix or None,
            client_options={
                "allow_http": _endpoint().startswith("http://"),
                "timeout": timedelta(seconds=REQUEST_SECONDS),
            },
            # The replicator goes on for ever, with its own backoff, and says so.
            retry_config={"max_retries": RETRIES},
        )

    def __str__(self) -> str:
        return self._target

    def names(self, prefix: str = "") -> dict[str, int]:
        objects = self._objects(prefix)
        return {name: sum(map(objects.__getitem__, o)) for name, o in whole(objects).items()}

    def put(self, name: str, path: Path) -> int:
        sent = 0
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= self._segment:
                self._send(name, file.fileno(), 0, size)
                return size
            there = self._objects(name.rpartition("/")[0])
            for object, start, end in segments(name, size, self._segment):
                if there.get(object) != end - start:
                    self._send(object, file.fileno(), start, end)
                    sent += end - start
        return sent

    def get(self, name: str, path: Path) -> None:
        objects = self._objects(name.rpartition("/")[0])
        group = whole(objects).get(name)
        if group is None:
            raise FileNotFoundError(errno.ENOENT, f"expected {name}, found nothing", self._target)
        ends = list(itertools.accumulate(objects[object] for object in group))
        with files.writing(path) as output:

            def fetch(index: int, _: memoryview) -> None:
                at = ends[index] - objects[group[index]]
                with self._plainly():
                    for piece in self._store.get(group[index]).stream(PIECE_BYTES):
                        at += _write(output.fileno(), memoryview(piece), at)
                if at != ends[index]:
                    raise OSError(errno.EIO, f"{name}: expected {ends[index]} bytes, found {at}")

            on_threads(len(group), fetch, lambda: memoryview(b""), CONNECTIONS)

    def remove(self, id: str) -> None:
        with self._plainly():
            self._store.delete([f"{id}/{MANIFEST}"])
            if left := list(self._objects(id)):
                self._store.delete(left)

    def _objects(self, prefix: str) -> dict[str, int]:
        with self._plainly():
            found = self._store.list(prefix or None).collect()
        return {meta["path"]: meta["size"] for meta in found}

    def _send(self, object: str, fd: int, start: int, end: int) -> None:
        pieces = _pieces(fd, start, end)
        with self._plainly():
            if end - start <= PIECE_BYTES:
                self._store.put(object, b"".join(pieces), use_multipart=False)
            else:
                self._store.put(object, pieces, chunk_size=PIECE_BYTES, max_concurrency=CONNECTIONS)

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """Errors of obstore as OSError, with the sentence that says something."""
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError as error:
            text = self._said(error)
            raise FileNotFoundError(errno.ENOENT, text, self._target) from None
        except BaseError as error:
            raise OSError(errno.EIO, self._said(error), self._target) from None

    def _said(self, error: Exception) -> str:
        text = plain(str(error))
        if _NO_BUCKET.search(text):
            text = (
                f"expected bucket {self._bucket} at {_endpoint() or 'AWS'}, found none"
                f" ({text.rpartition('(')[2]}: make it, or correct checkpoint.replicas or"
                " AWS_ENDPOINT_URL"
            )
        return text


def _pieces(fd: int, start: int, end: int) -> Iterator[bytes]:
    for at in range(start, end, PIECE_BYTES):
        data = os.pread(fd, min(PIECE_BYTES, end - at), at)
        if len(data) != min(PIECE_BYTES, end - at):
            raise OSError(errno.EIO, f"expected {end} bytes, found {at + len(data)}")
        yield data


def _write(fd: int, data: memoryview, at: int) -> int:
    """Write all of it; returns the bytes."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], at + done)
    return done


def _endpoint() -> str:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def segments(name: str, size: int, segment: int) -> list[tuple[str, int, int]]:
    """(object, start, end) of each segment of a file of `size` bytes."""
    starts = range(0, size, segment)
    return [
        (f"{name}.{i:05d}-of-{len(starts):05d}", start, min(start + segment, size))
        for i, start in enumerate(starts)
    ]


def whole(objects: Mapping[str, int]) -> dict[str, list[str]]:
    """The objects of each file, in order, as far as they are all among `objects` (with sizes)."""
    found: dict[str, list[str]] = {}
    for object in sorted(objects):
        match = _SEGMENT.match(object)
        if match is None:
            found[object] = [object]
        elif int(match["index"]) == 0:
            count = int(match["count"])
            group = [f"{match['file']}.{i:05d}-of-{count:05d}" for i in range(count)]
            if objects.keys() >= set(group):
                found.setdefault(match["file"], group)
    return found


def plain(text: str) -> str:
    """The cause in an error message of obstore, which is a page long and ends in a debug dump."""
    line = text.partition("\n")[0].rpartition(" - ")[2].partition(": <?xml")[0]
    with suppress(IndexError):
        line = f"{line.strip(': ')} ({(_CODE.findall(text) or _CAUSE.findall(text))[-1]})"
    return line
