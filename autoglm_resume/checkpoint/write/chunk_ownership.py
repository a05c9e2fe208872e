"""Which rank stores what several ranks hold alike.

Every rank's saver writes down the digests of all its chunks and reads what the others wrote. A
chunk that is the same in several ranks is then stored by one of them, chosen by its name, so that
all agree without another word and each stores its share. Nothing is assumed to be replicated:
what differs, is missing, or comes too late, everybody stores itself.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from threading import Event

from autoglm_resume import files
from autoglm_resume.checkpoint.chunks.cut import Position
from autoglm_resume.checkpoint.format.document import LARGEST_PART

PATIENCE = 10.0
"""Seconds to wait for the other ranks' claims, beyond which this rank stores all of its own."""


def claim_file(rank: int) -> str:
    """A temporary name: whatever is left of it goes with the next sweep."""
    return f"{files.TEMPORARY}claim-{rank:05d}"


def publish(directory: Path, rank: int, mine: Mapping[Position, str]) -> None:
    """Say what `rank` holds. Raises OSError."""
    claims = {f"{tensor}#{index}": name for (tensor, index), name in mine.items()}
    files.write(directory / claim_file(rank), json.dumps(claims).encode(), durable=False)


def left_to_peers(
    directory: Path, rank: int, world_size: int, mine: Mapping[Position, str], abandoned: Event
) -> frozenset[str]:
    """Digests in `mine` that other ranks store; none when not all of them have spoken in time."""
    others: dict[int, Mapping[str, str]] = {}
    deadline = time.monotonic() + PATIENCE
    pause = 0.001
    while len(others) < world_size - 1:
        for peer in range(world_size):
            if peer != rank and peer not in others:
                claims = _read(directory / claim_file(peer))
                if claims is not None:
                    others[peer] = claims
        if len(others) == world_size - 1:
            break
        if time.monotonic() > deadline or abandoned.wait(pause):
            return frozenset()
        pause = min(pause * 1.5, 0.05)
    owners = {key: _owner(key, name, rank, others) for key, name in mine.items()}
    # The same bytes at two positions may have two owners: whoever owns one stores them.
    stored = {mine[key] for key, owner in owners.items() if owner == rank}
    return frozenset(mine.values()) - stored


def retract(directory: Path, world_size: int) -> None:
    """Remove all claims: the checkpoint is committed."""
    for rank in range(world_size):
        (directory / claim_file(rank)).unlink(missing_ok=True)


def _owner(key: Position, name: str, rank: int, others: Mapping[int, Mapping[str, str]]) -> int:
    """By the position and not the content, so that a chunk's base is with the same rank."""
    text = f"{key[0]}#{key[1]}"
    holders = sorted([rank, *(peer for peer, held in others.items() if held.get(text) == name)])
    return holders[zlib.crc32(text.encode()) % len(holders)]


def _read(file: Path) -> Mapping[str, str] | None:
    try:
        claims = json.loads(files.read(file, LARGEST_PART))
    except (OSError, ValueError):
        return None
    return claims if isinstance(claims, dict) else None
