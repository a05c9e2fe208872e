"""The paths and modules of a job: made absolute, and found before anything starts.

Variables in them, and in what the script is given, become what they are where the job is read.
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from autoglm_resume.job.draft import Draft, Keys, similar_file

_VARIABLE = re.compile(r"\$(?:\$|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(?::-([^}]*))?\})")
_HOME = re.compile(r"\A~(?=/|\Z)")
_EXPANDED = ("script", "workdir", "run_dir", "args", "env", "checkpoint", "guards", "slurm")


def literal(text: str) -> str:
    """`text` as a job file has to write it, where variables are expanded, to mean itself."""
    return text.replace("$", "$$")


def as_written(dumped: Mapping[str, Any]) -> dict[str, Any]:
    """A dumped job as a job file has to have it."""

    def written(value: Any) -> Any:
        if isinstance(value, str):
            return literal(value)
        if isinstance(value, list | tuple):
            return [written(each) for each in value]
        if isinstance(value, Mapping):
            return {key: written(each) for key, each in value.items()}
        return value

    return {key: written(value) if key in _EXPANDED else value for key, value in dumped.items()}


@dataclass
class Paths:
    """Makes the paths of a draft absolute, `home` being where the job file lies.

    What was left out gets its default, and what must exist but does not is refused.
    """

    draft: Draft
    home: Path

    def check(self) -> None:
        data, home = self.draft.data, self.home
        for key in ("args", "env"):
            self._texts(key)
        workdir = self._absolute(("workdir",), data, home, default=home)
        run_dir = self._absolute(
            ("run_dir",), data, home, default=home / "runs" / str(data["name"])
        )
        if data.get("checkpoint") is None:
            data["checkpoint"] = {}
        if isinstance(data["checkpoint"], dict):
            default = (run_dir or home) / "checkpoints"
            self._absolute(("checkpoint", "dir"), data["checkpoint"], home, default=default)
            self._replicas(data["checkpoint"].get("replicas"))
        if isinstance(data.get("slurm"), dict):
            self._absolute(("slurm", "output"), data["slurm"], home)
        guards = data.get("guards")
        files = guards.get("config_files") if isinstance(guards, dict) else None
        for n in range(len(files) if isinstance(files, list) else 0):
            self._file(("guards", "config_files", n), files, home)
        if workdir and self._exists(("workdir",), workdir, "directory"):
            script = self._file(("script",), data, workdir)
            self._modules(script.parent if script else workdir)

    def _absolute(
        self, keys: Keys, holder: Any, base: Path, *, default: Path | None = None
    ) -> Path | None:
        """Replace the path at the last of `keys` in `holder`; None if there is none."""
        text = holder.get(keys[-1]) if isinstance(holder, dict) else holder[keys[-1]]
        if text is None and default:
            holder[keys[-1]] = str(default)
            return default
        if not isinstance(text, str) or not text or "\0" in text:
            return None
        expanded = self._expanded(keys, text)
        if expanded is None:
            return None
        path = base / expanded
        holder[keys[-1]] = str(path)
        return path

    def _expanded(self, keys: Keys, text: str) -> str | None:
        return self._replaced(keys, os.path.expanduser(text))  # noqa: PTH111

    def _replaced(self, keys: Keys, text: str) -> str | None:
        """With what `$NAME`, `${NAME}` and `${NAME:-default}` stand for, and `$` for `$$`."""

        def value(found: re.Match[str]) -> str:
            name = found[1] or found[2]
            if not name:
                return "$"
            return os.environ.get(name) or found[3] or ""

        for found in _VARIABLE.finditer(text):
            name = found[1] or found[2]
            if name and name not in os.environ and found[3] is None:
                self.draft.refuse(keys, f"the variable {name} in {text!r} is not set")
                return None
        return _VARIABLE.sub(value, text)

    def _texts(self, key: str) -> None:
        """Expand what the script is given; `~` as a shell does, at the begin alone."""
        holder: Any = self.draft.data.get(key)
        members: list[tuple[Any, Any]] = []
        if isinstance(holder, dict | list):
            members = [*(holder.items() if isinstance(holder, dict) else enumerate(holder))]
        for at, text in members:
            if isinstance(text, str):
                own = _HOME.sub(lambda _: os.path.expanduser("~"), text)  # noqa: PTH111
                found = self._replaced((key, at), own)
                holder[at] = text if found is None else found

    def _replicas(self, entries: Any) -> None:
        for n, entry in enumerate(entries if isinstance(entries, list) else ()):
            if isinstance(entry, str) and entry:
                expanded = self._expanded(("checkpoint", "replicas", n), entry)
                if expanded is None:
                    entries[n] = "/"  # it is refused already: once will do
                else:
                    entries[n] = expanded if "://" in entry else str(self.home / expanded)

    def _file(self, keys: Keys, holder: Any, base: Path) -> Path | None:
        path = self._absolute(keys, holder, base)
        if path is None:
            return None
        self._exists(keys, path, "file")
        return path

    def _exists(self, keys: Keys, path: Path, kind: Literal["file", "directory"]) -> bool:
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            self.draft.refuse(keys, f"no such {kind}: {path}{similar_file(path)}")
        except OSError as error:
            self.draft.refuse(keys, f"{path}: {error.strerror}")
        else:
            if stat.S_ISDIR(mode) == (kind == "directory"):
                return True
            found = "directory" if stat.S_ISDIR(mode) else "file"
            self.draft.refuse(keys, f"expected a {kind}, found a {found}: {path}")
        return False

    def _modules(self, first: Path) -> None:
        """Check that `module` and `preload` can be found from where the ranks will look."""
        data = self.draft.data
        env = data.get("env")
        own = env.get("PYTHONPATH") if isinstance(env, dict) else None
        extra = str(own or os.environ.get("PYTHONPATH", "")).split(os.pathsep)
        path = [str(first), *(str(first / entry) for entry in extra if entry)]
        wanted: list[tuple[Keys, Any, bool]] = [(("module",), data.get("module"), True)]
        preload = data.get("preload")
        for n, name in enumerate(preload if isinstance(preload, list) else ()):
            wanted.append((("preload", n), name, False))
        for keys, name, run in wanted:
            if isinstance(name, str) and (missing := _missing(name, path, run=run)):
                what = f"no module named {missing!r} in {first} or among the installed packages"
                self.draft.refuse(keys, what)


def _missing(module: str, path: Sequence[str], *, run: bool) -> str:
    """The part of `module` that cannot be found, '' if all can. Imports nothing.

    `importlib.util.find_spec` would run the code of the parents, which may import torch.
    """
    if not all(part.isidentifier() for part in module.split(".")) or module == "__main__":
        return ""  # refused in better words when the job is validated
    name, where = "", None
    for part in [*module.split("."), *(["__main__"] if run else [])]:
        parent, name = name, f"{name}.{part}" if name else part
        if parent and where is None:
            return "" if part == "__main__" and run else name  # a plain module holds no others
        own = importlib.machinery.PathFinder.find_spec(name, where or path)
        spec = own or _installed(name, where)
        if spec is None:
            return name
        where = spec.submodule_search_locations and [*spec.submodule_search_locations]
    return ""


def _installed(name: str, path: Sequence[str] | None) -> importlib.machinery.ModuleSpec | None:
    """Ask every finder of this interpreter: built-in, frozen, editable installs, `sys.path`."""
    specs = (finder.find_spec(name, path) for finder in sys.meta_path)
    return next((spec for spec in specs if spec), None)
