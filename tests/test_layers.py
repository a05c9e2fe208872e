"""The nevers of the design, held by walking the package's own imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import autoglm_resume
from tests.patience import PATIENCE

ROOT = Path(autoglm_resume.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

PURE_FOLDERS = ("supervise/core", "checkpoint/format", "observe/pure", "events")
PURE_FILES = (
    *("errors.py", "failures.py", "records.py", "cluster/slurm.py"),
    *("job/units.py", "job/spec.py", "job/fields.py", "job/section.py", "job/checkpoint.py"),
    *("job/answers.py", "job/notify.py", "job/secret.py"),
    *("checkpoint/store/gate.py", "checkpoint/store/retention.py", "checkpoint/write/reuse.py"),
    *("checkpoint/chunks/compression.py", "checkpoint/chunks/cut.py"),
    *("checkpoint/replicas/plan.py", "checkpoint/storage/address.py"),
    *("protocol/loss_guard.py", "protocol/silences.py"),
)
_IN_FOLDERS = (path for folder in PURE_FOLDERS for path in (ROOT / folder).glob("*.py"))
PURE = sorted({*PURE_FILES, *(str(path.relative_to(ROOT)) for path in _IN_FOLDERS)})
LONGEST = 400
"""Lines of a file: one that is longer is usually two rooms."""
MOST = {"supervise": 20, "checkpoint": 12}
"""Entries at the top of a wing: more cannot be learnt by heart."""
IMPURE = {
    *("torch", "rich", "numpy", "subprocess", "socket", "time", "datetime", "os", "shutil"),
    *("psutil", "selectors", "threading", "multiprocessing", "tempfile", "io", "mmap"),
}
ACTS = {"open", "print", "input", "exec", "eval"}
METHODS = {
    *("read_bytes", "read_text", "write_bytes", "write_text", "unlink", "mkdir", "iterdir"),
    *("rename", "stat", "exists", "touch"),
}
WITHOUT_TORCH = ("cli", "supervise", "observe", "control", "messenger", "cluster")
"""Folders on the path of the supervisor or of a command."""
UNPICKLERS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), str(path))


def imports(node: ast.AST) -> Iterator[str]:
    """Dotted names imported anywhere below `node`; of `from a import b`, `a` and `a.b`."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports would hide from this test"
            yield str(child.module)
            yield from (f"{child.module}.{alias.name}" for alias in child.names)


def at_import_time(tree: ast.Module) -> Iterator[str]:
    """What merely importing the module imports: not in functions, not for type checkers."""
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        queue += ast.iter_child_nodes(node)


GRAPH = {name_of(path): set(at_import_time(tree_of(path))) for path in FILES}


def reachable(start: str) -> set[str]:
    """Modules that importing `start` imports, outside ones included, parents too."""
    seen: set[str] = set()
    queue = [start]
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        queue += GRAPH.get(name, ())
        if "." in name and name in GRAPH:
            queue.append(name.rpartition(".")[0])
    return seen


def below(*rooms: str) -> list[Path]:
    return [path for path in FILES if path.relative_to(ROOT).parts[0] in rooms]


@pytest.mark.parametrize("file", PURE)
def test_a_pure_module_cannot_touch_the_world(file: str) -> None:
    tree = tree_of(ROOT / file)
    found = {name.partition(".")[0] for name in imports(tree)} & IMPURE
    assert not found, f"{file} imports {found}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                assert node.func.id not in ACTS, f"{file}:{node.lineno}: {node.func.id}()"
            elif isinstance(node.func, ast.Attribute):
                assert node.func.attr not in METHODS, f"{file}:{node.lineno}: {node.func.attr}()"


@pytest.mark.parametrize("path", below(*WITHOUT_TORCH), ids=name_of)
def test_nothing_on_the_supervisors_path_imports_torch(path: Path) -> None:
    heavy = {name for name in reachable(name_of(path)) if name.partition(".")[0] == "torch"}
    assert not heavy


def test_the_supervisor_and_the_cli_really_run_without_torch() -> None:
    modules = [name_of(path) for path in below(*WITHOUT_TORCH, "job")]
    modules.remove("autoglm_resume.cli.__main__")
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
print("ok")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout == "ok\n", done.stderr


