"""Starting a run: new, continued, or only planned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm_resume import output
from autoglm_resume.checkpoint.format.ids import Branch, step_of
from autoglm_resume.checkpoint.storage import storage
from autoglm_resume.checkpoint.store.commit import whole
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.gate import Choice, Verdict, superseded
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import AutoglmError, CheckpointError, NoAcceptableCheckpoint, UsageError
from autoglm_resume.events import Event, FirstStep, JobChanged, JobKept, RunFailed
from autoglm_resume.job import secret
from autoglm_resume.job.load import from_snapshot
from autoglm_resume.job.spec import Job, dump, shown
from autoglm_resume.journal import Journal, stamped
from autoglm_resume.locks import locked_checkpoints
from autoglm_resume.protocol.assignment import Beginning, Endpoint, shared_environment
from autoglm_resume.protocol.relocation import home_of, same
from autoglm_resume.supervise.base import home, run_list, set_aside
from autoglm_resume.supervise.base.assign import assignment, world_size
from autoglm_resume.supervise.base.context import Presenter
from autoglm_resume.supervise.base.gpu_exclusion import without
from autoglm_resume.supervise.base.machine import check_directory
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.supervise.core import drill, history
from autoglm_resume.supervise.core.job_changes import JobChanges, job_changes
from autoglm_resume.supervise.gate import RunGate
from autoglm_resume.supervise.preflight.preflight import require_storage
from autoglm_resume.supervise.ranks.launchers import LAUNCHERS
from autoglm_resume.supervise.supervisor import Supervisor

RESTORED = (
    "what a checkpoint restores (an optimizer's settings such as its learning rate, a scheduler)"
    " is as it was, whatever the arguments say; to go on with the script's:"
    " checkpoint.skip: [optimizer.settings, scheduler]"
)
REFUSALS = (CheckpointError.exit_code, UsageError.exit_code)


@dataclass(frozen=True)
class Plan:
    """What a start would do; nothing was started or changed."""

    job: dict[str, Any]
    command: list[str]
    """Of rank 0; a warm rank is forked and then does exactly this."""
    environment: dict[str, str]
    """Of rank 0, beyond what it inherits."""
    verdicts: tuple[Verdict, ...]
    resume: str | None
    step: int
    outlook: str
    """What starting it would do, in one sentence."""
    code: int
    """The exit code of a start that would end at once; 0 also if it would train."""
    changes: tuple[str, ...] = ()
    """What is another now than when the run was started last, in words."""


def start(
    job: Job,
    screen: Presenter,
    fresh: bool = False,
    drills: Sequence[str] = (),
    branch_from: int | None = None,
    begins: Beginning | None = None,
) -> int:
    """Begin the run of `job`, or continue it if it was begun; returns the exit code.

    `fresh` sets an earlier run of the same name aside first. `branch_from` goes on from the
    checkpoint of that step, even of a finished run; newer ones stay where they are. A new run
    `begins` with objects of a checkpoint, see `beginning`. Raises AutoglmError.
    """
    ordered = drill.parse(drills, world_size(job))
    for replica in job.checkpoint.replicas:
        storage.check(replica)
    run = RunDirectory(Path(job.run_dir))
    if history.recall(run.events()).run_id is None:
        home.require_own(run, Path(job.checkpoint.dir))
    if fresh and begins is not None and Path(begins.path).is_relative_to(run.path.resolve()):
        raise UsageError(
            f"{begins.path}: it lies in the run that --fresh would set aside",
            hint=f"go back within the run: autoglm resume {run.path} --from STEP",
        )
    if fresh:
        files = (job.workdir, job.script, *job.guards.config_files)
        needed = [Path.cwd(), *(Path(path) for path in files if path is not None)]
        for said in set_aside.start_over(run, Path(job.checkpoint.dir), needed):
            screen.note(said)
    with ExitStack() as held:
        lock = held.enter_context(run.locked())
        checkpoints = Path(job.checkpoint.dir)
        past = history.recall(run.events())
        if begins is not None:
            _require_new(run, checkpoints, past, begins)
        changes = _changes(run, job)
        beyond: int | None = None
        if branch_from is not None:
            _require_step(Store(checkpoints), branch_from, past.branches)
        elif past.finished:
            if not changes.told:
                screen.note(_stays_finished(run, past, changes))
                return 0
            beyond = _require_steps(run, job, past, changes)
        if past.run_id is not None and job.checkpoint.replicas:
            home.left(run)  # a copy and its original would write to one place there
        if past.run_id is not None:
            screen.note(f"{run.path}: continuing the run (attempt {past.attempts})")
        else:
            screen.note(f"{run.path}: a new run")
        require_storage(job)
        check_directory(checkpoints, job.guards.free_disk)
        # By whatever path: two runs may name one directory, and a person one in a run.
        training = held.enter_context(locked_checkpoints(checkpoints, run.path))
        for problem in filter(None, (lock.problem, training.problem)):
            screen.note(f"{problem}: see to it yourself that nobody else trains with these files")
        before: dict[str, Any] | None = None
        with suppress(UsageError):  # there is none, or it cannot be read
            before = run.job()
        told = len(run.events())
        if changes.all and past.run_id is not None:
            changed = JobChanged(changes=changes.all, finished=past.finished, skip=changes.skip)
            _journal(run, changed)
            screen.event(changed)
            if changes.may_be_restored and not job.checkpoint.skip and past.checkpointed:
                screen.note(RESTORED)
        run.save_job(dump(job))
        run_list.add(run.path, job.name)
        code: int | None = None
        try:
            while code is None:
                life = Supervisor(
                    run,
                    lock,
                    without(job, past.excluded),
                    ordered,
                    screen,
                    branch_from,
                    fresh=fresh,
                    beyond=beyond,
                    begins=begins,
                )
                if (code := life.run()) is None:  # it ended only to go on without a GPU
                    past, ordered, branch_from = history.recall(run.events()), (), None
        except AutoglmError as error:
            code = error.exit_code
            raise
        finally:
            if code in REFUSALS and before is not None:
                screen.note(_kept_if_refused(run, before, job, told, beyond))
        return code


def beginning(path: Path, only: Sequence[str]) -> Beginning:
    """The checkpoint in `path`, verified as before any start, for a run to begin with.

    Raises NoAcceptableCheckpoint if it is damaged, and UsageError for objects that it has not.
    """
    found = examine(Store(path.parent), path)
    if found.manifest is None or not found.integrity.ok:
        raise NoAcceptableCheckpoint(
            f"--init-from {path}: {found.integrity.problem}",
            hint=f"`autoglm verify {path.parent}` tells which are good",
        )
    if lost := [name for name in only if name not in found.manifest.objects]:
        there = ", ".join(sorted(found.manifest.objects))
        raise UsageError(f"--init-from {path}: no object {lost[0]!r}; there are {there}")
    return Beginning(str(path), found.step, found.manifest.digest, tuple(only))


def _require_new(
    run: RunDirectory, checkpoints: Path, past: history.History, begins: Beginning
) -> None:
    """Raise UsageError where a run is to begin that has begun otherwise."""
    if past.run_id is None and not Store(checkpoints).committed():
        return
    if past.begins != begins:
        what = run.path if past.run_id is not None else checkpoints
        raise UsageError(
            f"{what}: --init-from is for a new run, and this one has begun already",
            hint="give the new one a name of its own: --set name=…; or start over with --fresh",
        )


def _changes(run: RunDirectory, job: Job) -> JobChanges:
    """What of the job of a run is another one now."""
    try:
        recorded = dump(from_snapshot(run.recorded_job()))
    except UsageError:  # there is none, or it cannot be read
        return JobChanges()
    # The script of a project that was copied with its runs is the copy.
    here = (home := home_of(recorded)) is not None and same(home, run.path)
    remains = here and _remains(recorded["script"], job)
    return job_changes(recorded, dump(job), remains=remains)


def _remains(before: object, job: Job) -> bool:
    """Whether the script of a run is still where it was, and not that of the job it gets now."""
    if not isinstance(before, str) or job.script is None:
        return False
    try:
        return not Path(before).samefile(job.script)
    except (OSError, ValueError):
        return False


def _require_steps(run: RunDirectory, job: Job, past: history.History, changes: JobChanges) -> int:
    """The step from which a finished run goes on, its script being told otherwise now.

    Raises UsageError where it has no checkpoint to go on from. Whether the script has more to do
    is known once it has run: a loop over seeds, each with this run's name, must not train the first
    and end well for all.
    """
    if past.checkpointed:
        return past.checkpointed
    raise UsageError(
        f"{run.path}: this run is {_finished(past)}, and was another command's:"
        f" {'; '.join(changes.told)}",
        hint=f"give that one a run of its own: --set name={job.name}-2; or autoglm run --fresh"
        " begins a new one here and keeps this one's files",
    )


def _stays_finished(run: RunDirectory, past: history.History, changes: JobChanges) -> str:
    """That there is nothing to do, and what there may be."""
    said = f"{run.path}: this run is {_finished(past)}"
    if changes.settings:
        said += f", and what changed is nothing to it ({'; '.join(changes.settings)})"
    if step := past.checkpointed:
        said += f"; `autoglm resume {run.path} --from {step}` goes on if its script has more steps"
    return f"{said}; `autoglm run --fresh` begins a new one and keeps this one's files"


def _journal(run: RunDirectory, event: Event) -> None:
    journal = Journal(run.journal)
    journal.append(stamped(event))
    journal.close()


def _kept_if_refused(
    run: RunDirectory, before: dict[str, Any], job: Job, told: int, beyond: int | None
) -> str:
    """Leave the run the job that it had `before`, if it did not train with the one it got now.

    What `autoglm resume` goes on with is a job that has trained. `told` counts the events before
    this start, `beyond` is given if it was finished then; returns what to say.
    """
    said = run.events()[told:]
    if any(isinstance(event, FirstStep) for event in said):
        return ""
    run.save_job(before)
    with suppress(UsageError):  # of another version: nobody can tell
        if told and dump(from_snapshot(before)) != dump(job):
            failed = (event.reason for event in said if isinstance(event, RunFailed))
            reasons = [reason.partition("\n")[0] for reason in failed]
            kept = JobKept(reason="".join(reasons[-1:]), finished=beyond is not None)
            _journal(run, kept)
            if beyond is not None:
                return f"{run.path}: the run keeps the job that it had, and is finished"
            on = output.command("resume", run.path)
            return f"{run.path}: the run keeps the job that it had: {on} goes on with it"
    return ""


def resume(directory: Path, screen: Presenter, branch_from: int | None = None) -> int:
    """Continue a run from its directory alone, or say that it is finished. Idempotent.

    `branch_from`: see `start`.
    """
    run = RunDirectory(directory)
    job = from_snapshot(run.job())
    if (before := home.left(run)) is not None:
        screen.note(f"{directory}: this run was in {before} before")
        _require_code(job)
    return start(job, screen, branch_from=branch_from)


def _require_code(job: Job) -> None:
    """Raise UsageError unless what the job runs is there."""
    for path in (job.workdir, job.script):
        if path is not None and not Path(path).exists():
            raise UsageError(
                f"{path}: not there, and the run needs it",
                hint="start the run from its job file, where that is now: autoglm run JOB.yaml "
                f"--set run_dir={job.run_dir}",
            )


def plan(
    job: Job,
    *,
    fresh: bool = False,
    drills: Sequence[str] = (),
    begins: Beginning | None = None,
) -> Plan:
    """What `start` would do now. Raises UsageError for drills and replicas that make no sense."""
    drill.parse(drills, world_size(job))
    for replica in job.checkpoint.replicas:
        storage.check(replica)
    run = RunDirectory(Path(job.run_dir))
    past = history.History() if fresh else history.recall(run.events())
    if begins is not None and not fresh:
        _require_new(run, Path(job.checkpoint.dir), past, begins)
    changes = JobChanges() if fresh else _changes(run, job)
    job = without(job, past.excluded)
    gate = RunGate(job, world_size(job), _ignore, past)
    choice = Choice((), None) if fresh else gate.judge(every=True)
    accepted = choice.accepted
    code, outlook = 0, ""
    if accepted is not None:
        outlook = f"start from step {accepted.step}, checkpoint {accepted.id}"
    if past.finished and not changes.told:
        outlook = f"do nothing: the run is {_finished(past)}"
    elif past.finished and not past.checkpointed:
        try:
            _require_steps(run, job, past, changes)
        except UsageError as error:
            code, outlook = error.exit_code, f"exit {error.exit_code}: {error.message}"
    elif accepted is None:
        outlook = "start from step 0"
        if (begins := begins or past.begins) is not None:
            outlook += f", with {', '.join(begins.only) or 'all objects'} from {begins.path}"
        try:
            if not fresh:
                gate.require_a_fresh_start(choice)
        except NoAcceptableCheckpoint as error:
            code, outlook = error.exit_code, f"exit {error.exit_code}: {error.message}"
    endpoint = Endpoint(int(job.env.get("MASTER_PORT", 0)), served=True)
    task = assignment(job, run, past.run_id or "new", past.attempts, endpoint, None, "")
    command, ranks = LAUNCHERS[job.launcher].preview(job, task)
    return Plan(
        shown(job),
        secret.arguments(command),
        secret.variables({**shared_environment(world_size(job)), **ranks}),
        choice.verdicts,
        accepted.id if accepted else None,
        accepted.step if accepted else 0,
        outlook,
        code,
        changes.all if past.run_id is not None else (),
    )


def _finished(past: history.History) -> str:
    return "finished" + (f" at step {past.checkpointed}" if past.checkpointed else "")


def _ignore(event: Event, /) -> None:
    """A plan leaves no trace in the journal."""


def _require_step(store: Store, step: int, branches: Iterable[Branch]) -> None:
    """Raise UsageError, naming the steps there are, unless a checkpoint of `step` is there.

    Those of `branches` that were given up do not count, as the gate does not take them.
    """
    names = [path.name for path in store.committed()] + [facts.id for facts in whole(store)]
    there = {step_of(name) for name in names if superseded(name, branches) is None}
    if step in there:
        return
    nearest = sorted(sorted(there, key=lambda other: abs(other - step))[:10])
    which = "the nearest are of" if len(there) > len(nearest) else "there are those of"
    steps = ", ".join(map(str, nearest))
    raise UsageError(
        f"{store.root}: no checkpoint of step {step}; "
        + (f"{which} steps {steps}" if there else "there is none at all"),
        hint=f"{output.command('ckpts', store.root)} says more about each" if there else "",
    )
