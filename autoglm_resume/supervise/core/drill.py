"""Drills: faults that a person orders, so that a recovery can be rehearsed. Parsing is pure.

kill:rank=1,step=30     SIGKILL rank 1 when it has completed 30 steps
stop:rank=0,step=30     SIGSTOP it: a hang
exit:code=3,step=30     let a rank exit (needs a session)
corrupt:latest,step=30  flip one bit in the newest checkpoint, then kill a rank
random:seed=7,every=20s,count=5   SIGKILL ranks at random moments
none                    no drill
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from autoglm_resume.errors import UsageError
from autoglm_resume.job.units import parse_duration

KINDS = ("kill", "stop", "exit", "corrupt", "random", "none")
_KEYS = {
    "kill": {"rank", "step"},
    "stop": {"rank", "step"},
    "exit": {"rank", "step", "code"},
    "corrupt": {"rank", "step"},
    "random": {"seed", "every", "count"},
    "none": set[str](),
}


@dataclass(frozen=True)
class Drill:
    """One ordered fault. `rank` None means rank 0; a `step` is a number of completed steps."""

    spec: str
    kind: str
    rank: int | None = None
    step: int | None = None
    code: int = 1
    seed: int = 0
    every: float = 30.0
    """Mean seconds between random kills."""
    count: int | None = None


def parse(specs: Sequence[str], world_size: int) -> tuple[Drill, ...]:
    """The drills in `--drill` options. Raises UsageError naming the option and what is allowed."""
    drills = (_parse(spec, world_size) for spec in specs)
    return tuple(drill for drill in drills if drill.kind != "none")


def moments(drill: Drill, world_size: int) -> list[tuple[float, int]]:
    """Of a random drill: seconds to wait before each kill, and its rank; the seed decides all."""
    generator = random.Random(drill.seed)
    count = drill.count if drill.count is not None else 1000
    return [
        (generator.expovariate(1 / drill.every), generator.randrange(world_size))
        for _ in range(count)
    ]


def _parse(spec: str, world_size: int) -> Drill:
    kind, _, rest = spec.partition(":")
    if kind not in KINDS:
        raise _bad(spec, f"expected one of {', '.join(KINDS)}, found {kind!r}")
    fields: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if kind == "corrupt" and item == "latest":
            continue
        if not equals or key not in _KEYS[kind]:
            allowed = ", ".join(sorted(_KEYS[kind])) or "nothing"
            raise _bad(spec, f"{kind} takes {allowed}; found {item!r}")
        fields[key] = value
    drill = Drill(
        spec,
        kind,
        rank=_whole(spec, fields, "rank"),
        step=_whole(spec, fields, "step"),
        code=_whole(spec, {"code": "1", **fields}, "code") or 0,
        seed=_whole(spec, fields, "seed") or 0,
        every=_seconds(spec, fields.get("every", "30s")),
        count=_whole(spec, fields, "count"),
    )
    if drill.rank is not None and drill.rank >= world_size:
        raise _bad(spec, f"rank {drill.rank} does not exist: the world size is {world_size}")
    if not 1 <= drill.code <= 255:
        raise _bad(spec, f"expected an exit code from 1 to 255, found {drill.code}")
    return drill


def _whole(spec: str, fields: dict[str, str], key: str) -> int | None:
    value = fields.get(key)
    if value is None:
        return None
    if not value.isdecimal():
        raise _bad(spec, f"{key}: expected a whole number, found {value!r}")
    return int(value)


def _seconds(spec: str, value: str) -> float:
    try:
        seconds = parse_duration(value)
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise _bad(spec, f"every: expected a duration such as 20s, found {value!r}")
    return seconds


def _bad(spec: str, problem: str) -> UsageError:
    return UsageError(
        f"--drill {spec}: {problem}",
        hint="for example: --drill kill:rank=1,step=30, --drill random:seed=7,every=20s",
    )
