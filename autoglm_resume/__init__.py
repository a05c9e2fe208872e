"""autoglm: `torchrun` that survives.

The names here are what a training script imports; importing this package is cheap, and torch is
imported only when they are used.

    import autoglm_resume as autoglm

    session = autoglm.init()
    session.track(model=model, optimizer=optimizer)
    for step in session.steps(1000):
        ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoglm_resume.worker.beginning import init
    from autoglm_resume.worker.feed.sampler import ResumableSampler
    from autoglm_resume.worker.session import Session
    from autoglm_resume.worker.spare import launch

__version__ = "0.1.0"
__all__ = ["ResumableSampler", "Session", "__version__", "init", "launch"]

_HOMES = {
    "init": "autoglm_resume.worker.beginning",
    "Session": "autoglm_resume.worker.session",
    "launch": "autoglm_resume.worker.spare",
    "ResumableSampler": "autoglm_resume.worker.feed.sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
