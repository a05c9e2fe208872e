"""The heartbeat board: shared memory between the supervisor and its ranks.

A beat is a store into memory: no system call, no lock, about a microsecond. Every record has two
copies that are written in turn, each with a sequence number and a CRC-32, and a reader takes the
valid copy with the higher number. So a torn read is impossible on any memory model, and a rank
that is killed in the middle of a store leaves its previous beat readable.

The memory is an anonymous file (memfd) of the supervisor: full disks do not touch it and nothing
is left behind, whoever dies. Others open it as `/proc/<supervisor>/fd/<n>`.

Layout: a 64-byte header, one control record (written by the supervisor, read by every rank at
each step boundary), one for what ranks agree on, one record per rank, and one histogram of silences
per rank (see silences.py). A record is two copies of 64 bytes.
"""

from __future__ import annotations

import enum
import fcntl
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autoglm_resume import files
from autoglm_resume.protocol import silences
from autoglm_resume.protocol.silences import SilenceHistogram

MOST_RANKS = 1 << 16
"""Of a board that is looked at; nobody has so many on one machine."""
_MAGIC = b"autoglm board 2\0"
_HEADER = struct.Struct("<16sI")
_COPY = 64
_RECORD = 2 * _COPY
_FIRST = 64

_CRC = struct.Struct("<I")
# sequence, pid, phase, saving, step, time, first step time, loss, grad norm; then the CRC
_BEAT = struct.Struct("<QIHHqqqdd")
# sequence, save_at, stop_at, exit_rank, exit_at, exit_code; then the CRC
_CONTROL = struct.Struct("<Qqqqqi")
# sequence, step, whether all ranks save after it
_DECISION = struct.Struct("<Qqi")


class Phase(enum.IntEnum):
    """What a rank was doing at its last beat."""

    NONE = 0
    START = 1
    RESTORE = 2
    DATA = 3
    FORWARD = 4
    BACKWARD = 5
    OPTIMIZER = 6
    SAVE = 7
    DONE = 8
    EVALUATE = 9
    STEPPED = 10

    @property
    def label(self) -> str:
        """As in “died at step 41, in backward”."""
        return _LABELS[self]


