from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume import files
from autoglm_resume.checkpoint.storage.storage import (
    PIECE_BYTES,
    S3,
    Directory,
    check,
    open_storage,
    plain,
    segments,
    whole,
)
from autoglm_resume.errors import UsageError

ID = "step-0000000010.a0"
SEGMENT = PIECE_BYTES + 1000

Make = Callable[[int], Path]


@pytest.fixture(params=["directory", "s3"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3").url)
    (tmp_path / "replica").mkdir()
    return str(tmp_path / "replica")


@pytest.fixture
def a_file(tmp_path: Path) -> Make:
    def make(size: int) -> Path:
        path = tmp_path / f"of-{size}"
        path.write_bytes(os.urandom(size))
        return path

    return make


def test_what_is_put_is_listed_and_comes_back(target: str, a_file: Make, tmp_path: Path) -> None:
    place = open_storage(target, "run")
    assert place.names() == {}
    sizes = (0, 1, 5000, PIECE_BYTES + 1)
    for size in sizes:
        path = a_file(size)
        assert place.put(f"{ID}/file-{size}", path) == size
        place.get(f"{ID}/file-{size}", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == path.read_bytes()
    assert place.names() == place.names(ID) == {f"{ID}/file-{size}": size for size in sizes}
    assert place.names("step-0000000010") == {}


def test_runs_that_share_a_target_do_not_see_each_other(target: str, a_file: Make) -> None:
    for run in ("one", "two"):
        open_storage(target, run).put(f"{ID}/file-{run}", a_file(len(run)))
    assert open_storage(target, "one").names() == {f"{ID}/file-one": 3}
    assert set(open_storage(target).names()) == {f"one/{ID}/file-one", f"two/{ID}/file-two"}
    assert set(open_storage(target).names("two")) == {f"two/{ID}/file-two"}


def test_a_checkpoint_is_removed_with_all_its_files_and_no_other(target: str, a_file: Make) -> None:
    place = open_storage(target, "run")
    for id in (ID, f"{ID}1"):
        for name in ("rank-00000.pack", "manifest.json"):
            place.put(f"{id}/{name}", a_file(7))
    place.remove(ID)
    assert set(place.names()) == {f"{ID}1/rank-00000.pack", f"{ID}1/manifest.json"}


def test_what_is_not_there_cannot_be_fetched_and_leaves_nothing(
    target: str, a_file: Make, tmp_path: Path
) -> None:
    place = open_storage(target, "run")
    place.put(f"{ID}/there", a_file(3))
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError):
        place.get(f"{ID}/nothing", tmp_path / "here" / "back")
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("somewhere/relative", "expected an absolute path or s3://bucket/prefix"),
        ("gs://bucket", "expected an absolute path or s3://bucket/prefix"),
        ("s3://", "expected s3://bucket/prefix"),
        ("s3:///prefix", "expected s3://bucket/prefix"),
        ("s3://with space/prefix", "bucket of 3 to 63 small letters"),
        ("s3://bucket?prefix", "bucket of 3 to 63 small letters"),
        ("s3://bu", "bucket of 3 to 63 small letters"),
    ],
)
def test_a_target_that_can_never_work_is_refused_at_once(target: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check(target)


def test_object_storage_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="obstore") as caught:
        open_storage("s3://bucket/prefix")
    assert caught.value.hint == "pip install autoglm-resume[s3]"


