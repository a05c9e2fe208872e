"""Deleting the checkpoints that no rule keeps, while nobody trains."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

from autoglm_resume import output
from autoglm_resume.checkpoint.store.retention import KeepRules
from autoglm_resume.errors import UsageError
from autoglm_resume.events import Pruned
from autoglm_resume.journal import Journal
from autoglm_resume.observe import listing
from autoglm_resume.observe.inspection import Inspected
from autoglm_resume.observe.listing import Listing
from autoglm_resume.observe.pure.say import plural, size
from autoglm_resume.observe.tables import Table
from autoglm_resume.supervise.base.run_directory import undisturbed


def rules(target: Inspected, asked: KeepRules | None = None) -> KeepRules:
    """What to keep of these checkpoints: as `asked`, or what their run keeps.

    What the run keeps as its best stays, unless other best ones are asked for by name. Raises
    UsageError if there is no run beside them, and nothing is asked for.
    """
    keep = listing.keep_of(target.run)
    if asked is not None:
        return replace(asked, best=keep.best) if keep and not asked.best else asked
    if keep is None:
        raise UsageError(
            f"{target.store.root}: no run beside these checkpoints says which to keep",
            hint="say it, as in a job file: "
            + output.command("prune", target.store.root, "--keep", 3),
        )
    return keep


def prune(target: Inspected, keep: KeepRules) -> Listing:
    """Delete what `keep` does not want; returns the checkpoints as they were before.

    Raises RunLocked while a supervisor has the run or its checkpoints.
    """
    run, root = target.run, target.store.root
    with undisturbed(run, root):
        here = replace(target, paths=tuple(target.store.committed()))
        found = listing.of(here, keep, time.time(), pruning=True)
        for each in found.doomed:
            target.store.delete(each.facts.id)
            if run is not None:
                _note(Journal(run.journal), each.facts.id)
    return found


def _note(journal: Journal, id: str) -> None:
    # Without monotonic time, because the supervisor whose journal this is did not live until now.
    journal.append(Pruned(time=time.time(), id=id, by="autoglm prune"))
    journal.close()


def show(found: Listing, *, dry: bool) -> None:
    """What went or, of a dry run, would go; on standard output."""
    table = Table(("checkpoint", "step", "stored", "", "why"), right=frozenset((1, 2)))
    for each in found.checkpoints:
        stored = size(each.facts.stored)
        goes = each.kept == ()
        what = ("would go" if dry else "deleted") if goes else "stays"
        why = "no rule keeps it" if goes else listing.kept_words(each)
        if each.kept is None:
            why += f": {listing.failure(each.verdict)}"
        table.add(each.facts.id, each.facts.step, stored, what, why, style="red" if goes else "")
    table.print(sys.stdout)
    freed = size(sum(each.facts.stored for each in found.doomed))
    count = plural(len(found.doomed), "checkpoint")
    output.show(f"{count} {'would be ' if dry else ''}deleted, {freed} freed")