_START = int(Phase.START)
_LABELS = {
    Phase.NONE: "before its first beat",
    Phase.START: "in start-up",
    Phase.RESTORE: "while restoring",
    Phase.DATA: "between steps",
    Phase.FORWARD: "in forward",
    Phase.BACKWARD: "in backward",
    Phase.OPTIMIZER: "in the optimizer",
    Phase.SAVE: "while saving",
    Phase.DONE: "after its last step",
    Phase.EVALUATE: "in evaluation",
    Phase.STEPPED: "after the optimizer",
}


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of progress; times are CLOCK_MONOTONIC nanoseconds, 0 for never."""

    pid: int = 0
    phase: Phase = Phase.NONE
    step: int = -1
    """Steps completed; -1 before the rank knows where it starts."""
    time: int = 0
    first_step_time: int = 0
    loss: float = float("nan")
    grad_norm: float = float("nan")
    saving: bool = False
    """Whether its last snapshot is still being persisted."""


NEVER = Beat()
"""Of a rank that has not beaten."""


@dataclass(frozen=True)
class Control:
    """What the supervisor asks of the ranks, in completed steps; -1 where it asks nothing."""

    save_at: int = -1
    stop_at: int = -1
    exit_rank: int = -1
    exit_at: int = -1
    exit_code: int = 0


class _Record:
    """Two copies of a packed struct, written in turn."""

    def __init__(self, memory: mmap.mmap, offset: int, layout: struct.Struct) -> None:
        self._memory = memory
        self._offset = offset
        self._layout = layout
        self._sequence = max((s for s, _ in self._valid()), default=0)
        self._read = 0
        """Sequence number of what was read last."""

    def _valid(self) -> Iterator[tuple[int, tuple[int | float, ...]]]:
        size = self._layout.size
        for copy in (0, 1):
            start = self._offset + copy * _COPY
            data = self._memory[start : start + size + 4]
            values = self._layout.unpack(data[:size])
            if values[0] and _CRC.unpack(data[size:])[0] == zlib.crc32(data[:size]):
                yield values[0], values

    def write(self, *values: int | float) -> None:
        self._sequence += 1
        data = self._layout.pack(self._sequence, *values)
        start = self._offset + (self._sequence & 1) * _COPY
        self._memory[start : start + len(data) + 4] = data + _CRC.pack(zlib.crc32(data))

    def read(self) -> tuple[int | float, ...] | None:
        # Only if the writer went round twice during the read, both copies can be invalid, or the
        # valid one be older than what was read before.
        for _ in range(100):
            newest = max(self._valid(), default=None, key=lambda item: item[0])
            if newest is not None and newest[0] >= self._read:
                self._read = newest[0]
                return newest[1][1:]
            if not any(self._memory[self._offset : self._offset + _RECORD]):
                return None
        return None


def _size(world_size: int) -> int:
    return _FIRST + (_RECORD * (2 + world_size)) + silences.SIZE * world_size


class Board:
    """The supervisor's side: reads beats, writes requests."""

    def __init__(self, memory: mmap.mmap, world_size: int, fd: int) -> None:
        self._memory = memory
        self._fd = fd
        self.world_size = world_size
        self._control = _Record(memory, _FIRST, _CONTROL)
        self._decision_at = _FIRST + _RECORD
        self._beats = [
            _Record(memory, _FIRST + _RECORD * (2 + rank), _BEAT) for rank in range(world_size)
        ]
        view = memoryview(memory)
        first = _FIRST + _RECORD * (2 + world_size)
        self.silences = [
            SilenceHistogram(view, first + silences.SIZE * rank) for rank in range(world_size)
        ]
        """How long each rank was silent between beats."""
        view.release()

    @classmethod
    def create(cls, world_size: int) -> tuple[Board, int]:
        """A new board and the descriptor that keeps it alive."""
        fd = os.memfd_create("autoglm-board", os.MFD_CLOEXEC)
        size = _size(world_size)
        os.ftruncate(fd, size)
        memory = mmap.mmap(fd, size)
        memory[: _HEADER.size] = _HEADER.pack(_MAGIC, world_size)
        return cls(memory, world_size, fd), fd

    @classmethod
    def open(cls, path: Path) -> Board:
        """The board that another process made; OSError or ValueError if it is not there."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        memory = mmap.mmap(fd, 0)
        header = memory[: _HEADER.size].ljust(_HEADER.size, b"\0")
        magic, world_size = _HEADER.unpack(header)
        if magic != _MAGIC or len(memory) < _size(world_size):
            raise ValueError(f"{path} is not a heartbeat board")
        return cls(memory, world_size, fd)

    @classmethod
    def look(cls, path: Path) -> Board:
        """A copy of a board that anybody may have made, to look at. Raises OSError or ValueError.

        Whoever cuts a file short that others have mapped ends their processes.
        """
        with files.reading(path) as file:
            header = file.read(_HEADER.size).ljust(_HEADER.size, b"\0")
            magic, world_size = _HEADER.unpack(header)
            if magic != _MAGIC or world_size > MOST_RANKS:
                raise ValueError(f"{path} is not a heartbeat board")
            size = _size(world_size)
            data = header + file.read(size - len(header))
            if len(data) != size:
                raise ValueError(f"{path} is not a whole heartbeat board")
            memory = mmap.mmap(-1, size)
            memory[:] = data
            return cls(memory, world_size, -1)

    @classmethod
    def join(cls, path: str | None, world_size: int) -> Board:
        """That at `path`, or, without one, a board that nobody looks at."""
        return cls.create(world_size)[0] if path is None else cls.open(Path(path))

    def beat(self, rank: int) -> Beat:
        """The last beat of `rank`, also after its death."""
        values = self._beats[rank].read()
        if values is None:
            return NEVER
        pid, phase, saving, step, at, first, loss, grad_norm = values
        return Beat(
            int(pid),
            Phase(int(phase)),
            int(step),
            int(at),
            int(first),
            loss,
            grad_norm,
            bool(saving),
        )

    def beats(self) -> tuple[Beat, ...]:
        """The last beat of every rank."""
        return tuple(self.beat(rank) for rank in range(self.world_size))

    def ask(self, control: Control) -> None:
        """Publish a request to every rank."""
        self._control.write(
            control.save_at,
            control.stop_at,
            control.exit_rank,
            control.exit_at,
            control.exit_code,
        )

    def control(self) -> Control:
        """The last request."""
        values = self._control.read()
        return Control(*(int(v) for v in values)) if values else Control()

    def agree(self, step: int) -> bool:
        """Whether all ranks save after `step`: as the first one that asks finds them.

        It does unless one of them is still saving. No rank waits for another, only for the lock
        that is held for the microseconds of this call and that its holder's death gives back.
        """
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            record = _Record(self._memory, self._decision_at, _DECISION)
            decided = record.read()
            if decided is None or int(decided[0]) != step:
                save = not any(beat.saving for beat in self.beats())
                record.write(step, int(save))
                return save
            return bool(decided[1])
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def pulse(self, rank: int) -> Pulse:
        """The rank's own side."""
        return Pulse(self, self._beats[rank], self.silences[rank])

    def close(self) -> None:
        """Unmap the memory."""
        for each in self.silences:
            each.release()
        self._memory.close()


