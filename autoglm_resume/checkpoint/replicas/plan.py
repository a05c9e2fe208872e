"""Copies of checkpoints elsewhere: what a replica lacks, what may go there, and what counts. Pure.

A `Listing` holds, for each checkpoint id, the files that are there and their bytes. Files are never
modified once written, so a file of the same name and size is the same file; whoever reads one back
checks its digests.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from autoglm_resume.checkpoint.format.ids import (
    Branch,
    attempt_of,
    checkpoint_id,
    is_id,
    newer,
    newest_first,
    recency,
    step_of,
)
from autoglm_resume.checkpoint.format.manifest import MANIFEST
from autoglm_resume.checkpoint.format.part import is_own
from autoglm_resume.checkpoint.store.gate import superseded

Files: TypeAlias = Mapping[str, int]
Listing: TypeAlias = Mapping[str, Files]
Policy: TypeAlias = Literal["local", "quorum", "all"]

BRANCHES = "branches"
"""A directory beside the checkpoints of a run: the name of each file says where the run left newer
checkpoints behind, so that nobody takes these for the newest when only the replica is left."""
SLOW = 3
"""Checkpoints that may wait for a replica before it counts as behind."""
FIRST_RETRY, LAST_RETRY = 1.0, 60.0
"""Seconds."""


@dataclass(frozen=True)
class CommittedFiles:
    """A committed checkpoint: its files, and the older checkpoints whose packs it refers to."""

    files: Files
    needs: tuple[str, ...] = ()


def by_checkpoint(names: Files) -> dict[str, dict[str, int]]:
    """The listing in names like `<id>/<file>`; others are not ours."""
    found: dict[str, dict[str, int]] = {}
    for name, size in names.items():
        id, _, file = name.partition("/")
        if file and is_id(id):
            found.setdefault(id, {})[file] = size
    return found


def by_run(names: Files) -> dict[str, dict[str, dict[str, int]]]:
    """A listing per run in names like `<run>/<id>/<file>`; others are not ours."""
    runs: dict[str, dict[str, int]] = {}
    for name, size in names.items():
        run, _, rest = name.partition("/")
        runs.setdefault(run, {})[rest] = size
    return {run: found for run, rest in runs.items() if (found := by_checkpoint(rest))}


def branch_file(branch: Branch) -> str:
    """Name of the file that tells of `branch`."""
    return f"{BRANCHES}/{checkpoint_id(branch.step, f'a{branch.attempt}')}"


def branches_in(names: Iterable[str]) -> frozenset[Branch]:
    """What the files of one run tell."""
    files = (name.partition("/") for name in names)
    told = [file for directory, _, file in files if directory == BRANCHES and is_id(file)]
    return frozenset(Branch(step_of(id), attempt_of(id)) for id in told)


def in_line(ids: Iterable[str], branches: Collection[Branch]) -> list[str]:
    """What a run may go on from, the newest first: of its last attempt, whatever step others had.

    An older version told nobody of branches; but the later attempt knew why it began where it did.
    """
    left = (id for id in ids if superseded(id, branches) is None)
    return sorted(left, key=lambda id: (attempt_of(id), recency(id)), reverse=True)


def closure(id: str, here: Mapping[str, CommittedFiles]) -> list[str]:
    """`id` and what it needs as far as it is here, and what that needs in turn; oldest first."""
    found: set[str] = set()
    queue = [id]
    while queue:
        each = queue.pop()
        if each in here and each not in found:
            found.add(each)
            queue += here[each].needs
    return newest_first(found)[::-1]


def is_complete(id: str, here: Mapping[str, CommittedFiles], there: Listing) -> bool:
    """Whether the replica could restore `id`, which is here."""
    return all(
        here[each].files.items() <= there.get(each, {}).items() for each in closure(id, here)
    )


def missing(here: Mapping[str, CommittedFiles], there: Listing) -> list[str]:
    """Ids that the replica lacks, wholly or in part; the newest, which matter most, first."""
    return [id for id in newest_first(here) if not is_complete(id, here, there)]


def in_order(files: Collection[str]) -> list[str]:
    """Packs, then documents, and the manifest last, which makes them a checkpoint."""
    return sorted(files, key=lambda file: (file == MANIFEST, file.endswith(".json"), file))


def uploads(id: str, here: Mapping[str, CommittedFiles], there: Listing) -> list[tuple[str, str]]:
    """(id, file) of what the replica lacks of `id` and of what it needs, in the order to send."""
    return [
        (each, file)
        for each in closure(id, here)
        for file in in_order(here[each].files)
        if there.get(each, {}).get(file) != here[each].files[file]
    ]


def deletions(
    present: Collection[str],
    here: Mapping[str, CommittedFiles],
    there: Listing,
    branches: Collection[Branch] = (),
) -> list[str]:
    """Ids that were deleted here and may go there; what needs another goes before it.

    `present` are all ids here, damaged ones too. Only what is older than a checkpoint that is
    complete on both sides may go. Nothing goes while the replica has a newer one than that which
    is no longer here: this side may have lost it, and nobody here knows what it needs. Of one of
    the `branches` that were given up this side knows. What holds files of others stays.
    """
    given_up = {id for id in (*here, *there) if superseded(id, branches) is not None}
    complete = [id for id in here if id not in given_up and is_complete(id, here, there)]
    if not complete:
        return []
    newest = max(complete, key=recency)
    gone = [id for id in there if id not in present and all(map(is_own, there[id]))]
    if any(newer(id, newest) and MANIFEST in there[id] for id in gone if id not in given_up):
        return []
    needed = {id for copy in here.values() for id in copy.needs}
    old = [id for id in newest_first(gone) if newer(newest, id) or id in given_up]
    return [id for id in old if id not in needed]


def counts(id: str, policy: Policy, complete: Mapping[str, Collection[str]]) -> bool:
    """Whether `id`, which is committed locally, counts as committed.

    `complete` has, for every replica, the ids that are complete there. The local copy is one of
    those that a quorum, more than half of all copies, is made of.
    """
    if policy == "local":
        return True
    copies = sum(id in ids for ids in complete.values())
    if policy == "all":
        return copies == len(complete)
    return 2 * (1 + copies) > 1 + len(complete)


def newest_counting(
    ids: Sequence[str], policy: Policy, complete: Mapping[str, Collection[str]]
) -> str | None:
    """The newest of `ids` that counts as committed: retention must not delete it."""
    return next((id for id in newest_first(ids) if counts(id, policy, complete)), None)


def retry_in(failures: int, random: float) -> float:
    """Seconds until the next try, after so many in a row that brought nothing.

    `random` in [0, 1) keeps many runs apart.
    """
    return min(LAST_RETRY, FIRST_RETRY * 2.0 ** min(failures - 1, 30)) * (0.5 + random / 2)