def test_importing_the_package_imports_nothing_of_its_own_or_of_others() -> None:
    code = "import sys; import autoglm_resume; print(*{n.partition('.')[0] for n in sys.modules "
    code += "if n not in sys.builtin_module_names and n.partition('.')[0] not in "
    code += "sys.stdlib_module_names} - {'__main__'}); "
    code += "print(*[n for n in sys.modules if n.startswith('autoglm_resume.')])"
    plain = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT.parent)!r})\n"]
    plain[-1] += code
    done = subprocess.run(plain, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.split() == ["autoglm_resume"], done.stderr


@pytest.mark.parametrize(
    "path", below("worker", "savers", "protocol", "checkpoint", "job"), ids=name_of
)
def test_the_workers_side_never_sees_the_supervisor(path: Path) -> None:
    above = ("autoglm_resume.supervise", "autoglm_resume.cli")
    assert not [name for name in imports(tree_of(path)) if name.startswith(above)]


@pytest.mark.parametrize("path", below("supervise", "observe", "checkpoint"), ids=name_of)
def test_imports_never_go_up_to_the_cli(path: Path) -> None:
    assert not [n for n in imports(tree_of(path)) if n.startswith("autoglm_resume.cli")]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_pickle_is_ever_read(path: Path) -> None:
    tree = tree_of(path)
    # `autoglm import` of what `autoglm export --to torch` has written: tensors and plain values.
    weights = "torch.load(source, map_location='cpu', weights_only=True)"
    only = path.name == "torch_file.py" and ast.unparse(tree).count("torch.load(") == 1
    allowed = {"torch.load"} if only and weights in ast.unparse(tree) else set()
    assert not {name.partition(".")[0] for name in imports(tree)} & UNPICKLERS
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            assert text not in ("torch.load", "torch.serialization.load") or text in allowed, text
            assert not text.endswith("weights_only"), text
        assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle")


def is_folder(module: str) -> bool:
    return (ROOT.parent / module.replace(".", "/")).is_dir()


def folder_of(module: str) -> str:
    """The folder that a module, or a package itself, lies in."""
    return module if is_folder(module) else module.rpartition(".")[0]


def between_folders() -> dict[str, set[str]]:
    """Which folder imports from which; functions' own imports too, since they tie as well."""
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        names = set(imports(tree_of(path)))
        # `from package import module` names both; only the module is meant.
        meant = {n.rpartition(".")[0] for n in names if n in GRAPH}
        used = {n for n in names if n in GRAPH and not (is_folder(n) and n in meant)}
        folder = folder_of(name_of(path))
        arrows.setdefault(folder, set()).update(folder_of(n) for n in used)
        arrows[folder] -= {folder, ROOT.name}
    return arrows


def test_no_folder_imports_itself_through_others() -> None:
    arrows = between_folders()

    def beyond(start: str) -> set[str]:
        seen: set[str] = set()
        queue = list(arrows.get(start, ()))
        while queue:
            name = queue.pop()
            if name not in seen:
                seen.add(name)
                queue += arrows.get(name, ())
        return seen

    circular = {folder for folder in arrows if folder in beyond(folder) and folder != ROOT.name}
    assert not circular


@pytest.mark.parametrize("wing", MOST)
def test_a_wing_can_be_learnt_by_heart(wing: str) -> None:
    entries = [e.name for e in (ROOT / wing).iterdir() if e.name != "__pycache__"]
    assert len(entries) <= MOST[wing], sorted(entries)


def test_every_folder_says_what_it_answers() -> None:
    folders = [path for path in FILES if path.name == "__init__.py"]
    assert not [str(path) for path in folders if not ast.get_docstring(tree_of(path))]


def test_no_file_is_two_rooms() -> None:
    repository = ROOT.parent
    bench = (p for p in (repository / "scripts" / "bench").rglob("*") if p.is_file())
    files = (*FILES, *(repository / "tests").rglob("*.py"), *bench)
    read = [path for path in files if path.suffix != ".pyc"]
    lines = {str(path.relative_to(repository)): path.read_bytes().count(b"\n") for path in read}
    assert not {name: count for name, count in lines.items() if count > LONGEST}


def test_a_class_has_a_name_of_its_own() -> None:
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: files for name, files in homes.items() if len(files) > 1}


def test_importing_has_no_cycles() -> None:
    for start in GRAPH:
        inside = {m for direct in GRAPH[start] if direct in GRAPH for m in reachable_only(direct)}
        assert start not in inside, f"{start} imports itself in the end"


def reachable_only(start: str) -> set[str]:
    """As `reachable`, but without the packages above a module, which are nearly empty."""
    seen: set[str] = set()
    queue = [start]
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue += [m for m in GRAPH.get(name, ()) if m in GRAPH]
    return seen


OWN_FILES = {
    *("files.py", "protocol/assignment.py", "protocol/shared_memory.py", "worker/main_module.py"),
    *("supervise/evidence/oom.py", "supervise/evidence/stacks.py", "supervise/ranks/torchrun.py"),
    *("supervise/preflight/system.py", "supervise/ranks/fault_injector.py"),
    *("supervise/ranks/group.py", "checkpoint/storage/object_store.py"),
    "checkpoint/storage/directory.py",
}
"""Where files are read plainly: the kernel's, and those that this process, or its ranks, made."""


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_one_room_reads_the_files_of_strangers(path: Path) -> None:
    if str(path.relative_to(ROOT)) in OWN_FILES:
        return
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            text = ast.unparse(node)
            opened = node.func.attr == "open" and "'rb'" in text
            plainly = opened or node.func.attr in ("read_bytes", "read_text")
            assert not plainly or "/proc/" in text or "/sys/" in text, f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "output.py"], ids=name_of)
def test_only_one_room_prints(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) != "print", f"{path.name}:{node.lineno}"
