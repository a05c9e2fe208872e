"""Whether a machine is fit for a job: from what was found there to verdicts. Pure.

A fact that is None could not be known; that is said, and is no failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

GIB = 2**30
SHM_BYTES = 1 << 28
"""Of /dev/shm: NCCL takes some 10 MB a rank, loader workers pass batches through it."""
GPU_SHARE = 0.05
"""Of a GPU's memory, what others may take unnoticed: a desktop, say."""
CLOCK_SECONDS = 60.0
"""By which clocks of machines that share a directory may differ."""
OPEN_FILES = 4096


@dataclass(frozen=True)
class MachineCheck:
    """One verdict."""

    name: str
    ok: bool | None
    """None: it could not be known."""
    found: str
    expected: str = ""
    hint: str = ""
    """What to do about it."""
    guard: str = ""
    """The switch in the job's `guards` that says how serious it is; empty where there is none."""
    refuses: bool = False
    """Whether `autoglm run` refuses to begin, whatever that switch says."""


@dataclass(frozen=True)
class Process:
    """One that uses a GPU."""

    pid: int
    name: str
    bytes: int | None
    ours: bool
    """Whether it belongs to this run."""


@dataclass(frozen=True)
class GpuFacts:
    """One that the ranks would use; sizes in bytes."""

    name: str
    """As CUDA_VISIBLE_DEVICES or the driver calls it."""
    error: str = ""
    """Why it does not answer."""
    total: int = 0
    used: int = 0
    uncorrected: int | None = None
    """Memory errors since the driver was loaded that ECC could not correct."""
    remap_failed: bool | None = None
    """Whether a broken row of memory could not be replaced."""
    processes: tuple[Process, ...] = ()


@dataclass(frozen=True)
class StorageAnswer:
    """A directory or bucket that was asked for."""

    target: str
    error: str
    """Empty if it answered."""
    seconds: float
    replica: bool = False
    hung: bool = False
    """Whether it did not answer at all."""


@dataclass(frozen=True)
class Needs:
    """What the job needs; sizes in bytes, None where nothing was measured yet."""

    ranks: int
    slots: int = 0
    """Snapshots that each rank holds in memory."""
    snapshot: int | None = None
    """One snapshot of all ranks."""
    stored: int | None = None
    """One checkpoint on the disk."""
    keep: int = 1
    present: int = 0
    """Checkpoints that are there."""
    free_disk: int = 0
    port: int | None = None
    written: float | None = None
    """Unix seconds of the newest thing that this run has written."""


@dataclass(frozen=True)
class MachineFacts:
    """What was found. What was not looked for is None, and is not judged."""

    now: float | None = None
    """Unix seconds."""
    gpus: tuple[GpuFacts, ...] | None = None
    driver: str = ""
    """Why GPUs could not be asked."""
    memory: int | None = None
    shm: int | None = None
    disk: int | None = None
    port_owner: str | None = None
    """Empty: the fixed port is free."""
    places: tuple[StorageAnswer, ...] = ()
    leftovers: tuple[str, ...] | None = None
    """Processes that an earlier supervisor of this run left behind."""
    collective: tuple[str, float] | None = None
    """(why it failed, seconds) of a round among as many processes as there will be ranks."""


@dataclass(frozen=True)
class System:
    """The software and limits of a machine."""

    python: str
    versions: Mapping[str, str]
    """Of torch, CUDA, NCCL, as torch says; `error` if it cannot be imported."""
    open_files: int
    """Soft limit."""
    limits: Mapping[str, str]
    """Of the cgroup: memory, processes, cpu."""
    features: Mapping[str, str]
    """What autoglm uses of the kernel: why not, empty if it works."""


def judge(facts: MachineFacts, needs: Needs) -> list[MachineCheck]:
    """Every verdict that `facts` allow, in the order in which a start would need them."""
    return [
        *_leftovers(facts),
        *_gpus(facts),
        *_memory(facts, needs),
        *_disk(facts, needs),
        *_port(facts, needs),
        *_clock(facts, needs),
        *map(_place, facts.places),
        *_collective(facts, needs),
    ]


def judge_system(system: System) -> Iterator[MachineCheck]:
    """What `autoglm doctor` says of the machine itself."""
    yield MachineCheck("python", True, system.python, "3.10 or newer")
    versions = dict(system.versions)
    error = versions.pop("error", "")
    found = error or ", ".join(f"{name} {version}" for name, version in versions.items())
    yield MachineCheck(
        "torch", not error, found, "an importable torch", "install torch, or repair it"
    )
    for name, reason in system.features.items():
        hint = "a newer kernel, or a container that allows it"
        yield MachineCheck(name, not reason, reason or "works", "works", hint)
    yield MachineCheck(
        "open files",
        system.open_files >= OPEN_FILES,
        f"{system.open_files:,} per process",
        f"at least {OPEN_FILES:,}",
        "raise it with `ulimit -n`, or in limits.conf: loader workers use many",
    )
    for name, limit in system.limits.items():
        yield MachineCheck(f"{name} limit", True, limit)


def _leftovers(facts: MachineFacts) -> Iterator[MachineCheck]:
    if facts.leftovers is not None:
        yield MachineCheck(
            "leftovers",
            not facts.leftovers,
            "; ".join(facts.leftovers) or "none",
            "no process of an earlier supervisor of this run",
            "`autoglm run` and `autoglm resume` end them",
        )


