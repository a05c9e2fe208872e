"""When a save copies what only an optimizer's step should change. Pure.

Such state may be copied by a thread during the next forward and backward pass. But a loop may
change it before that step, in ways that leave no trace: averaged weights swapped in by an
evaluation, a decay through `.data`, an optimizer that runs within the backward pass, a step that is
replayed from a graph. So the first saves are copied at once, and compared, byte by byte, when the
step comes. Only a loop that changed nothing in the meantime is trusted from then on; one change,
then or later, and everything is copied at once for good.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

PROOFS = 2
"""Saves that must be found unchanged before the loop is trusted."""


@dataclass(frozen=True)
class CopyTiming:
    """What is known of the loop."""

    proofs: int = 0
    changed: str = ""
    """A tensor that was changed between a save and the next step."""

    @property
    def at_once(self) -> bool:
        """Whether training waits for the whole copy."""
        return bool(self.changed) or self.proofs < PROOFS

    @property
    def watched(self) -> bool:
        """Whether a copy made at once is to be compared before the next step."""
        return not self.changed and self.proofs < PROOFS

    def after(self, changed: str) -> CopyTiming:
        """`changed` names a tensor that was, or is empty."""
        if changed:
            return replace(self, changed=changed)
        return replace(self, proofs=self.proofs + 1)
