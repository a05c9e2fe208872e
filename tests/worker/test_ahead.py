"""A script gets what was imported ahead if, and only if, it would have imported the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import os, pickle, sys
from autoglm_resume.worker import ahead, environment_reads
sys.path.append({site!r})
with ahead.importing("lib"):
    import lib
with ahead.importing("unrelated"):
    import unrelated
with ahead.importing("top"):
    import top
with ahead.importing("yaml"):
    import yaml
ahead_of_it, pickled = lib, pickle.dumps(top.Thing())
del lib, top, unrelated, yaml

class Over(BaseException):
    pass

def over(module, reason):
    raise Over(module, reason)

environment_reads.watch()
ahead.keep(over)
for name in ("lib", "lib.sub", "top", "unrelated", "yaml"):
    assert name not in sys.modules
sys.path.insert(0, {home!r})
try:
    exec({script!r})
except Over as found:
    print(*found.args, sep=": ")
else:
    print("the same")
"""
SAME = [
    "import lib; assert lib is ahead_of_it and lib.__spec__.name == 'lib' and lib.__spec__.origin",
    "import lib.sub as sub; assert sub.X == 1 and sys.modules['lib'] is ahead_of_it",
    "from lib import sub; import lib; assert lib.sub is sub",
    "import top; assert top.lib is ahead_of_it and sys.modules['lib'] is ahead_of_it",
    "import lib; os.environ['LIB_HOME'] = '/x'; import lib, lib.sub",
    "os.environ['LIB_HOMES'] = '/x'; import lib",
    "os.environ['LIB_HOME'] = '/x'; del os.environ['LIB_HOME']; import lib",
    "assert type(pickle.loads(pickled)).__module__ == 'top'",
    "os.environ['OMP_NUM_THREADS'] = '3'; import lib",
    "import lib, importlib; assert importlib.reload(lib) is ahead_of_it",
    "import yaml; assert not [f for f in sys.meta_path if type(f).__name__ == '_Kept']",
]


def outcome(tmp_path: Path, script: str, *own: str) -> str:
    site, home = tmp_path / "site", tmp_path / "home"
    (site / "lib").mkdir(parents=True)
    home.mkdir()
    (site / "lib/__init__.py").write_text("import os\nHOME = os.environ.get('LIB_HOME')")
    (site / "lib/sub.py").write_text("X = 1")
    (site / "unrelated.py").write_text("import os\nos.environ.get('UNRELATED')")
    (site / "top.py").write_text("import lib.sub\nclass Thing:\n    pass")
    for name in own:
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text("X = 2")
    code = BEGIN.format(site=str(site), home=str(home), script=script)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout.strip().replace(str(tmp_path), "")


@pytest.mark.parametrize("script", SAME)
def test_what_the_script_would_have_imported_it_gets(tmp_path: Path, script: str) -> None:
    assert outcome(tmp_path, script) == "the same"


@pytest.mark.parametrize(
    ("script", "module", "own"),
    [
        ("os.environ['LIB_HOME'] = '/x'; import lib", "lib: the script sets LIB_HOME", ()),
        ("os.environ.update(LIB_HOME='/x'); import lib.sub", "lib: the script sets LIB_HOME", ()),
        ("os.environ.setdefault('LIB_HOME', ''); import top", "lib: the script sets LIB_HOME", ()),
        ("import lib; os.environ['UNRELATED'] = ''; import top", "unrelated: the script sets", ()),
        ("os.environ['OMP_NUM_THREADS'] = '3'; import yaml", "yaml: the script sets OMP_NUM", ()),
        (
            "import lib",
            "lib: the script finds lib at /home/lib.py, and not at /site/lib/__i",
            ("lib.py",),
        ),
        ("import top", "lib: the script finds lib at /home/lib/__init__.py", ("lib/__init__.py",)),
        ("import top", "top: the script finds top at /home/top.py", ("top.py",)),
        ("sys.path.pop(); import lib", "lib: the script finds lib at nowhere", ()),
    ],
)
def test_for_anything_else_the_rank_starts_over(
    tmp_path: Path, script: str, module: str, own: tuple[str, ...]
) -> None:
    assert outcome(tmp_path, script, *own).startswith(module)