def _gpus(facts: MachineFacts) -> Iterator[MachineCheck]:
    if facts.gpus is None:
        if facts.driver:
            yield MachineCheck(
                "gpus", None, facts.driver, "answers of the driver", "try nvidia-smi"
            )
        return
    broken = [f"{gpu.name}: {trouble}" for gpu in facts.gpus if (trouble := _trouble(gpu))]
    answering = [gpu for gpu in facts.gpus if not gpu.error]
    yield MachineCheck(
        "gpus",
        not broken,
        "; ".join(broken) or (f"{len(answering)}, healthy" if answering else "none"),
        "every visible GPU answers and is healthy",
        "reset it or restart the machine, or leave it out with CUDA_VISIBLE_DEVICES",
        "gpus",
    )
    if not answering:
        return
    taken = [text for gpu in answering if (text := _taken(gpu))]
    yield MachineCheck(
        "gpu memory",
        not taken,
        "; ".join(taken) or "free",
        f"others use at most {GPU_SHARE:.0%}",
        "end those processes, or choose other GPUs with CUDA_VISIBLE_DEVICES",
        "gpu_memory",
    )


def _trouble(gpu: GpuFacts) -> str:
    if gpu.error:
        return gpu.error
    if gpu.remap_failed:
        return "a broken row of its memory could not be replaced"
    if gpu.uncorrected:
        return f"{gpu.uncorrected} memory errors that ECC could not correct"
    return ""


def _taken(gpu: GpuFacts) -> str:
    others = [process for process in gpu.processes if not process.ours]
    ours = sum(process.bytes or 0 for process in gpu.processes if process.ours)
    used = gpu.used - ours
    if used <= GPU_SHARE * gpu.total:
        return ""
    who = ", ".join(f"process {each.pid} ({each.name})" for each in others)
    return f"{gpu.name}: {used / GIB:.1f} of {gpu.total / GIB:.1f} GiB used by {who or 'others'}"


def _memory(facts: MachineFacts, needs: Needs) -> Iterator[MachineCheck]:
    if facts.memory is not None:
        free = f"{facts.memory / GIB:.2f} GiB free"
        if needs.snapshot is None:
            yield MachineCheck("host memory", True, free, "not measured yet: no checkpoint")
        elif needs.slots:
            needed = needs.slots * needs.snapshot
            yield MachineCheck(
                "host memory",
                facts.memory >= needed,
                free,
                f"{needed / GIB:.2f} GiB for {needs.slots} snapshots of each of {needs.ranks} "
                "ranks (checkpoint.memory)",
                "lower checkpoint.memory, else saves may have to wait for the disk",
                "memory",
            )
    if facts.shm is not None:
        yield MachineCheck(
            "/dev/shm",
            facts.shm >= SHM_BYTES,
            f"{facts.shm / GIB:.2f} GiB free",
            f"at least {SHM_BYTES / GIB:.2f} GiB for NCCL and loader workers",
            "in a container: --shm-size=8g, or --ipc=host",
            "shm",
        )


def _disk(facts: MachineFacts, needs: Needs) -> Iterator[MachineCheck]:
    if facts.disk is None:
        return
    least, why = needs.free_disk, "guards.free_disk"
    if needs.stored is not None:
        # While one more is being written, none of those that are kept may go.
        coming = max(1, needs.keep + 1 - needs.present)
        if coming * needs.stored > least:
            least = coming * needs.stored
            why = f"the next {coming} checkpoints" if coming > 1 else "the next checkpoint"
    yield MachineCheck(
        "disk",
        facts.disk >= least,
        f"{facts.disk / GIB:.2f} GiB free",
        f"at least {least / GIB:.2f} GiB for {why}",
        "free some space, keep fewer checkpoints (checkpoint.keep), or point checkpoint.dir "
        "elsewhere",
        "disk",
        refuses=facts.disk < needs.free_disk,
    )


def _port(facts: MachineFacts, needs: Needs) -> Iterator[MachineCheck]:
    if facts.port_owner is not None:
        yield MachineCheck(
            "port",
            not facts.port_owner,
            facts.port_owner or "free",
            f"port {needs.port} free (env.MASTER_PORT)",
            "end that process, or leave MASTER_PORT out: every attempt then gets a free one",
        )


def _clock(facts: MachineFacts, needs: Needs) -> Iterator[MachineCheck]:
    if facts.now is None or needs.written is None:
        return
    behind = needs.written - facts.now
    yield MachineCheck(
        "clock",
        behind <= CLOCK_SECONDS,
        f"{behind:.0f} s behind"
        if behind > CLOCK_SECONDS
        else "agrees with what this run has written",
        f"at most {CLOCK_SECONDS:.0f} s behind what this run has written",
        "set the clock (NTP): ages of checkpoints, and what is kept by age, would be wrong",
        "clock",
    )


def _place(place: StorageAnswer) -> MachineCheck:
    return MachineCheck(
        f"{'replica' if place.replica else 'storage'} {place.target}",
        not place.error,
        place.error or f"answered in {place.seconds * 1e3:.0f} ms",
        "an answer",
        "look at the mount and at the network",
        "" if place.replica else "storage",
    )


def _collective(facts: MachineFacts, needs: Needs) -> Iterator[MachineCheck]:
    if facts.collective is not None:
        error, seconds = facts.collective
        yield MachineCheck(
            "collective round",
            not error,
            error or f"{needs.ranks} processes in {seconds:.1f} s, imports included",
            "all processes reach each other",
            "look at the network interfaces (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
            "collective",
        )
