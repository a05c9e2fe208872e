"""A sampler that deals every sample once per epoch, however often training is interrupted."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from autoglm_resume.errors import UsageError
from autoglm_resume.worker.feed import fetching
from autoglm_resume.worker.feed.dealing import Dealing, Pace
from autoglm_resume.worker.feed.fetching import Dealt

RECENT = 8
"""Iterations that are remembered until a step is done: one that trains, and looks."""


class _Seen:
    """What was seen of iterations."""

    def __init__(self) -> None:
        self.resumed = False
        self.training = False
        """Steps are being done: what comes before them is a look, whatever it computes."""
        self.stepper: threading.Thread | None = None
        self.whole_passes = False
        """A step is a whole iteration, or several."""
        self.recent: deque[Dealing] = deque(maxlen=RECENT)
        """Which handed out something since the last step."""
        self.present: Dealing | None = None
        """The one that steps are done in."""
        self.over: Dealing | None = None
        """One that was over before the steps had counted all of it."""
        self.pace = Pace()
        self.handed_out = 0
        """By all loaders, up to the last step."""
        self.looked_for_cycle = False
        self.told_of_repeats = False

    def trained_on(self, recent: deque[Dealing]) -> Dealing | None:
        """The iteration that a step was done in, of those that handed something out in it."""
        present = self.present
        if present is not None and (not recent or (present in recent and present.goes_on)):
            return present
        looks = [d for d in recent if d.use.over and not d.use.worked and not d.steps]
        return next((d for d in reversed(recent) if d not in looks), recent[-1] if recent else None)

    def may_train(self, dealing: Dealing) -> bool:
        """Whether `dealing`, which is over and had no step, may be more than a look."""
        known = self.whole_passes if dealing.use.worked and not dealing.within else self.resumed
        return self.training or known

    def ahead(self, dealing: Dealing) -> bool:
        """Whether another thread takes its batches than the one that does steps."""
        return self.stepper is not None and dealing.use.thread is not self.stepper


class ResumableSampler:
    """A batch sampler for `torch.utils.data.DataLoader(..., batch_sampler=sampler)`.

    Each global batch (`batch_size` times world size samples of the epoch's permutation) is dealt to
    the ranks in turn; the last one of an epoch may be smaller, and what would not give every rank
    a sample joins the batch before it. So nothing is padded, dropped, or seen twice.

    The position moves when a step is *done* (`Session.step_done` moves every tracked sampler, so
    track the one of training only), not when an index is drawn: a DataLoader draws ahead, and a
    checkpoint must count only what was trained on. The position is a number of global samples;
    after the last step of an epoch it is the beginning of the next one. An epoch is also over when
    an iteration is that steps were done in, though they left batches out, and when a step was a
    whole iteration. One without any step is a look, and moves nothing.

    What a DataLoader's data set and `collate_fn` draw from the global generators of Python, NumPy
    and torch (on the CPU) follows from `seed` and the position alone, with and without workers.
    """

    deals_by_position = True

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        endless: bool = False,
        batches_per_step: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Deal `size` samples, `batch_size` per rank and batch.

        `endless` goes on with the next epoch instead of ending the iteration; `batches_per_step`
        is the number of batches a step consumes (gradient accumulation). Rank and world size come
        from torchrun's environment. Raises UsageError where a rank would get no sample.
        """
        self.rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self.world_size = (
            int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
        )
        if batch_size < 1 or size < self.world_size:
            raise UsageError(
                f"ResumableSampler: {size} samples in batches of {batch_size} cannot give each of "
                f"{self.world_size} ranks a sample"
            )
        self.size = size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.endless = endless
        self.batches_per_step = batches_per_step
        self.epoch = 0
        self.consumed = 0
        self.placed = 0
        """How often the position was set, rather than moved."""
        self.wrapped = False
        """Another sampler draws from it, and nobody says what is handed out."""
        self._find_place: Callable[[], None] | None = None
        self._say: Callable[[str], None] = print
        self._seen = _Seen()

    def __iter__(self) -> Iterator[list[int]]:
        return Dealing(self)

    def __len__(self) -> int:
        """Batches of an epoch, for each rank; one that is gone on with has fewer left."""
        return 1 + (self.size - self.world_size) // (self.batch_size * self.world_size)

    def follow(self, find_place: Callable[[], None], say: Callable[[str], None]) -> None:
        """Call `find_place` before the first batch of an iteration, to be where a session is.

        From now on only the session moves the position. `say` tells a person.
        """
        self._find_place = find_place
        self._say = say
        self.placed += 1

    @property
    def followed(self) -> bool:
        """Whether a session tracks it."""
        return self._find_place is not None

    def advance(self) -> None:
        """Count one step's batches as consumed. Raises UsageError if a session does it."""
        if self.followed:
            raise UsageError(
                "ResumableSampler: advance() was called by hand, and session.step_done() does it",
                hint="leave it out; the steps of session.steps() are counted too",
            )
        self.step_done()

    def resumed(self) -> None:
        """For sessions: the position is what it was, and training comes next."""
        self._seen.resumed = True
        self._seen.stepper = threading.current_thread()

    def training(self) -> None:
        """For sessions: steps begin."""
        self._seen.training = True

    def step_done(self) -> None:
        """For sessions: `advance`. Says once if steps take other batches than are counted."""
        seen = self._seen
        seen.training, seen.stepper = True, threading.current_thread()
        recent, seen.recent = seen.recent, deque(maxlen=RECENT)
        dealing = seen.trained_on(recent)
        if dealing is not None and self._is_whole(dealing):
            self.epoch, self.consumed = dealing.epoch + 1, 0
            dealing.steps += 1
            seen.whole_passes = True
        else:
            counted = self._count()
            if dealing is not None:
                self._judge(dealing, counted, dealing in recent)
        seen.present, seen.handed_out = dealing, fetching.Work.handed_out

    def _count(self) -> int:
        """Move the position by a step; returns by how many batches."""
        for counted in range(1, self.batches_per_step + 1):
            self.consumed = self._end(self.consumed)
            if self.consumed >= self.size:
                self.epoch, self.consumed = self.epoch + 1, 0
                if not self.endless:
                    return counted  # the last step of an epoch may have fewer batches
        return self.batches_per_step

    def _is_whole(self, dealing: Dealing) -> bool:
        """Whether the step that is done was all of `dealing`."""
        use, seen = dealing.use, self._seen
        known = use.worked or seen.whole_passes
        alone = self.batches_per_step == 1 and not dealing.steps and not seen.ahead(dealing)
        return known and alone and use.over and use.taken > 1

    def _judge(self, dealing: Dealing, counted: int, took: bool) -> None:
        seen, taken = self._seen, dealing.step_done(counted)
        said = ""
        if took or not dealing.use.over:
            usual, ahead = self.batches_per_step, seen.ahead(dealing)
            said = seen.pace.step_done(dealing, taken, counted, usual=usual, ahead=ahead)
        elif (
            dealing.lead < 0
            and not seen.told_of_repeats
            and seen.handed_out == fetching.Work.handed_out
        ):
            seen.told_of_repeats = True
            said = (
                "the iteration over a ResumableSampler's loader is over, and steps go on without"
                " another one: if they repeat batches that were kept, a resume would deal others;"
                " endless=True goes on with the next epoch"
            )
        if said:
            self._say(said)

    def handed_out(self, dealing: Dealing) -> None:
        """For iterations: the training process was given a batch."""
        recent = self._seen.recent
        if not recent or recent[-1] is not dealing:
            recent.append(dealing)

    def ended(self, dealing: Dealing) -> None:
        """For iterations: the training process has asked `dealing` for more than there is."""
        if (dealing.placed, dealing.epoch) != (self.placed, self.epoch):
            return  # its steps have counted all of it
        seen = self._seen
        dealing.before_steps = not dealing.steps
        if dealing.steps and not dealing.held and not seen.ahead(dealing):
            # A step found nothing in a prefetcher's hands: what is not counted was left out.
            self.epoch, self.consumed = self.epoch + 1, 0
        elif dealing.steps or seen.may_train(dealing):
            seen.over = dealing

    def begin(self, dealing: Dealing) -> Iterator[list[int]]:
        """For iterations: the batches from where `dealing` begins."""
        if self._find_place is not None:
            self._find_place()
        over, self._seen.over = self._seen.over, None
        dealing.placed = self.placed
        start = self.consumed
        dealing.epoch = self.epoch
        if (
            over is not None
            and (over.placed, over.epoch) == (self.placed, self.epoch)
            and self._ends_epoch(over, dealing)
        ):
            dealing.epoch, start = self.epoch + 1, 0
            if not dealing.carried:
                self.epoch, self.consumed = self.epoch + 1, 0
        dealing.within = start > 0
        return self._deal(dealing.epoch, start)

    def _ends_epoch(self, over: Dealing, following: Dealing) -> bool:
        """Whether `over` dealt the last of an epoch that the position is still in.

        What a prefetcher still holds of it is carried over to the steps of the one `following`.
        """
        seen, use, per_step = self._seen, over.use, self.batches_per_step
        if seen.ahead(over):
            # Another thread for another iteration: the loop over the last one was perhaps left.
            goes_on = over.drawn_by is following.drawn_by
            following.carried = over.lead if goes_on else 0
            return goes_on
        if over.before_steps and not over.steps:
            if over.within:  # what an earlier life left of its epoch, and would have left out
                return use.taken <= per_step and use.with_grad
            return use.worked and per_step == 1  # one of several in a step
        if over.before_steps:
            seen.whole_passes |= over.steps == 1 == per_step
            return over.steps == 1 == per_step
        following.carried = over.lead if over.steadily_held else 0
        return True

    def refuse_cycle(self, iterator: object) -> None:
        """For iterations: raises UsageError if `itertools.cycle` repeats them."""
        if not self._seen.looked_for_cycle:
            self._seen.looked_for_cycle = True
            if fetching.in_cycle(iterator):
                raise UsageError(
                    "itertools.cycle() repeats the batches of the first epoch, and a resume would"
                    " deal those of the epoch that it is in",
                    hint="leave cycle() out: ResumableSampler(..., endless=True) goes on with the"
                    " next epoch",
                )

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands, the same on every rank."""
        return {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "size": self.size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            **({"whole_passes": True} if self._seen.whole_passes else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there. Raises UsageError if the data set or its order is another one."""
        mine = self.state_dict()
        for key in ("size", "seed", "shuffle"):
            if state[key] != mine[key]:
                raise UsageError(
                    f"ResumableSampler: {key} was {state[key]!r} when the checkpoint was made and "
                    f"is {mine[key]!r} now, so samples would be repeated or lost",
                    hint=f"set {key} back to {state[key]!r}, or start a new run",
                )
        left = self.size - state["consumed"]
        if left < self.world_size:
            raise UsageError(
                f"ResumableSampler: {left} samples are left in epoch {state['epoch']}, not one for "
                f"each of {self.world_size} ranks",
                hint=f"resume with at most {left} ranks until the next epoch",
            )
        self.epoch, self.consumed = state["epoch"], state["consumed"]
        self._seen.whole_passes = state.get("whole_passes", False)
        self.placed += 1

    def __getstate__(self) -> dict[str, Any]:
        """A copy is nobody's."""
        return {**self.__dict__, "_find_place": None, "_say": print, "_seen": _Seen()}

    def _deal(self, epoch: int, start: int) -> Iterator[list[int]]:
        while True:
            order = self._order(epoch)
            while start < self.size:
                end = self._end(start)
                mine = order[start + self.rank : end : self.world_size].tolist()
                yield Dealt(mine, f"{self.seed} {epoch} {start} {self.rank}")
                start = end
            if not self.endless:
                return
            epoch, start = epoch + 1, 0

    def _order(self, epoch: int) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.size, generator=generator)

    def _end(self, start: int) -> int:
        end = start + self.batch_size * self.world_size
        return self.size if self.size - end < self.world_size else end
