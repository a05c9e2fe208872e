"""Ways to hurt a run that need the machine: cgroups, mounts, a false clock. Each says why not."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from lib.fault_bed import Bed

CGROUPS = Path("/sys/fs/cgroup")
BUSY = 5.0
"""Seconds for processes to leave a cgroup."""

CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long none, *ahead = &none;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CLOCK_AHEAD");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *found = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, fd, 0);
    if (found != MAP_FAILED) ahead = found;
    close(fd);
}
int clock_gettime(clockid_t id, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, id, now);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += *ahead;
    return failed;
}
time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *into, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    into->tv_sec = now.tv_sec;
    into->tv_usec = now.tv_nsec / 1000;
    return 0;
}
/* The kernel does not know of it: deadlines go back to its time. Small ones are monotonic. */
static struct timespec real(const struct timespec *at) {
    struct timespec there = *at;
    if (there.tv_sec > 1000000000) there.tv_sec -= *ahead;
    return there;
}
int pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *at) {
    static int (*next)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!next) next = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!next) next = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    struct timespec there = real(at);
    return next(c, m, &there);
}
int sem_timedwait(sem_t *s, const struct timespec *at) {
    static int (*next)(sem_t *, const struct timespec *);
    if (!next) next = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec there = real(at);
    return next(s, &there);
}
"""
"""Between a process and the C library: the wall clock is as far ahead as a file says."""


class NotHere(Exception):
    """This machine does not let us do that; the message says why."""


def run(*command: str | Path) -> None:
    """Raises NotHere with what the command said."""
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    except OSError as error:
        raise NotHere(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise NotHere(f"{command[0]}: {done.stderr.strip()}")


def memory_limit(bed: Bed, limit: int) -> None:
    """The run is to live in a cgroup of its own with so many bytes of memory."""
    group = _cgroup(bed, "memory")
    name = "memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes"
    try:
        (group / name).write_text(str(limit))
    except OSError as error:
        raise NotHere(f"{group / name}: {error.strerror}") from error
    bed.prefix = ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$0" "$@"')


def freezer(bed: Bed) -> Path:
    """A cgroup that can be frozen so that not even SIGKILL ends what is in it."""
    group = _cgroup(bed, "freezer")
    if not (group / "freezer.state").exists():
        raise NotHere("only the freezer of cgroup version 1 holds killed processes")
    bed.undo.append(lambda: (group / "freezer.state").write_text("THAWED"))
    return group


def _cgroup(bed: Bed, controller: str) -> Path:
    home = CGROUPS / controller if (CGROUPS / controller).is_dir() else CGROUPS
    group = home / f"autoglm-{bed.directory.name}-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise NotHere(f"{group}: {error.strerror}") from error

    def leave() -> None:
        for process in bed.own():
            process.kill()
        _patiently(group.rmdir)

    bed.undo.append(leave)
    if not (group / "cgroup.procs").exists() or not list(group.glob(f"{controller}.*")):
        raise NotHere(f"{group}: the {controller} controller is not available")
    return group


def small_disk(bed: Bed, size: str = "16m") -> Path:
    """A file system of its own for the checkpoints."""
    disk = bed.directory / "disk"
    disk.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk)
    bed.undo.append(lambda: _unmount(disk))
    bed.checkpoints = disk / "checkpoints"
    return disk


def _unmount(disk: Path) -> None:
    while subprocess.run(["umount", "-l", disk], capture_output=True).returncode == 0:
        pass


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    hog = disk / "hog"
    with hog.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
    return hog


def read_only(disk: Path) -> None:
    """Nothing can be written there until `writable`."""
    # A mount above it: the file system itself stays writable while a file is open for writing.
    run("mount", "--bind", disk, disk)
    run("mount", "-o", "remount,bind,ro", disk)


def writable(disk: Path) -> None:
    """As before."""
    run("umount", "-l", disk)


def false_clock(bed: Bed) -> None:
    """The run is to see a wall clock that `set_ahead` moves."""
    if shutil.which("cc") is None:
        raise NotHere("no C compiler for the library that moves the clock")
    source, library = bed.directory / "clock.c", bed.directory / "clock.so"
    source.write_text(CLOCK)
    run("cc", "-shared", "-fPIC", "-O1", "-w", "-o", library, source, "-ldl")
    ahead = _ahead(bed)
    ahead.write_bytes(bytes(8))
    bed.variables |= {"LD_PRELOAD": str(library), "CLOCK_AHEAD": str(ahead)}


def set_ahead(bed: Bed, seconds: int) -> None:
    """So many seconds of the true time, from now on."""
    with _ahead(bed).open("r+b") as file:  # never shorter: processes have it mapped
        file.write(seconds.to_bytes(8, "little", signed=True))


def _ahead(bed: Bed) -> Path:
    return bed.directory / "clock.ahead"


def flip(checkpoint: Path) -> None:
    """Flip one bit in the middle of the largest file of a checkpoint."""
    file = max(checkpoint.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def _patiently(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + BUSY
    while True:
        try:
            what()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)
