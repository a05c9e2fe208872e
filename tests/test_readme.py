from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_it_says_how_to_install_what_to_import_and_what_to_type() -> None:
    found = importlib.metadata.distribution("autoglm-resume")
    (command,) = (e for e in found.entry_points if e.group == "console_scripts")
    assert f"pip install {found.name}" in README
    assert f"import {command.value.partition('.')[0]} as {command.name}" in README


def test_the_pages_that_it_names_are_there() -> None:
    for page in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README):
        assert (ROOT / page).exists(), page
