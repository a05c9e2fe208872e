"""The state again, of a tree and its tensors; see tree.py."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from autoglm_resume.checkpoint.format.document import Json
from autoglm_resume.checkpoint.state import layout
from autoglm_resume.checkpoint.state.leaves import leaves
from autoglm_resume.checkpoint.state.tree import FACTORIES, as_bytes, dtype_named
from autoglm_resume.errors import CorruptCheckpoint


def decode(tree: Json, tensors: dict[str, torch.Tensor]) -> Any:
    """The state again; takes its tensors, which are in C order, out of `tensors`.

    What is there under the name of a DTensor's shard is taken for the DTensor. Raises
    CorruptCheckpoint when the tree is not one that `encode` makes, and CheckpointError.
    """
    try:
        layout.lay_out(leaves(tree), tensors)
        return _Decoder(tensors).decode(tree)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CorruptCheckpoint(f"state tree: not as it was written ({error!r})") from error


class _Decoder:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.shared: dict[int, Any] = {}
        self.made: dict[str, torch.Tensor] = {}

    def decode(self, tree: Json) -> Any:
        if isinstance(tree, list):
            return [self.decode(child) for child in tree]
        if not isinstance(tree, dict):
            return tree
        tag = next(iter(tree), "")
        if not tag.startswith("$"):
            return {key: self.decode(child) for key, child in tree.items()}
        if tag in ("$tensor", "$dtensor"):
            return self.of_tensor(tree[tag], tree)
        value = _DECODERS[tag](self, tree[tag])
        return value.copy(order="F") if tree.get("order") == "F" else value

    def pairs(self, pairs: Json) -> list[tuple[Any, Any]]:
        return [(self.decode(key), self.decode(value)) for key, value in pairs]

    def of_tensor(self, name: str, leaf: dict[str, Json]) -> torch.Tensor:
        value = self.tensors.pop(name)
        if "same" in leaf:
            return self.made[leaf["same"]]
        if leaf.get("parameter"):
            value = torch.nn.Parameter(value, requires_grad=bool(leaf.get("requires_grad")))
        elif leaf.get("requires_grad"):
            value.requires_grad_()
        self.made[name] = value
        return value

    def first(self, value: Json) -> Any:
        number, tree = value
        found = self.shared[number] = self.decode(tree)
        return found

    def module(self, value: Json) -> Any:
        tree, metadata = value
        state = self.decode(tree)
        state._metadata = self.decode(metadata)
        return state

    def of_ndarray(self, value: Json) -> Any:
        import numpy

        dtype, shape, name = value
        # A copy, because NumPy would only borrow the tensor's memory.
        return numpy.ndarray(tuple(shape), dtype, bytearray(as_bytes(self.tensors.pop(name))))

    def of_numpy_scalar(self, value: Json) -> Any:
        import numpy

        dtype, data = value
        return numpy.ndarray((), dtype, bytes.fromhex(data))[()]


_DECODERS: Mapping[str, Callable[[_Decoder, Json], Any]] = {
    "$shared": _Decoder.first,
    "$same": lambda d, v: d.shared[v],
    "$int": lambda d, v: int(v, 16),
    "$float": lambda d, v: float(v),
    "$complex": lambda d, v: complex(*(d.decode(part) for part in v)),
    "$str": lambda d, v: bytes.fromhex(v).decode("utf-8", "surrogatepass"),
    "$bytes": lambda d, v: bytes.fromhex(v),
    "$tuple": lambda d, v: tuple(d.decode(v)),
    "$set": lambda d, v: set(d.decode(v)),
    "$frozenset": lambda d, v: frozenset(d.decode(v)),
    "$dict": lambda d, v: dict(d.pairs(v)),
    "$ordered": lambda d, v: OrderedDict(d.pairs(v)),
    "$module": _Decoder.module,
    "$counter": lambda d, v: Counter(dict(d.pairs(v))),
    "$default": lambda d, v: defaultdict(FACTORIES[v[0]], d.pairs(v[1])),
    "$size": lambda d, v: torch.Size(v),
    "$dtype": lambda d, v: dtype_named(v),
    "$device": lambda d, v: torch.device(v),
    "$ndarray": _Decoder.of_ndarray,
    "$numpy": _Decoder.of_numpy_scalar,
}
