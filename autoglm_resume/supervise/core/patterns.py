"""What messages mean: one table from exceptions and log lines to failure classes. Pure.

Every row has a message that torch 2.13, Python or a vendor really wrote as its test, in
`tests/supervise/test_patterns.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from autoglm_resume.failures import Kind


@dataclass(frozen=True)
class Pattern:
    """A row: text that matches is of class `kind`."""

    kind: Kind
    regexes: tuple[re.Pattern[str], ...]
    """Any of them."""
    means: str
    """A clause for people."""
    victim: bool = False
    """Whether a rank writes this when another one has failed."""
    early: bool = False
    """Whether it means this only before the first step."""

    def matches(self, text: str) -> bool:
        """Whether this is about `text`."""
        return any(regex.search(text) for regex in self.regexes)


def _row(kind: Kind, means: str, *alternatives: str, early: bool = False) -> Pattern:
    regexes = tuple(re.compile(text) for text in alternatives)
    return Pattern(kind, regexes, means, kind is Kind.COMMUNICATION, early)


# The first row that matches counts. What a data loader or NCCL reports often carries the message of
# the true cause along, so those that merely pass on come last.
TABLE: tuple[Pattern, ...] = (
    _row(
        Kind.DIVERGED,
        "the loss is not finite",
        r"\bLossDiverged\b",
        r"loss returned in `training_step` is (?:nan|inf)",
        r"found (?:NaN|Inf) in local forward loss",
        r"\b[Ll]oss is (?:nan|NaN|inf|infinite)\b",
    ),
    _row(
        Kind.DIVERGED,
        "weights or gradients are not finite",
        r"Detected nan and/or inf values in",
        r"^RuntimeError: Function '\w+' returned nan values",
        r"total norm of order \S+ for gradients from .* is non-finite",
        r"found (?:NaN|Inf) in local grad norm",
        r"probability tensor contains either `inf`, `nan`",
    ),
    _row(
        Kind.CUDA_OOM,
        "the GPU's memory is full",
        r"(?:CUDA|HIP|XPU) out of memory",
        r"CUDA error: out of memory",
        r"Cuda failure \d* ?'?out of memory",
        r"\bCU(?:BLAS|DNN)_STATUS_ALLOC_FAILED\b",
    ),
    _row(
        Kind.HOST_OOM,
        "shared memory (/dev/shm) is full",
        r"killed by signal: Bus error",
        r"shared memory\(shm\) for file .*(?:No space left|Cannot allocate)",
        r"</torch_\w+>.*(?:No space left on device|Cannot allocate memory)",
    ),
    _row(
        Kind.HOST_OOM,
        "the host has no memory left to allocate",
        r"DefaultCPUAllocator: (?:can't allocate|not enough) memory",
        r"MemoryError\b",
        r"\[Errno 12\]",
        r"\bstd::bad_alloc\b",
    ),
    _row(
        Kind.DISK_FULL,
        "a disk, or a quota on it, is full",
        r"\[Errno (?:28|122)\]",
        r"No space left on device",
        r"Disk quota exceeded",
    ),
    _row(
        Kind.STORAGE,
        "a file system does not do what it should",
        r"\[Errno (?:5|30|107|112|116|121)\]",
        r"\[Errno 110\] Connection timed out: '",
        r"Input/output error",
        r"Stale file handle",
        r"Read-only file system",
    ),
    _row(
        Kind.STORAGE,
        "a file could not be written to its end",
        r"inline_container\.cc:\d+\] \. unexpected pos \d+",
        r"PytorchStreamWriter failed writing file",
    ),
    _row(
        Kind.STORAGE,
        "an object store does not answer",
        r"Generic (?:S3|GCS|MicrosoftAzure) error: ",
        r"Could not connect to the endpoint URL",
    ),
    _row(
        Kind.PORT,
        "another process listens on its port",
        r"\bEADDRINUSE\b",
        r"[Aa]ddress already in use",
    ),
    _row(
        Kind.GPU_FAULT,
        "the GPU reports an error of its hardware",
        r"uncorrectable ECC error",
        r"fallen off the bus",
        r"\bGPU is lost\b",
        r"Uncorrectable NVLink",
        r"CUDA error: unknown error",
        r"\bNVRM: Xid \(PCI:[^)]*\): (?:48|62|63|64|74|79|92|94|95|119|120|136|140|143)\b",
    ),
    _row(
        Kind.GPU_FAULT,
        "there is no GPU that can be used",
        r"no CUDA-capable device",
        r"CUDA-capable device\(s\) is/are busy or unavailable",
        r"No CUDA GPUs are available",
    ),
    _row(
        Kind.EXCEPTION,
        "a GPU kernel went astray: by its code far more often than by the GPU",
        r"illegal memory access",
        r"unspecified launch failure",
        r"device-side assert triggered",
        r"CUDA error: (?:misaligned address|an illegal instruction|the launch timed out)",
    ),
    _row(
        Kind.KILLED,
        "a worker of its data loader was killed",
        r"DataLoader worker \(pid \d+\) is killed by signal: (?:Killed|Terminated)",
    ),
    _row(
        Kind.DATA_ERROR,
        "a worker of its data loader died",
        r"DataLoader worker \(pid\S* .*?\) (?:is killed by signal|exited unexpectedly)",
    ),
    _row(
        Kind.DATA_ERROR,
        "its data loader brought no batch in time",
        r"DataLoader timed out after",
    ),
    _row(
        Kind.EXCEPTION,
        "it has no file descriptor left",
        r"\[Errno 2[34]\]",
        r"Too many open files",
        r"received 0 items of ancdata",
    ),
    _row(
        Kind.DATA_ERROR,
        "the data could not be read",
        r"Caught \w+ in (?:DataLoader worker|pin memory thread)",
        r"/torch/utils/data/_utils/fetch\.py\", line \d+, in ",
        r"cannot identify image file",
        r"image file is truncated",
    ),
    _row(
        Kind.LAUNCH,
        "the script cannot be imported",
        r"^(?:ModuleNotFoundError|ImportError|SyntaxError|IndentationError|TabError): ",
        early=True,
    ),
    _row(
        Kind.LAUNCH,
        "the script does not accept its arguments",
        r"^\S+: error: (?:unrecognized arguments|the following arguments are required|argument )",
        early=True,
    ),
    _row(
        Kind.COMMUNICATION,
        "a peer closed the connection",
        r"Connection (?:closed|reset) by peer",
        r"^DistNetworkError: Broken pipe",
        r"[Ff]ailed to recv, got \d+ bytes",
        r"\bncclRemoteError\b",
    ),
    _row(
        Kind.COMMUNICATION,
        "a peer did not answer in time",
        r"Timed out waiting \d+ms for \w+ operation",
        r"failed to pass monitoredBarrier",
        r"Application timeout caused pair closure",
        r"Watchdog caught collective operation timeout",
        r"watchdog got stuck for",
    ),
    _row(
        Kind.COMMUNICATION,
        "the ranks did not find each other",
        r"client socket has timed out",
        r"wait timeout after \d+ms, keys",
        r"waiting for clients\. \d+/\d+ clients joined",
        r"Socket Timeout",
    ),
    _row(
        Kind.COMMUNICATION,
        "the network adapter lost a message",
        r"NET/IB\w* ?: ?Got (?:completion|async event)",
    ),
    _row(
        Kind.COMMUNICATION,
        "gloo gave up",
        r"/gloo/transport/",
    ),
    _row(
        Kind.COMMUNICATION,
        "NCCL gave up",
        r"NCCL communicator was aborted",
        r"\bnccl(?:System|Internal|UnhandledCuda)Error\b",
        r"NCCL error\b",
        r"Some NCCL operations have failed or timed out",
        r"^Dist(?:Backend|Store|Network)Error: ",
    ),
)

XIDS = {
    48: "an uncorrectable ECC error",
    62: "its micro-controller halted",
    63: "a broken row of its memory",
    64: "a row of its memory that could not be mapped out",
    74: "an NVLink error",
    79: "it fell off the bus",
    92: "too many ECC errors",
    94: "a contained ECC error",
    95: "an uncontained ECC error",
    119: "its system processor did not answer",
    120: "its system processor failed",
    136: "an NVLink that could not be trained",
    140: "an unrecovered ECC error",
    143: "it could not be initialised",
}
"""Xid numbers that mean broken hardware; 13, 31, 43, 45 and others are a program's doing.

