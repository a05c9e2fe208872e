from __future__ import annotations

from pathlib import Path

import pytest

from autoglm_resume.checkpoint.storage.object_store import PIECE_BYTES
from autoglm_resume.checkpoint.storage.storage import check, open_storage
from autoglm_resume.errors import UsageError
from tests.checkpoint.storage.conftest import ID, Make


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
        ("somewhere/relative", "expected a path, s3://.*, the path an absolute one"),
        ("ftp://bucket/prefix", "expected a path, s3://bucket/prefix, gs://bucket/prefix or az://"),
        ("gs://bu", "expected gs://bucket/prefix with a bucket of 3 to 63 small letters"),
        ("az://a--b/prefix", "expected az://container/prefix with a container of 3 to 63"),
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
