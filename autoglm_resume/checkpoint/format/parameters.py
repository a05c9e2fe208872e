"""What no state says of parameters: an optimizer's knows them by number only, and a model's does
not know which of them training has frozen or unfrozen. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

from autoglm_resume.checkpoint.format.document import Json, JsonNode, columns, compact

Member: TypeAlias = "str | tuple[int, ...]"
"""A parameter of an optimizer: its name, or, where no tracked module has it, its shape."""
Group: TypeAlias = "tuple[Member, ...]"
Spec: TypeAlias = "tuple[str, tuple[int, ...]]"
"""Type and shape of a tensor."""


@dataclass(frozen=True)
class Parameters:
    """Names are `<object>.<name in the module>`, as in the model's structure."""

    optimizers: Mapping[str, tuple[Group, ...]] = field(default_factory=dict)
    """The groups of each, in order."""
    began_with: Mapping[str, int] = field(default_factory=dict)
    """How many groups those optimizers had at the start that have been given more since."""
    thawed: tuple[str, ...] = ()
    """Names of what is trained and was not at the start of the script, sorted."""
    frozen: tuple[str, ...] = ()
    """And of what is not trained any more."""
    buffers: tuple[str, ...] = ()
    """Names of what else modules with parameters hold, such as the running mean of a BatchNorm."""
    modes: Mapping[str, bool] = field(default_factory=dict)
    """Whether those modules train whose mode is, or was at the start, not that of their model."""
    reshaped: Mapping[str, Spec | None] = field(default_factory=dict)
    """What tensors of modules are now that were others at the start; None where they are gone."""

    @cached_property
    def text(self) -> bytes:
        """As JSON."""
        return compact(self.to_json())

    def renamed(self, present: Callable[[str], str]) -> Parameters:
        """With `present` names."""

        def one(member: Member) -> Member:
            return present(member) if isinstance(member, str) else member

        return replace(
            self,
            optimizers={
                name: tuple(tuple(map(one, group)) for group in groups)
                for name, groups in self.optimizers.items()
            },
            thawed=tuple(map(present, self.thawed)),
            frozen=tuple(map(present, self.frozen)),
            modes={present(name): mode for name, mode in self.modes.items()},
            reshaped={present(name): spec for name, spec in self.reshaped.items()},
        )

    def to_json(self) -> Json:
        return {
            "optimizers": {
                name: [[_to_json(member) for member in group] for group in groups]
                for name, groups in self.optimizers.items()
            },
            "began_with": dict(self.began_with),
            "thawed": list(self.thawed),
            "frozen": list(self.frozen),
            "buffers": list(self.buffers),
            "modes": dict(self.modes),
            "reshaped": {
                name: None if spec is None else [spec[0], list(spec[1])]
                for name, spec in self.reshaped.items()
            },
        }

    @classmethod
    def from_json(cls, document: Json, file: str = "parameters") -> Parameters:
        """Raises CorruptCheckpoint naming `file` when `document` is not what `to_json` made."""
        return cls.from_node(JsonNode(document, file))

    @classmethod
    def from_node(cls, node: JsonNode) -> Parameters:
        optimizers = {
            name: tuple(tuple(map(_member, group.items())) for group in groups.items())
            for name, groups in node["optimizers"].members().items()
        }
        return cls(
            optimizers,
            {name: count.whole() for name, count in node["began_with"].members().items()},
            tuple(name.text() for name in node["thawed"].items()),
            tuple(name.text() for name in node["frozen"].items()),
            tuple(name.text() for name in node["buffers"].items()),
            {name: mode.flag() for name, mode in _optional(node["modes"]).items()},
            {name: _spec(each) for name, each in _optional(node["reshaped"]).items()},
        )


def _optional(node: JsonNode) -> Mapping[str, JsonNode]:
    """Members of what older checkpoints do not have."""
    found = node.optional()
    return found.members() if found is not None else {}


def _spec(node: JsonNode) -> Spec | None:
    if node.optional() is None:
        return None
    dtype, shape = columns(node, 2)
    return dtype.text(), shape.whole_numbers()


def _to_json(member: Member) -> Json:
    return member if isinstance(member, str) else list(member)


def _member(node: JsonNode) -> Member:
    if isinstance(node.value, str):
        return node.text()
    return tuple(size.whole() for size in node.items())
