from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.job.spec import Guards
from autoglm_resume.supervise.core.checks import (
    GIB,
    GpuFacts,
    MachineCheck,
    MachineFacts,
    Needs,
    Process,
    StorageAnswer,
    System,
    judge,
    judge_system,
)

AGREES = "agrees with what this run has written"
NEEDS = Needs(ranks=2)
GPU = GpuFacts("GPU 0", total=80 * GIB, used=GIB)
SYSTEM = System("3.11", {"torch": "2.13", "CUDA": "13.0"}, 65536, {"memory": "none"}, {"pidfd": ""})


def one(facts: MachineFacts, needs: Needs = NEEDS, name: str | None = None) -> MachineCheck:
    (check,) = (c for c in judge(facts, needs) if name in (None, c.name))
    return check


@pytest.mark.parametrize(
    ("facts", "needs", "ok", "found"),
    [
        (MachineFacts(leftovers=()), NEEDS, True, "none"),
        (MachineFacts(leftovers=("process 7 (python)",)), NEEDS, False, "process 7 (python)"),
        (MachineFacts(gpus=()), NEEDS, True, "none"),
        (MachineFacts(driver="there is no driver"), NEEDS, None, "there is no driver"),
        (
            MachineFacts(gpus=(GpuFacts("GPU 3", "GPU is lost"),)),
            NEEDS,
            False,
            "GPU 3: GPU is lost",
        ),
        (MachineFacts(memory=GIB), NEEDS, True, "1.00 GiB free"),
        (MachineFacts(memory=3 * GIB), Needs(2, 2, GIB), True, "3.00 GiB free"),
        (MachineFacts(memory=GIB), Needs(2, 2, GIB), False, "1.00 GiB free"),
        (MachineFacts(shm=64 << 20), NEEDS, False, "0.06 GiB free"),
        (MachineFacts(shm=GIB), NEEDS, True, "1.00 GiB free"),
        (MachineFacts(disk=5), Needs(2, free_disk=5), True, "0.00 GiB free"),
        (MachineFacts(disk=GIB - 1), Needs(2, free_disk=GIB), False, "1.00 GiB free"),
        (MachineFacts(port_owner=""), Needs(2, port=29500), True, "free"),
        (MachineFacts(port_owner="it in use"), Needs(2, port=29500), False, "it in use"),
        (MachineFacts(now=1000.0), Needs(2, written=990.0), True, AGREES),
        (MachineFacts(now=1000.0), Needs(2, written=1059.0), True, AGREES),
        (
            MachineFacts(now=1000.0),
            Needs(2, written=4600.0),
            False,
            "3600 s behind",
        ),
        (MachineFacts(places=(StorageAnswer("/nfs", "", 0.02),)), NEEDS, True, "answered in 20 ms"),
        (
            MachineFacts(places=(StorageAnswer("/nfs", "no answer", 10.0),)),
            NEEDS,
            False,
            "no answer",
        ),
        (MachineFacts(collective=("", 3.1)), NEEDS, True, "2 processes in 3.1 s, imports included"),
        (
            MachineFacts(collective=("rank 1 ended with 1", 3.1)),
            NEEDS,
            False,
            "rank 1 ended with 1",
        ),
    ],
)
def test_a_fact_is_judged_by_what_the_job_needs(
    facts: MachineFacts, needs: Needs, ok: bool | None, found: str
) -> None:
    check = one(facts, needs)
    assert (check.ok, check.found) == (ok, found)
    assert check.ok or check.hint


@pytest.mark.parametrize(
    ("gpu", "trouble"),
    [
        (replace(GPU, uncorrected=2), "2 memory errors that ECC could not correct"),
        (replace(GPU, remap_failed=True), "a broken row of its memory could not be replaced"),
    ],
)
def test_a_gpu_that_answers_may_still_be_ill(gpu: GpuFacts, trouble: str) -> None:
    check = one(MachineFacts(gpus=(GPU, gpu)), name="gpus")
    assert (check.ok, check.found) == (False, f"GPU 0: {trouble}")


def test_memory_that_others_use_is_told_with_who_they_are() -> None:
    taken = replace(GPU, used=30 * GIB, processes=(Process(7, "python", 29 * GIB, ours=False),))
    check = one(MachineFacts(gpus=(taken,)), name="gpu memory")
    assert check.ok is False
    assert check.found == "GPU 0: 30.0 of 80.0 GiB used by process 7 (python)"


def test_memory_of_this_run_and_of_a_desktop_is_nobodys_concern() -> None:
    own = Process(7, "python", 29 * GIB, ours=True)
    assert one(
        MachineFacts(gpus=(replace(GPU, used=30 * GIB, processes=(own,)),)), name="gpu memory"
    ).ok
    assert one(MachineFacts(gpus=(GPU,)), name="gpu memory").ok


@pytest.mark.parametrize(
    ("keep", "present", "coming"), [(3, 0, 4), (3, 2, 2), (3, 3, 1), (3, 9, 1), (1, 1, 1)]
)
def test_the_disk_must_hold_what_is_kept_and_one_more(keep: int, present: int, coming: int) -> None:
    needs = Needs(2, stored=GIB, keep=keep, present=present)
    assert one(MachineFacts(disk=coming * GIB), needs).ok
    assert one(MachineFacts(disk=coming * GIB - 1), needs).ok is False


def test_what_was_not_looked_for_is_not_judged() -> None:
    assert judge(MachineFacts(), NEEDS) == []


def test_every_guard_of_a_check_is_a_switch_of_the_job() -> None:
    facts = MachineFacts(
        *(
            0.0,
            (GPU,),
            "",
            0,
            0,
            0,
            "",
            (StorageAnswer("/a", "", 0), StorageAnswer("/b", "", 0, replica=True)),
        ),
        leftovers=(),
        collective=("", 0.0),
    )
    needs = Needs(2, 2, 1, 1, written=0.0, port=1)
    guards = {check.name: check.guard for check in judge(facts, needs)}
    assert set(filter(None, guards.values())) == {
        *("gpus", "gpu_memory", "memory", "shm", "disk", "clock", "storage", "collective")
    }
    assert all(hasattr(Guards(), guard) for guard in guards.values() if guard)
    assert guards["replica /b"] == ""


@given(st.integers(0, 1 << 50), st.integers(0, 1 << 45), st.integers(1, 99), st.integers(0, 99))
def test_more_room_never_makes_a_disk_worse(disk: int, stored: int, keep: int, there: int) -> None:
    needs = Needs(2, stored=stored, keep=keep, present=there)
    if one(MachineFacts(disk=disk), needs).ok:
        assert one(MachineFacts(disk=disk + 1), needs).ok


def test_a_healthy_system_has_only_good_news() -> None:
    checks = list(judge_system(SYSTEM))
    assert all(check.ok for check in checks)
    assert checks[1].found == "torch 2.13, CUDA 13.0"


@pytest.mark.parametrize(
    ("system", "name", "found"),
    [
        (replace(SYSTEM, versions={"error": "no module"}), "torch", "no module"),
        (replace(SYSTEM, features={"pidfd": "not here"}), "pidfd", "not here"),
        (replace(SYSTEM, open_files=1024), "open files", "1,024 per process"),
    ],
)
def test_a_system_that_will_not_do_says_what_is_missing(
    system: System, name: str, found: str
) -> None:
    (check,) = (check for check in judge_system(system) if not check.ok)
    assert (check.name, check.found) == (name, found)
    assert check.hint
