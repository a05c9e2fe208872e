"""The gate that every start of ranks passes, whoever launches them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from autoglm_resume.checkpoint.format.ids import Branch, checkpoint_id
from autoglm_resume.errors import NoAcceptableCheckpoint
from tests.checkpoint.checkpoints import Checkpoints
from tests.observe.runs import checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path)


def test_with_no_checkpoint_at_all_a_run_starts_from_step_0(run: Checkpoints) -> None:
    assert run.gatekeeper().admit() is None
    (gate,) = run.events("gate")
    assert (gate["accepted"], gate["step"], gate["verdicts"]) == (None, 0, [])
    assert not run.root.exists(), "judging makes nothing"


def test_the_newest_one_is_taken(run: Checkpoints) -> None:
    run.save(10)
    newest = run.save(20)
    accepted = run.gatekeeper().admit()
    assert accepted is not None
    assert (accepted.id, accepted.step) == (newest, 20)
    assert accepted.digest == run.store.load_manifest(run.store.directory(newest)).digest
    (gate,) = run.events("gate")
    assert (gate["accepted"], len(gate["verdicts"])) == (newest, 1)
    assert json.dumps(gate)


def test_a_damaged_one_goes_to_quarantine_and_the_older_one_is_taken(run: Checkpoints) -> None:
    old, broken = run.save(10), run.save(20)
    run.damage(broken)
    accepted = run.gatekeeper().admit()
    assert accepted is not None
    assert accepted.id == old
    (put_away,) = run.events("quarantined")
    assert (put_away["id"], put_away["step"]) == (broken, 20)
    assert "rank-00001.pack" in put_away["reason"]
    assert [path.name for path in run.store.quarantined()] == [broken]
    assert run.store.latest() == run.store.directory(old)
    again = run.gatekeeper().admit()
    assert again is not None
    assert again.id == old


def test_one_that_only_does_not_fit_is_passed_over_and_left_alone(run: Checkpoints) -> None:
    old = run.save(10, ranks=2)
    other = run.save(20, ranks=3)
    accepted = run.gatekeeper().admit()
    assert accepted is not None
    assert accepted.id == old
    assert run.events("quarantined") == []
    assert run.store.directory(other).is_dir()
    assert "world size: expected 2, found 3" in run.events("gate")[0]["verdicts"][0]["reason"]


def test_what_a_rank_refused_is_not_taken_again(run: Checkpoints) -> None:
    old, refused = run.save(10), run.save(20)
    gate = run.gatekeeper()
    gate.refuse(refused, "rank 1: chunk 3")
    accepted = gate.admit()
    assert accepted is not None
    assert accepted.id == old
    assert "rank 1: chunk 3" in run.events("quarantined")[0]["reason"]


def all_damaged(run: Checkpoints) -> None:
    run.damage(run.save(10))
    run.damage(run.save(20))


def all_of_another_world(run: Checkpoints) -> None:
    run.save(10, ranks=3)


def damaged_and_other(run: Checkpoints) -> None:
    run.save(10, ranks=3)
    run.damage(run.save(20))


@pytest.mark.parametrize(
    ("prepare", "says", "hints"),
    [
        (all_damaged, "rank-00001.pack", "restore the damaged files from a copy"),
        (all_of_another_world, "world size: expected 2, found 3", "run as many ranks"),
        (damaged_and_other, "world size: expected 2, found 3", "restore the damaged files"),
    ],
)
def test_with_only_unacceptable_ones_nothing_is_changed(
    run: Checkpoints, prepare: Callable[[Checkpoints], None], says: str, hints: str
) -> None:
    prepare(run)
    before = run.listing()
    with pytest.raises(NoAcceptableCheckpoint) as caught:
        run.gatekeeper().admit()
    assert caught.value.exit_code == 90
    assert run.listing() == before
    for path in run.store.committed():
        assert path.name in caught.value.message
    assert says in caught.value.message
    assert hints in caught.value.hint
    assert caught.value.hint.endswith("; or start over")
    assert run.events("gate")[0]["accepted"] is None


def test_nothing_is_changed_even_where_a_commit_was_left_undone(run: Checkpoints) -> None:
    run.save(10, ranks=3)
    id = run.save(20, ranks=3)
    (run.store.directory(id) / "manifest.json").unlink()
    before = run.listing()
    with pytest.raises(NoAcceptableCheckpoint):
        run.gatekeeper().admit()
    assert run.listing() == before


def test_a_whole_checkpoint_that_lacks_only_its_manifest_is_never_deleted(run: Checkpoints) -> None:
    id = run.save(10, ranks=3)
    (run.store.directory(id) / "manifest.json").unlink()
    before = run.listing()
    gate = run.gatekeeper()
    try:
        gate.admit()
    except NoAcceptableCheckpoint:
        assert run.listing() == before
    gate.clean()
    assert set(before) <= set(run.listing())


def test_checkpoints_that_vanished_are_missed(run: Checkpoints) -> None:
    gate = run.gatekeeper(checkpointed=30)
    with pytest.raises(NoAcceptableCheckpoint, match="checkpoint of step 30 or an older one") as e:
        gate.admit()
    assert "mounted" in e.value.hint


def test_a_run_whose_only_checkpoints_are_in_quarantine_does_not_begin_again(
    run: Checkpoints,
) -> None:
    id = run.save(10)
    run.store.quarantine(id, "by hand")
    before = run.listing()
    with pytest.raises(NoAcceptableCheckpoint):
        run.gatekeeper().admit()
    assert run.listing() == before


def test_a_commit_that_a_crash_left_undone_is_done_and_told(run: Checkpoints) -> None:
    run.save(10)
    id = run.save(20)
    (run.store.directory(id) / "manifest.json").unlink()
    gate = run.gatekeeper()
    accepted = gate.admit()
    assert accepted is not None
    assert accepted.id == id
    (committed,) = run.events("committed")
    assert (committed["id"], committed["step"]) == (id, 20)
    assert committed["digest"] == accepted.digest
    assert gate.checkpointed == 20


def test_a_checkpoint_that_lacks_a_part_is_not_taken_and_removed_only_later(
    run: Checkpoints,
) -> None:
    old = run.save(10)
    half = run.save(20, only=0)
    gate = run.gatekeeper()
    accepted = gate.admit()
    assert accepted is not None
    assert accepted.id == old
    assert run.store.directory(half).is_dir(), "nothing is removed before the ranks have run a step"
    fresh = run.save(30, only=0)
    gate.clean()
    assert not run.store.directory(half).exists()
    assert run.store.directory(fresh).is_dir(), "it was not there when the gate was passed"
    assert run.store.directory(old).is_dir()


def test_judging_changes_nothing_and_can_judge_all(run: Checkpoints) -> None:
    run.save(10)
    run.damage(run.save(20))
    before = run.listing()
    choice = run.gatekeeper().judge(every=True)
    assert [verdict.accepted for verdict in choice.verdicts] == [False, True]
    assert choice.accepted is not None
    assert choice.accepted.step == 10
    assert run.listing() == before
    assert run.told == []


def test_what_replicas_can_mend_is_taken_instead_of_an_older_one(run: Checkpoints) -> None:
    run.save(10)
    broken = run.save(20)
    good = {path.name: path.read_bytes() for path in run.store.directory(broken).iterdir()}
    run.damage(broken)
    asked: list[tuple[str, str | None]] = []

    def repair(id: str, digest: str | None) -> list[str]:
        asked.append((id, digest))
        for name, data in good.items():
            (run.store.directory(id) / name).write_bytes(data)
        return list(good)

    gate = run.gatekeeper()
    gate.repair_with(repair)
    accepted = gate.admit()
    assert accepted is not None
    assert accepted.id == broken
    assert asked == [(broken, None)], "no gate had found it good before"
    assert run.events("quarantined") == []


def test_what_lacks_one_that_was_deleted_by_hand_waits_for_it_where_it_is(
    run: Checkpoints,
) -> None:
    oldest, needed, newest = (checkpoint_id(step, "a0") for step in (10, 20, 30))
    checkpoint(run.root, 10)
    checkpoint(run.root, 20)
    checkpoint(run.root, 30, lineage=(needed,), refer=True)
    trash = run.store.directory(needed).rename(run.directory / "trash")
    accepted = run.gatekeeper().admit()
    assert accepted is not None
    assert accepted.id == oldest
    (gate,) = run.events("gate")
    assert f"it shares packs of {needed}, not there any more" in gate["verdicts"][0]["reason"]
    assert run.events("quarantined") == []

    def put_back(id: str, digest: str | None) -> list[str]:
        assert id == newest
        trash.rename(run.store.directory(needed))
        return [needed]

    mending = run.gatekeeper()
    mending.repair_with(put_back)
    accepted = mending.admit()
    assert accepted is not None
    assert accepted.id == newest


def test_what_is_mended_is_refused_no_more(run: Checkpoints) -> None:
    run.save(10)
    refused = run.save(20)
    gate = run.gatekeeper()
    first = gate.admit()
    assert first is not None
    gate.refuse(refused, "rank 1: chunk 3")
    digests: list[str | None] = []
    gate.repair_with(lambda id, digest: digests.append(digest) or ["rank-00001.pack"])
    again = gate.admit()
    assert again is not None
    assert (again.id, digests) == (refused, [first.digest])


def test_of_a_branch_that_was_given_up_nothing_is_taken_and_nothing_put_away(
    run: Checkpoints,
) -> None:
    old, left = run.save(10), run.save(20)
    accepted = run.gatekeeper(branches=(Branch(10, 1),)).admit()
    assert accepted is not None
    assert accepted.id == old
    assert run.store.directory(left).is_dir()


def test_what_is_named_like_a_checkpoint_and_is_none_is_left_alone_and_said_once(
    run: Checkpoints,
) -> None:
    run.save(10)
    mine = run.root / "step-0000000003.best" / "model.pt"
    mine.parent.mkdir()
    mine.write_text("mine")
    gate = run.gatekeeper()
    for _ in range(2):
        gate.admit()
        gate.clean()
    assert mine.read_text() == "mine"
    (warning,) = run.events("warning")
    assert "step-0000000003.best: named like a checkpoint" in warning["text"]
    assert "model.pt" in warning["text"]


def test_many_that_are_unacceptable_for_one_reason_are_named_in_one_line(run: Checkpoints) -> None:
    ids = [run.save(step, ranks=3) for step in (10, 20, 30, 40, 50)]
    with pytest.raises(NoAcceptableCheckpoint) as refused:
        run.gatekeeper().admit()
    _, line = refused.value.message.splitlines()
    assert line.startswith(f"  {ids[4]}, {ids[3]}, {ids[2]} and 2 more: rejected: world size")
