"""The launchers that a job can name."""

from __future__ import annotations

from collections.abc import Mapping

from autoglm_resume.supervise.ranks.launcher import Launcher
from autoglm_resume.supervise.ranks.torchrun import Torchrun
from autoglm_resume.supervise.ranks.warm import Warm

LAUNCHERS: Mapping[str, type[Launcher]] = {"warm": Warm, "torchrun": Torchrun}
"""By the job's `launcher`."""
