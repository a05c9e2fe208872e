"""The user's script or module as `__main__`, just as `python FILE` and `python -m NAME` run it.

Not by runpy: it takes the module away again when the script ends, while exit handlers and threads
still need it, and neither pickle nor multiprocessing finds `__main__`.
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any


def run_script(script: str) -> None:
    """Execute a file. Raises whatever it raises."""
    code = compile(Path(script).read_bytes(), script, "exec", dont_inherit=True)
    loader = importlib.machinery.SourceFileLoader("__main__", script)
    _execute(code, __file__=script, __loader__=loader, __cached__=None)


def run_module(name: str) -> None:
    """Execute a module, or the `__main__` of a package.

    Raises ModuleNotFoundError if there is none, ImportError if it has no code to execute, and
    whatever it raises.
    """
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    if spec.submodule_search_locations is not None:
        package, spec = name, importlib.util.find_spec(f"{name}.__main__")
        if spec is None:
            found = "is a package and cannot be directly executed"
            raise ImportError(f"No module named {package}.__main__; {package!r} {found}")
    loader = spec.loader
    code = loader.get_code(spec.name) if isinstance(loader, importlib.abc.InspectLoader) else None
    if code is None:
        raise ImportError(f"No code object available for {spec.name}")
    sys.argv[0] = spec.origin or spec.name
    _execute(
        code,
        __file__=spec.origin,
        __loader__=loader,
        __cached__=spec.cached,
        __package__=spec.parent,
        __spec__=spec,
    )


def _execute(code: types.CodeType, **attributes: Any) -> None:
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={}, **attributes)
    sys.modules["__main__"] = main
    exec(code, main.__dict__)
