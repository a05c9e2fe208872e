from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.checkpoint.storage.address import bucket_at
from autoglm_resume.checkpoint.storage.object_store import (
    PIECE_BYTES,
    ObjectStore,
    complete_files,
    plain,
    segments,
)
from autoglm_resume.checkpoint.storage.storage import open_storage
from tests.checkpoint.storage.conftest import ID, Make

SEGMENT = PIECE_BYTES + 1000


def in_segments(s3: Any, kind: type[ObjectStore] = ObjectStore) -> ObjectStore:
    bucket = bucket_at(s3.url)
    assert bucket is not None
    return kind(bucket, "run", segment=SEGMENT)


class TestS3:
    def objects(self, s3: Any) -> dict[str, int]:
        """Inode by name: an object that is sent again gets another one."""
        found = (s3.objects / "run" / ID).glob("pack*")
        return {path.name: path.stat().st_ino for path in found}

    def test_a_large_file_is_stored_as_segments_and_comes_back_as_one(
        self, s3: Any, a_file: Make, tmp_path: Path
    ) -> None:
        place = in_segments(s3)
        path = a_file(2 * SEGMENT + 5)
        place.put(f"{ID}/pack", path)
        assert sorted(self.objects(s3)) == [f"pack.0000{i}-of-00003" for i in range(3)]
        assert place.names() == {f"{ID}/pack": 2 * SEGMENT + 5}
        place.get(f"{ID}/pack", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == path.read_bytes()
        place.remove(ID)
        assert self.objects(s3) == {}

    def test_an_interrupted_upload_goes_on_where_it_stopped(self, s3: Any, a_file: Make) -> None:
        class PowerCut(ObjectStore):
            def _send(self, object: str, fd: int, start: int, end: int) -> None:
                if start == 2 * SEGMENT:
                    s3.stop()
                super()._send(object, fd, start, end)

        path = a_file(4 * SEGMENT)
        with pytest.raises(OSError, match="Connection refused"):
            in_segments(s3, PowerCut).put(f"{ID}/pack", path)
        s3.start()
        place = in_segments(s3)
        assert place.names() == {}, "half a file is none"
        sent = self.objects(s3)
        assert len(sent) == 2
        assert place.put(f"{ID}/pack", path) == 2 * SEGMENT, "only the rest is sent"
        assert place.names() == {f"{ID}/pack": 4 * SEGMENT}
        assert self.objects(s3).items() > sent.items()

    def test_a_half_uploaded_file_can_be_removed(self, s3: Any, a_file: Make) -> None:
        place = in_segments(s3)
        place.put(f"{ID}/pack", a_file(2 * SEGMENT))
        s3.stop()
        (s3.objects / "run" / ID / "pack.00001-of-00002").unlink()
        s3.start()
        assert place.names() == {}
        place.remove(ID)
        assert self.objects(s3) == {}

    @pytest.mark.parametrize(
        ("name", "value", "says"),
        [
            ("AWS_SECRET_ACCESS_KEY", "wrong", "403 Forbidden .SignatureDoesNotMatch."),
            ("AWS_ACCESS_KEY_ID", "nobody", "403 Forbidden"),
            ("AWS_ENDPOINT_URL", "http://127.0.0.1:1", "Connection refused"),
        ],
    )
    def test_an_error_is_one_line_that_says_what_is_wrong(
        self, s3: Any, name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(name, value)
        with pytest.raises(OSError, match=says) as caught:
            open_storage(s3.url).names()
        assert "\n" not in str(caught.value)
        assert caught.value.filename == s3.url

    def test_a_bucket_that_does_not_exist_is_an_error_and_not_an_empty_replica(
        self, s3: Any, a_file: Make
    ) -> None:
        place = open_storage("s3://elsewhere")
        with pytest.raises(OSError, match=r"elsewhere at http://127.*\(NoSuchBucket\): make"):
            place.names()
        with pytest.raises(OSError, match="NoSuchBucket"):
            place.put(f"{ID}/file", a_file(1))


class NoContainer(BaseHTTPRequestHandler):
    """What Azure says where there is no such container; keeps what it was asked."""

    asked: list[str]

    def answer(self) -> None:
        self.asked.append(self.path)
        body = b'<?xml version="1.0"?><Error><Code>ContainerNotFound</Code></Error>'
        self.send_response(404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a service of Azure was asked that has no containers."""
    asked: list[str] = []
    handler = type("Handler", (NoContainer,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}/account"
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
        yield asked
        server.shutdown()
        thread.join()


class TestAzure:
    def test_a_container_that_does_not_exist_is_an_error_that_names_it(
        self, azure: list[str]
    ) -> None:
        with pytest.raises(OSError, match=r"elsewhere at http://127.*\(ContainerNotFound\): make"):
            open_storage("az://elsewhere/some/prefix", "run").names(ID)
        (asked,) = set(azure)
        assert asked.startswith("/account/elsewhere?restype=container&comp=list&prefix=some%2F")

    def test_a_file_goes_below_the_prefix_of_the_container(
        self, azure: list[str], a_file: Make
    ) -> None:
        with pytest.raises(OSError, match="ContainerNotFound"):
            open_storage("az://elsewhere/some/prefix", "run").put(f"{ID}/file", a_file(1))
        assert set(azure) == {f"/account/elsewhere/some/prefix/run/{ID}/file"}


@given(st.integers(1, 1000), st.integers(1, 300), st.data())
def test_segments_cover_a_file_once_and_are_whole_only_together(
    size: int, segment: int, data: st.DataObject
) -> None:
    found = segments("id/pack", size, segment)
    assert [start for _, start, _ in found] == [0, *(end for _, _, end in found[:-1])]
    assert found[-1][2] == size
    objects = {name: end - start for name, start, end in found}
    assert complete_files(objects) == {"id/pack": list(objects)}
    lost = data.draw(st.sampled_from(sorted(objects)))
    assert complete_files({name: size for name, size in objects.items() if name != lost}) == {}


def test_segments_of_another_size_do_not_mix() -> None:
    old = {name: 4 for name, _, _ in segments("id/pack", 12, 4)}
    new = {name: 6 for name, _, _ in segments("id/pack", 12, 6)}
    del old["id/pack.00001-of-00003"]
    assert complete_files({**old, **new}) == {"id/pack": sorted(new)}
    assert complete_files({**old, "id/pack": 12}) == {"id/pack": ["id/pack"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Generic S3 error: Error performing GET http://h/b in 4ms - HTTP error: error sending"
            ' request\n\nDebug source:\n ... "tcp connect error" ... message: "Connection refused"',
            "HTTP error: error sending request (Connection refused)",
        ),
        (
            "Error performing PUT http://h/b in 3ms - Server returned non-2xx status code: 404 Not"
            ' Found: <?xml version="1.0"?>\n<Error><Code>NoSuchBucket</Code></Error>',
            "Server returned non-2xx status code: 404 Not Found (NoSuchBucket)",
        ),
        ("something else", "something else"),
    ],
)
def test_the_cause_of_an_error_is_found_in_its_debug_dump(text: str, expected: str) -> None:
    assert plain(text) == expected
