"""Storage in a bucket, by the protocol that the scheme of its address names."""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from autoglm_resume import files
from autoglm_resume.checkpoint.chunks.verify import on_threads
from autoglm_resume.checkpoint.format.manifest import MANIFEST
from autoglm_resume.checkpoint.storage.address import Bucket

SEGMENT_BYTES = 64 << 20
PIECE_BYTES = 8 << 20
"""Of what is in memory at once, by each connection."""
CONNECTIONS = 4
REQUEST_SECONDS = 300
"""For at most a segment, so that anything faster than 230 KB/s gets through."""
RETRIES = 2

_SEGMENT = re.compile(r"(?P<file>.+)\.(?P<index>\d{5})-of-(?P<count>\d{5})\Z")
_NO_BUCKET = re.compile(r"\((NoSuchBucket|InvalidBucketName|ContainerNotFound)\)")
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_CAUSE = re.compile(r'(?:message|error): "([^"]*)"')


@dataclass(frozen=True)
class _Service:
    name: str
    setting: str
    """The variable to look at where a bucket is not found."""
    endpoints: tuple[str, ...]
    """Variables that name its endpoint; the first that is set counts."""

    @property
    def endpoint(self) -> str:
        """Empty for the service's own."""
        return next((os.environ[name] for name in self.endpoints if os.environ.get(name)), "")


_SERVICES = {
    "s3": _Service(
        "AWS",
        "AWS_ENDPOINT_URL",
        ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    ),
    "gs": _Service("Google Cloud", "GOOGLE_APPLICATION_CREDENTIALS", ("STORAGE_EMULATOR_HOST",)),
    "az": _Service(
        "Azure",
        "AZURE_STORAGE_ACCOUNT_NAME",
        ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    ),
}


class ObjectStore:
    """A prefix of a bucket of S3 (or of what speaks its protocol), Google Cloud or Azure.

    A file of more than SEGMENT_BYTES is stored as objects `<file>.00000-of-00012` and so on, of
    that size, each by a multipart upload; it is there when all of them are. That makes an upload
    resumable: obstore (0.12) gives out no upload id that a later process could go on with, and a
    bucket's own incomplete uploads expire unseen. Whoever continues sends only missing segments;
    `cat` puts them together again. What S3 keeps of an upload that was cut off is removed by a
    lifecycle rule of the bucket (AbortIncompleteMultipartUpload).

    Endpoint, region and credentials are what the environment says, under the names of each service
    (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN;
    GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SERVICE_ACCOUNT; AZURE_STORAGE_ACCOUNT_NAME,
    AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN; roles of instances and containers). ~/.aws
    is not read.
    """

    def __init__(self, bucket: Bucket, run: str = "", segment: int = SEGMENT_BYTES) -> None:
        from datetime import timedelta

        from obstore.store import from_url

        self._bucket = bucket
        self._service = _SERVICES[bucket.scheme]
        prefix = "/".join(part for part in (bucket.prefix, run) if part)
        self._target = str(replace(bucket, prefix=prefix))
        self._segment = segment
        self._store: Any = from_url(
            str(replace(bucket, prefix=quote(prefix))),
            client_options={
                "allow_http": self._service.endpoint.startswith("http://"),
                "timeout": timedelta(seconds=REQUEST_SECONDS),
            },
            # The replicator goes on for ever, with its own backoff, and says so.
            retry_config={"max_retries": RETRIES},
        )

    def __str__(self) -> str:
        return self._target

    def names(self, prefix: str = "") -> dict[str, int]:
        objects = self._objects(prefix)
        found = complete_files(objects)
        return {name: sum(map(objects.__getitem__, group)) for name, group in found.items()}

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
        group = complete_files(objects).get(name)
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
            where = self._service.endpoint or self._service.name
            text = (
                f"expected bucket {self._bucket.name} at {where}, found none"
                f" ({text.rpartition('(')[2]}: make it, or correct checkpoint.replicas or"
                f" {self._service.setting}"
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


def segments(name: str, size: int, segment: int) -> list[tuple[str, int, int]]:
    """(object, start, end) of each segment of a file of `size` bytes."""
    starts = range(0, size, segment)
    return [
        (f"{name}.{i:05d}-of-{len(starts):05d}", start, min(start + segment, size))
        for i, start in enumerate(starts)
    ]


def complete_files(objects: Mapping[str, int]) -> dict[str, list[str]]:
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
