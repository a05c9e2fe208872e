"""What exceptions, logs and the machine make of a rank's end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.failures import Kind
from autoglm_resume.protocol.heartbeats import Beat, Phase
from autoglm_resume.supervise.core.diagnosis import conclude
from autoglm_resume.supervise.core.evidence import (
    ErrorRecord,
    GpuErrors,
    Machine,
    RankEvidence,
    Refusal,
    Space,
    tail,
)
from autoglm_resume.supervise.core.failure import Previous

BEAT = Beat(pid=1, phase=Phase.BACKWARD, step=41, time=10**9, first_step_time=1)
TRACE = 'Traceback …\n  File "/home/me/train.py", line 31, in step\n'
GLOO = "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2213."
VICTIM = (
    "terminate called after throwing an instance of 'c10::DistBackendError'\n"
    "  what():  [PG ID 0 Rank 1] Process group watchdog thread terminated with exception: [Rank 1] "
    "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=808, OpType=ALLREDUCE) ran for "
    "600020 milliseconds before timing out.\n"
)
DRAM = VICTIM.partition("exception: ")[0] + "exception: CUDA error: uncorrectable ECC error\n"


def raised(
    rank: int, mono: float, type: str, message: str = "", beat: Beat = BEAT, **more: object
) -> RankEvidence:
    record = ErrorRecord(type, message, f"{TRACE}{type}: {message}\n", mono)
    return RankEvidence(rank, code=1, beat=beat, error=record, **more)  # type: ignore[arg-type]


def lost(rank: int, mono: float, **more: object) -> RankEvidence:
    """A rank that lost its peers."""
    return raised(rank, mono, "RuntimeError", GLOO, **more)  # type: ignore[arg-type]


def killed(rank: int, number: int = 9, ended: float = 5.0, **more: object) -> RankEvidence:
    return RankEvidence(rank, signal=number, beat=BEAT, ended=ended, pid=100 + rank, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranks", "kind", "root"),
    [
        # A peer's broken connection follows from anything, however early it was recorded.
        ([lost(0, 1.0), killed(1)], Kind.KILLED, 1),
        ([lost(0, 1.0), killed(1, 6)], Kind.CRASHED, 1),
        ([lost(0, 1.0), raised(1, 9.0, "ValueError", "bad")], Kind.EXCEPTION, 1),
        ([lost(0, 1.0), RankEvidence(1, code=1, beat=BEAT)], Kind.EXITED, 1),
        ([lost(0, 1.0), raised(1, 9.0, "OSError", "[Errno 28] x")], Kind.DISK_FULL, 1),
        ([lost(0, 1.0), lost(1, 0.5), killed(2, 15)], Kind.PREEMPTED, 2),
        # Only if nobody failed by himself it is the connection: the first to lose it.
        ([lost(0, 1.0), lost(1, 0.5)], Kind.COMMUNICATION, 1),
        ([lost(0, 1.0), killed(1, by_us=True)], Kind.COMMUNICATION, 0),
        # What is certain beats what may be a victim; among the certain the first counts.
        ([raised(0, 1.0, "ValueError"), raised(1, 2.0, "MemoryError")], Kind.HOST_OOM, 1),
        ([raised(0, 1.0, "LossDiverged"), raised(1, 2.0, "MemoryError")], Kind.DIVERGED, 0),
        ([raised(0, 4.0, "MemoryError"), killed(1, ended=3.0)], Kind.KILLED, 1),
        ([raised(0, 2.0, "MemoryError"), killed(1, ended=3.0)], Kind.HOST_OOM, 0),
        # NCCL's watchdog aborts victims, and says so in the log.
        ([killed(0, 6, log=VICTIM), raised(1, 9.0, "ValueError")], Kind.EXCEPTION, 1),
        ([killed(0, 6, 5.0, log=VICTIM), killed(1, 6, 6.0)], Kind.CRASHED, 1),
        ([killed(0, 6, 5.0, log=VICTIM), killed(1, 6, 6.0, log=DRAM)], Kind.GPU_FAULT, 1),
        ([killed(0, 6, 5.0, log=VICTIM), killed(1, 6, 4.0, log=VICTIM)], Kind.COMMUNICATION, 1),
        ([killed(0, 12)], Kind.PREEMPTED, 0),
    ],
)
def test_a_victim_is_never_the_root_while_a_rank_failed_by_itself(
    ranks: list[RankEvidence], kind: Kind, root: int
) -> None:
    failure = conclude(ranks)
    assert (failure.kind, failure.rank) == (kind, root)


def test_the_evidence_names_the_victims() -> None:
    failure = conclude([lost(0, 1.0), killed(1, 11)])
    assert failure.evidence == (
        f"rank 0 failed with RuntimeError: {GLOO} at step 41, in backward, which follows",
    )


def test_the_evidence_does_not_tell_of_hundreds_of_victims() -> None:
    failure = conclude([killed(0, 11), *(lost(n, 1.0) for n in range(1, 200))])
    assert len(failure.evidence) == 9
    assert failure.evidence[-1] == "and alike of 191 ranks more"


def test_a_lost_connection_names_the_rank_that_was_still_there() -> None:
    failure = conclude([lost(0, 1.0), killed(1, by_us=True)])
    assert "rank 1 had not failed: it was at step 41, in backward" in failure.evidence


START = Beat(phase=Phase.START)


@pytest.mark.parametrize(
    ("rank", "kind"),
    [
        (raised(0, 1.0, "ModuleNotFoundError", "No module named 'x'", START), Kind.LAUNCH),
        (raised(0, 1.0, "ModuleNotFoundError", "No module named 'x'"), Kind.EXCEPTION),
        (raised(0, 1.0, "SyntaxError", "bad (train.py, line 1)", START), Kind.LAUNCH),
        (raised(0, 1.0, "ValueError", "bad", START), Kind.EXCEPTION),
        (
            RankEvidence(
                0, code=2, beat=START, log="usage: train.py\ntrain.py: error: argument --lr: x\n"
            ),
            Kind.LAUNCH,
        ),
        (RankEvidence(0, code=2, beat=START), Kind.EXITED),
        (RankEvidence(0, code=1, beat=BEAT, log="Loss is nan, stopping training\n"), Kind.DIVERGED),
        # With a code of its own the script had a reason of its own.
        (RankEvidence(0, code=17, beat=BEAT, log="MemoryError\n"), Kind.EXITED),
    ],
)
def test_the_log_and_the_time_tell_what_kind_of_error_it_is(rank: RankEvidence, kind: Kind) -> None:
    assert conclude([rank]).kind is kind


KERNEL = "Memory cgroup out of memory: Killed process 101 (python) total-vm:323824kB"


@pytest.mark.parametrize(
    ("machine", "kind", "said"),
    [
        (Machine(oom_kills=0, kernel=(KERNEL,)), Kind.HOST_OOM, f"the kernel's log: {KERNEL}"),
        (Machine(oom_kills=2), Kind.HOST_OOM, "its cgroup's counter of OOM kills rose by 2"),
        (
            Machine(oom_kills=0, kernel=(KERNEL.replace("101", "7"),)),
            Kind.KILLED,
            "it was not the kernel's OOM killer: something outside sent the signal",
        ),
        (
            Machine(),
            Kind.KILLED,
            "whether it was the kernel's OOM killer is not known: neither the kernel's log nor a "
            "cgroup's counter can be read here",
        ),
    ],
)
def test_who_sent_a_sigkill_is_what_the_kernel_says(
    machine: Machine, kind: Kind, said: str
) -> None:
    failure = conclude([lost(0, 1.0), killed(1)], machine=machine)
    assert (failure.kind, failure.rank) == (kind, 1)
    assert failure.evidence[0] == said
    if kind is Kind.HOST_OOM:
        assert "was killed by the kernel for lack of memory at step 41" in failure.summary


def test_a_data_loader_worker_that_the_kernel_killed_is_a_lack_of_memory() -> None:
    rank = raised(0, 1.0, "RuntimeError", "DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert conclude([rank], machine=Machine(oom_kills=1)).kind is Kind.HOST_OOM
    assert conclude([rank], machine=Machine(oom_kills=0)).kind is Kind.KILLED


def test_a_bus_error_with_shared_memory_full_is_a_lack_of_memory() -> None:
    full = Machine(spaces=(Space("/dev/shm", 4096),))
    failure = conclude([killed(0, 7)], machine=full)
    assert failure.kind is Kind.HOST_OOM
    assert "/dev/shm has 4096 bytes free" in failure.evidence
    assert conclude([killed(0, 7)], machine=Machine(spaces=(Space("/x", 0),))).kind is Kind.CRASHED


def test_a_file_cut_short_on_a_full_disk_is_a_full_disk() -> None:
    message = "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"
    rank = raised(0, 1.0, "RuntimeError", message)
    full = Machine(spaces=(Space("/run", 10**9), Space("/data", 0)))
    assert conclude([rank], machine=full).kind is Kind.DISK_FULL
    assert "/data has 0 bytes free" in conclude([rank], machine=full).evidence
    failure = conclude([rank], machine=Machine(spaces=(Space("/data", None),)))
    assert failure.kind is Kind.STORAGE
    assert "/data did not answer" in failure.evidence


XID = "NVRM: Xid (PCI:0000:3B:00): 79, {}GPU has fallen off the bus."
GPUS = (GpuErrors(0, "00000000:3A:00.0"), GpuErrors(1, "00000000:3B:00.0"))
CUDA = "CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize(
    ("machine", "kind"),
    [
        (Machine(kernel=(XID.format(""),)), Kind.GPU_FAULT),
        (Machine(kernel=(XID.format(""),), gpus=GPUS), Kind.GPU_FAULT),
        (Machine(kernel=(XID.format("pid=100, "),), gpus=GPUS[:1]), Kind.GPU_FAULT),
        # A GPU that is none of ours.
        (Machine(kernel=(XID.format("pid=7, "),), gpus=GPUS[:1]), Kind.EXCEPTION),
        (Machine(gpus=(GpuErrors(0, "x"), GpuErrors(1, "y", lost=True))), Kind.GPU_FAULT),
        (Machine(gpus=(GpuErrors(0, "x", uncorrected=1),)), Kind.GPU_FAULT),
        (Machine(gpus=(GpuErrors(0, "x", uncorrected=0), GpuErrors(1, "y"))), Kind.EXCEPTION),
        (Machine(kernel=(), gpus=()), Kind.EXCEPTION),
    ],
)
def test_an_error_beside_a_broken_gpu_is_the_gpus(machine: Machine, kind: Kind) -> None:
    assert conclude([raised(0, 1.0, "RuntimeError", CUDA, pid=100)], machine=machine).kind is kind


def test_the_rank_that_the_driver_names_is_the_root() -> None:
    machine = Machine(kernel=(XID.format("pid=101, "),))
    failure = conclude([lost(0, 1.0), lost(1, 2.0, pid=101)], machine=machine)
    assert (failure.kind, failure.rank) == (Kind.GPU_FAULT, 1)
    hang = conclude([RankEvidence(0, beat=BEAT, pid=101)], hung=[0], machine=machine)
    assert hang.kind is Kind.GPU_FAULT


def test_a_full_disk_is_not_the_gpus_fault() -> None:
    machine = Machine(kernel=(XID.format(""),))
    assert conclude([raised(0, 1.0, "OSError", "[Errno 28] x")], machine=machine).kind is (
        Kind.DISK_FULL
    )


@pytest.mark.parametrize(
    ("rank", "place"),
    [
        (raised(0, 1.0, "ValueError", "bad"), "ValueError at train.py:31 in step"),
        (RankEvidence(0, signal=11, beat=BEAT), "SIGSEGV at step 41, in backward"),
        (RankEvidence(0, code=17, beat=BEAT), "exit code 17 at step 41, in backward"),
    ],
)
def test_the_same_failure_at_the_same_place_without_progress_is_the_codes(
    rank: RankEvidence, place: str
) -> None:
    first = conclude([rank])
    assert first.place == place
    assert conclude([rank], previous=Previous(place, 40)).kind is first.kind, "it had progressed"
    assert conclude([rank], previous=Previous("elsewhere", 41)).kind is first.kind
    again = conclude([rank], previous=Previous(place, first.step))
    assert again.kind is Kind.CODE_ERROR
    assert place in again.evidence[0]


@pytest.mark.parametrize("rank", [killed(0), killed(0, 15), lost(0, 1.0)])
def test_what_comes_from_outside_is_never_the_codes(rank: RankEvidence) -> None:
    first = conclude([rank])
    assert conclude([rank], previous=Previous(first.place, first.step)).kind is first.kind


def test_the_tail_is_what_a_person_reads() -> None:
    log = "".join(f"line {n}\n" for n in range(100))
    assert tail(log).splitlines() == [f"line {n}" for n in range(50, 100)]
    assert len(tail("é" * 20_000).encode()) <= 8192
    assert conclude([killed(0, log=log)]).tail == tail(log)


TORCH = "/venv/lib/python3.11/site-packages/torch"
OUT = "/home/me/train.py:99 in <module>"
STUCK = ("/home/me/train.py:88 in step", OUT)
WAITING = (f"{TORCH}/autograd/graph.py:865 in _engine_run_backward", OUT)


def test_of_hung_ranks_the_one_that_does_not_wait_for_others_is_the_root() -> None:
    beats = [Beat(phase=Phase.BACKWARD, step=41, time=at, first_step_time=1) for at in (1, 2, 3)]
    stacks = [WAITING, STUCK, WAITING]
    ranks = [RankEvidence(n, beat=beats[n], stack=stacks[n]) for n in range(3)]
    failure = conclude(ranks, hung=[0, 1, 2])
    assert failure.rank == 1
    assert failure.summary == (
        "rank 1 stopped making progress at step 41, in backward, at train.py:88 in step"
    )
    assert failure.place == "hang at train.py:88 in step"
    assert all(said.endswith(", waiting for others") for said in failure.evidence)


def test_of_hung_ranks_the_one_that_does_what_no_other_does_is_the_root() -> None:
    beat = Beat(phase=Phase.FORWARD, step=41, time=1)
    same, other = ("/home/me/train.py:90 in step",), ("/home/me/train.py:77 in load",)
    ranks = [RankEvidence(n, beat=beat, stack=other if n == 2 else same) for n in range(4)]
    assert conclude(ranks, hung=range(4)).rank == 2


def test_of_hung_ranks_one_that_is_stuck_in_the_kernel_is_the_root() -> None:
    waiting = RankEvidence(0, beat=Beat(step=41, time=1), stack=WAITING)
    stuck = RankEvidence(1, beat=Beat(step=41, time=2), state="disk-sleep")
    failure = conclude([waiting, stuck], hung=[0, 1])
    assert failure.rank == 1
    assert failure.summary.endswith("(the process is stuck in the kernel)")


def test_the_evidence_of_a_hang_says_what_all_others_did() -> None:
    beat = Beat(step=41, phase=Phase.BACKWARD, time=1)
    ranks = [RankEvidence(0, beat=beat, stack=WAITING), RankEvidence(1, beat=beat, stack=STUCK)]
    assert conclude(ranks, hung=[1]).evidence == (
        "rank 0 was at step 41, in backward, at train.py:99, waiting for others",
    )


def test_a_rank_that_is_behind_is_the_root_whatever_it_waits_for() -> None:
    behind = RankEvidence(0, beat=Beat(step=40, time=9), stack=WAITING)
    ahead = RankEvidence(1, beat=Beat(step=41, time=5), stack=STUCK)
    assert conclude([behind, ahead], hung=[0, 1]).rank == 0


messages = st.sampled_from(
    [GLOO, CUDA, "", "bad", "[Errno 28] x", "DataLoader worker (pid 1) is killed by signal: Killed"]
)
evidence = st.builds(
    RankEvidence,
    rank=st.integers(0, 3),
    code=st.none() | st.sampled_from([0, 1, 2, 17, 75, 93, 255]),
    signal=st.none() | st.integers(0, 70),
    order=st.integers(0, 3),
    ended=st.floats(0, 10) | st.just(float("inf")),
    by_us=st.booleans(),
    beat=st.builds(
        Beat,
        phase=st.sampled_from(Phase),
        step=st.integers(-1, 9),
        first_step_time=st.integers(0, 1),
    ),
    error=st.none()
    | st.builds(ErrorRecord, st.text(max_size=9), messages, st.text(), st.floats(0, 10)),
    refusal=st.none() | st.just(Refusal("x", 1, "WorldSizeMismatch", "y")),
    state=st.sampled_from(["", "stopped", "sleeping", "disk-sleep"]),
    stack=st.lists(st.sampled_from([*STUCK, *WAITING, "?"]), max_size=3).map(tuple),
    pid=st.none() | st.integers(99, 102),
    log=st.sampled_from(["", VICTIM, DRAM, "x\n" * 100]),
)
machines = st.builds(
    Machine,
    oom_kills=st.none() | st.integers(0, 2),
    kernel=st.none() | st.lists(st.sampled_from([KERNEL, XID.format("pid=101, ")])).map(tuple),
    gpus=st.none() | st.just(GPUS),
    spaces=st.lists(st.builds(Space, st.just("/dev/shm"), st.none() | st.just(0))).map(tuple),
)


@given(
    st.lists(evidence, min_size=1, max_size=4, unique_by=lambda e: e.rank),
    st.lists(st.integers(0, 5), max_size=3),
    st.text(max_size=5),
    machines,
    st.none() | st.builds(Previous, st.text(max_size=5), st.integers(-1, 9)),
)
def test_no_evidence_is_too_strange_and_the_root_is_always_a_suspect(
    ranks: list[RankEvidence],
    hung: list[int],
    agent: str,
    machine: Machine,
    previous: Previous | None,
) -> None:
    failure = conclude(ranks, hung, agent, machine, previous)
    refused = {rank.rank for rank in ranks if rank.refusal}
    suspects = refused or {rank.rank for rank in ranks if rank.rank in hung}
    suspects = suspects or {rank.rank for rank in ranks if rank.failed}
    assert (failure.rank in suspects) if suspects else failure.rank is None
    assert failure.summary
    if failure.kind is Kind.COMMUNICATION:
        victims = {r.rank for r in ranks if r.failed and (r.error or r.log == VICTIM)}
        assert victims >= {r.rank for r in ranks if r.failed}, "nobody failed by itself"