class Pulse:
    """A rank's side: writes its own beats, reads the requests."""

    def __init__(self, board: Board, record: _Record, silences: SilenceHistogram) -> None:
        self._board = board
        self._write = record.write
        self._silent = silences.add
        self._last = 0
        self._was = _START
        self._pid = os.getpid()
        self._phase = int(Phase.START)
        self._step = -1
        self._first = 0
        self._saving = 0
        self._loss = float("nan")
        self._grad_norm = float("nan")

    def phase(self, phase: Phase) -> None:
        """Beat: the rank entered `phase`."""
        self._phase = int(phase)
        self._beat(time.monotonic_ns())

    def alive(self) -> None:
        """Beat: the rank is where it was, and busy."""
        self._beat(time.monotonic_ns())

    def at(self, step: int) -> None:
        """Beat: `step` steps are complete, without having run one (a resume)."""
        self._step = step
        self._phase = int(Phase.DATA)
        self._beat(time.monotonic_ns())

    def completed(self, step: int) -> None:
        """Beat: `step` steps are complete."""
        now = time.monotonic_ns()
        self._step = step
        self._phase = int(Phase.DATA)
        if not self._first:
            self._first = now
        self._beat(now)

    def report(self, loss: float | None, grad_norm: float | None) -> None:
        """Keep figures to go with the next beat."""
        if loss is not None:
            self._loss = loss
        if grad_norm is not None:
            self._grad_norm = grad_norm

    def saving(self, under_way: bool) -> None:
        """Say, with the next beat, whether the last snapshot is still being persisted."""
        self._saving = int(under_way)

    def agree(self, step: int) -> bool:
        """Whether all ranks save after `step`; see `Board.agree`."""
        self._beat(time.monotonic_ns())
        return self._board.agree(step)

    def _beat(self, now: int) -> None:
        if self._last:
            self._silent(self._was, now - self._last)
        # Until its first step is complete all that a rank does is to start.
        self._last, self._was = now, self._phase if self._first else _START
        self._write(
            self._pid,
            self._phase,
            self._saving,
            self._step,
            now,
            self._first,
            self._loss,
            self._grad_norm,
        )

    def control(self) -> Control:
        """What the supervisor asks."""
        return self._board.control()
