from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CODE = """
import json, sys
from autoglm_resume.worker import imports
import colorsys
sys.path[:0] = [{own!r}, {linked!r}]
imports.begin()
import mine, mine_linked
import colorsys, yaml, wave
print(json.dumps(imports.imported_since_start()))
"""


def test_installed_modules_are_named_in_order_and_the_users_own_are_not(tmp_path: Path) -> None:
    own, real, linked = tmp_path / "own", tmp_path / "real", tmp_path / "linked"
    own.mkdir()
    real.mkdir()
    linked.symlink_to(real)
    (own / "mine.py").write_text("import chunk_of_mine")
    (own / "chunk_of_mine.py").write_text("")
    (real / "mine_linked.py").write_text("")
    code = CODE.format(own=str(own), linked=str(linked))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = json.loads(done.stdout)
    assert {"yaml", "wave"} <= set(names)
    assert names.index("yaml") < names.index("wave")
    assert not {"colorsys", "mine", "mine_linked", "chunk_of_mine", "__main__"} & set(names)


def test_a_virtual_environment_inside_the_users_directory_is_installed(tmp_path: Path) -> None:
    environment = tmp_path / "project" / ".venv"
    site = environment / "lib" / "python3" / "site-packages"
    site.mkdir(parents=True)
    (site / "dependency.py").write_text("")
    code = f"""
import sys
from autoglm_resume.worker import imports
sys.path.insert(0, {str(site)!r})
imports.begin()
import dependency
print(imports.imported_since_start())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'dependency'" in done.stdout, done.stderr
