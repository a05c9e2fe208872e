"""For scripts under test: a run that waits for its fault does not end before it, on any machine."""

import os
import time
from pathlib import Path


def hold(rank: int, step: int) -> None:
    """Wait before `step` where HOLD names it, to be killed or until the test lets go of it.

    HOLD has words ATTEMPT:RANK:STEP, the first step being 0; the other ranks wait for this one in
    their next collective.
    """
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if f"{attempt}:{rank}:{step}" in os.environ.get("HOLD", "").split():
        while not Path(os.environ["REHEARSAL"], f"go-on-{step}").exists():
            time.sleep(0.005)
