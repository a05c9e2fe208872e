"""Peers are installed once, by the first way that works, and one that cannot be is said so."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def peer_setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    from lib import peer_setup

    return peer_setup


@pytest.fixture
def package(tmp_path: Path) -> str:
    """A project on the disk that can be installed without an index."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "a-peer"\nversion = "1.5"\n[tool.setuptools]\npy-modules = ["a_peer"]\n'
    )
    (project / "a_peer.py").write_text("")
    return str(project)


OFFLINE = ("--no-index", "--no-build-isolation")


def test_the_first_way_that_works_is_taken_and_says_so(
    peer_setup: ModuleType, package: str, tmp_path: Path
) -> None:
    ways = (
        peer_setup.Way(((*OFFLINE, "a-peer==9"),)),
        peer_setup.Way(((*OFFLINE, package),), "built here"),
    )
    peer = peer_setup.Peer("a-peer", "a_peer", ways)
    found = peer_setup.set_up(peer, tmp_path / "environments")
    assert found.version == "1.5 (built here)"
    shown = "import a_peer, torch; print(torch.__file__)"
    theirs = subprocess.run([found.python, "-c", shown], capture_output=True, text=True, check=True)
    import torch

    assert Path(theirs.stdout.strip()) == Path(torch.__file__)

    stamp = tmp_path / "environments" / "a-peer" / "ready.json"
    made = stamp.stat().st_mtime_ns
    assert peer_setup.set_up(peer, tmp_path / "environments") == found
    assert stamp.stat().st_mtime_ns == made


def test_what_cannot_be_imported_is_not_installed(
    peer_setup: ModuleType, package: str, tmp_path: Path
) -> None:
    ways = (peer_setup.Way(((*OFFLINE, "a-peer==9"),)), peer_setup.Way(((*OFFLINE, package),)))
    peer = peer_setup.Peer("a-peer", "another_module", ways)
    with pytest.raises(peer_setup.NotInstalled) as said:
        peer_setup.set_up(peer, tmp_path / "environments")
    assert "a-peer==9" in str(said.value)
    assert "another_module" in str(said.value)
    assert not (tmp_path / "environments" / "a-peer" / "ready.json").exists()


def test_an_environment_is_made_again_for_another_version_and_another_place(
    peer_setup: ModuleType, tmp_path: Path
) -> None:
    old, new = (
        peer_setup.Peer("a-peer", "a_peer", (peer_setup.Way(((f"a-peer=={version}",),)),))
        for version in (1, 2)
    )
    keys = {
        peer_setup.key_of(peer, directory)
        for peer in (old, new)
        for directory in (tmp_path / "here", tmp_path / "there")
    }
    assert len(keys) == 4