Source: NVIDIA, “XID Errors”, docs.nvidia.com/deploy/xid-errors.
"""

_XID = re.compile(r"NVRM: Xid \(PCI:([0-9A-Fa-f:.]+)\): (\d+)(?:,.*?\bpid='?(\d+))?")
_LOST = re.compile(r"NVRM: .*?([0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}).*fallen off the bus")
_OOM = re.compile(r"Killed process (\d+)")
_FAULT = re.compile(r"\[(\d+)\](?:: segfault at| trap | general protection)")
_HEAD = re.compile(r"^[A-Za-z_][\w.]*(?:: .*|)$")
_LOADING = re.compile(r'File ".+/torch/utils/data/_utils/fetch\.py", line \d+, in fetch')
_DIRECT = "\nThe above exception was the direct cause of the following exception:\n"


@dataclass(frozen=True)
class Xid:
    """An error of a GPU in the kernel's log."""

    bus: str
    """Address, such as “0000:3b:00”."""
    code: int
    pid: int | None


def explain(type: str, message: str, traceback: str = "", *, early: bool) -> Pattern | None:
    """The row for an exception, or for what it was raised from: the first cause says most."""
    heads = [_head(part) for part in traceback.split(_DIRECT)[:-1]]
    loading = _LOADING.findall(traceback)  # without worker processes nothing else tells
    for text in (*heads, f"{type}: {message}", *loading[:1]):
        if (found := match(text, early=early)) is not None:
            return found
    return None


def match(text: str, *, early: bool) -> Pattern | None:
    """The first row that matches; those for starts only count if it is `early`."""
    return next((row for row in TABLE if (early or not row.early) and row.matches(text)), None)


def in_log(log: str, *, early: bool) -> tuple[Pattern, str] | None:
    """The last line of a log that a row matches, and the row."""
    for line in reversed(log.splitlines()):
        if (found := match(line.strip(), early=early)) is not None:
            return found, line.strip()
    return None


def xid(line: str) -> Xid | None:
    """The GPU error that a line of the kernel's log reports, if it means broken hardware."""
    if (found := _XID.search(line)) is not None:
        code, pid = int(found[2]), found[3]
        return Xid(found[1], code, int(pid) if pid else None) if code in XIDS else None
    found = _LOST.search(line)
    return Xid(found[1], 79, None) if found else None


def oom_victim(line: str) -> int | None:
    """Process that the kernel killed for lack of memory, if a line of its log says so."""
    found = _OOM.search(line)
    return int(found[1]) if found else None


def faulted(line: str) -> int | None:
    """Process whose crash a line of the kernel's log reports."""
    found = _FAULT.search(line)
    return int(found[1]) if found else None


def notable(line: str) -> bool:
    """Whether a line of the kernel's log can bear on the end of a rank."""
    return any(read(line) is not None for read in (xid, oom_victim, faulted))


def _head(part: str) -> str:
    """“ValueError: …”: the last line of a formatted exception that can be its first."""
    lines = part.strip().splitlines()
    return next((line for line in reversed(lines) if _HEAD.match(line)), "")