class TestDirectory:
    def test_one_that_does_not_exist_is_not_made_because_it_may_be_a_missing_mount(
        self, tmp_path: Path, a_file: Make
    ) -> None:
        place = Directory(tmp_path / "nfs", "run")
        with pytest.raises(FileNotFoundError, match="mount"):
            place.names()
        with pytest.raises(FileNotFoundError, match="mount"):
            place.put(f"{ID}/file", a_file(1))
        assert not (tmp_path / "nfs").exists()

    def test_what_a_dead_process_left_half_written_is_neither_listed_nor_kept(
        self, tmp_path: Path, a_file: Make
    ) -> None:
        place = Directory(tmp_path, "run")
        place.put(f"{ID}/other", a_file(1))
        half = tmp_path / "run" / ID / f"{files.TEMPORARY}0123-file"
        half.write_bytes(b"half")
        assert place.names() == {f"{ID}/other": 1}
        place.put(f"{ID}/file", a_file(2))
        assert not half.exists()

    def test_an_interrupted_removal_is_finished_by_the_next(
        self, tmp_path: Path, a_file: Make
    ) -> None:
        place = Directory(tmp_path, "run")
        place.put(f"{ID}/file", a_file(1))
        grave = tmp_path / "run" / f"{files.TEMPORARY}0123-{ID}0"
        grave.mkdir()
        (grave / "file").touch()
        assert place.names() == {f"{ID}/file": 1}
        place.remove(ID)
        assert list((tmp_path / "run").iterdir()) == []


class TestS3:
    def objects(self, s3: Any) -> dict[str, int]:
        """Inode by name: an object that is sent again gets another one."""
        found = (s3.objects / "run" / ID).glob("pack*")
        return {path.name: path.stat().st_ino for path in found}

    def test_a_large_file_is_stored_as_segments_and_comes_back_as_one(
        self, s3: Any, a_file: Make, tmp_path: Path
    ) -> None:
        place = S3(s3.url, "run", segment=SEGMENT)
        path = a_file(2 * SEGMENT + 5)
        place.put(f"{ID}/pack", path)
        assert sorted(self.objects(s3)) == [f"pack.0000{i}-of-00003" for i in range(3)]
        assert place.names() == {f"{ID}/pack": 2 * SEGMENT + 5}
        place.get(f"{ID}/pack", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == path.read_bytes()
        place.remove(ID)
        assert self.objects(s3) == {}

    def test_an_interrupted_upload_goes_on_where_it_stopped(self, s3: Any, a_file: Make) -> None:
        class PowerCut(S3):
            def _send(self, object: str, fd: int, start: int, end: int) -> None:
                if start == 2 * SEGMENT:
                    s3.stop()
                super()._send(object, fd, start, end)

        path = a_file(4 * SEGMENT)
        with pytest.raises(OSError, match="Connection refused"):
            PowerCut(s3.url, "run", segment=SEGMENT).put(f"{ID}/pack", path)
        s3.start()
        place = S3(s3.url, "run", segment=SEGMENT)
        assert place.names() == {}, "half a file is none"
        sent = self.objects(s3)
        assert len(sent) == 2
        assert place.put(f"{ID}/pack", path) == 2 * SEGMENT, "only the rest is sent"
        assert place.names() == {f"{ID}/pack": 4 * SEGMENT}
        assert self.objects(s3).items() > sent.items()

    def test_a_half_uploaded_file_can_be_removed(self, s3: Any, a_file: Make) -> None:
        place = S3(s3.url, "run", segment=SEGMENT)
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


@given(st.integers(1, 1000), st.integers(1, 300), st.data())
def test_segments_cover_a_file_once_and_are_whole_only_together(
    size: int, segment: int, data: st.DataObject
) -> None:
    found = segments("id/pack", size, segment)
    assert [start for _, start, _ in found] == [0, *(end for _, _, end in found[:-1])]
    assert found[-1][2] == size
    objects = {name: end - start for name, start, end in found}
    assert whole(objects) == {"id/pack": list(objects)}
    lost = data.draw(st.sampled_from(sorted(objects)))
    assert whole({name: size for name, size in objects.items() if name != lost}) == {}


def test_segments_of_another_size_do_not_mix() -> None:
    old = {name: 4 for name, _, _ in segments("id/pack", 12, 4)}
    new = {name: 6 for name, _, _ in segments("id/pack", 12, 6)}
    del old["id/pack.00001-of-00003"]
    assert whole({**old, **new}) == {"id/pack": sorted(new)}
    assert whole({**old, "id/pack": 12}) == {"id/pack": ["id/pack"]}


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
