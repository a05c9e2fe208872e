"""`python -m autoglm_resume.supervise.preflight.disk_probe BYTES DIRECTORY…`: room? an answer?

A process of its own, because whoever touches a file system that does not answer may wait for ever.
The first directory needs so many bytes, the others a few.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from autoglm_resume import linux

FEW = 4096


def problem(directory: str, needed: int) -> str:
    """What is wrong with a directory that `needed` bytes are to be written to, empty if nothing."""
    try:
        free = linux.free_bytes(Path(directory))
        if free < needed:
            return f"{directory}: {free:,} bytes are free, {needed:,} are needed"
        # Quotas and inodes, of which that number knows nothing, and read-only file systems.
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(bytes(FEW))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return f"{directory}: {error.strerror}"
    return ""


if __name__ == "__main__":
    needs = [int(sys.argv[1])] + [FEW] * (len(sys.argv) - 3)
    for path, need in zip(sys.argv[2:], needs, strict=True):
        if found := problem(path, need):
            sys.exit(found)
