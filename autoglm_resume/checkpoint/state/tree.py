"""Nested Python state to a JSON tree and a list of named tensors, and back, without pickle.

Lossless and type-exact. Plain JSON values stand for themselves; everything else is an object with
one member that names its type: `{"$tuple": [...]}`, `{"$tensor": "model/layers.0.weight"}`. A dict
whose keys are plain strings is a JSON object, any other dict a list of pairs. The leaf of a tensor
has more members where they are needed: `"device": "cuda"` if it was not in host memory,
`"parameter": true`, `"requires_grad": true`, and how it lies in memory (see layout.py). That of a
DTensor is called `$dtensor`, names the shard that this rank has, and says what it is a shard of
(see sharding.py).

A list, dict, set or array that is in a state several times is `{"$shared": [0, ...]}` the first
time and `{"$same": 0}` after that, and comes back as one. So does a tensor, whose further leaves
say `"same": "x/a"`; tensors that overlap in memory overlap again. Not kept: attributes that scripts
hang on tensors and dicts, gradients and their graph, the order of a set, the gaps of a DTensor's
shard and what it shares memory with, and what two objects of a session share: each is a state of
its own.

Supported: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict,
OrderedDict (with the `_metadata` that modules hang on it), Counter, defaultdict of a builtin type,
torch.Tensor and Parameter (strided, any dtype), DTensor, torch.Size, dtype, device, NumPy arrays
and scalars. Subclasses are refused: rebuilding one would need pickle.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from autoglm_resume.checkpoint.format.document import Json, canonical
from autoglm_resume.checkpoint.format.tables import DTYPE_BYTES
from autoglm_resume.checkpoint.state import layout
from autoglm_resume.checkpoint.state.sharding import sharding_of
from autoglm_resume.errors import CorruptCheckpoint, UsageError

# Far below what the recursive JSON reader of Python manages.
MAX_DEPTH = 64

FACTORIES: Mapping[str, Callable[[], Any] | None] = {
    "None": None,
    **{kind.__name__: kind for kind in (bool, int, float, str, list, tuple, dict, set)},
}
_FACTORY_NAMES = {factory: name for name, factory in FACTORIES.items()}
_DTYPES: Mapping[str, torch.dtype] = {
    name: dtype
    for name in DTYPE_BYTES
    if isinstance(dtype := getattr(torch, name, None), torch.dtype)
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)
_CHANGEABLE = (list, dict, set, torch.Tensor)
# Decimal text of huge integers is refused by Python's own JSON reader.
_LARGEST_PLAIN_INT_BITS = 1024


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return _DTYPE_NAMES.get(dtype) or str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Raises CorruptCheckpoint when this torch has no such type."""
    if name not in _DTYPES:
        raise CorruptCheckpoint(f"dtype {name}: this torch {torch.__version__} does not have it")
    return _DTYPES[name]


def encode(state: object, name: str) -> tuple[Json, list[tuple[str, torch.Tensor]]]:
    """The JSON tree of `state`, and its tensors, untouched, under names `<name>/<path>`.

    Raises UsageError naming the path and the type of what cannot be saved.
    """
    encoder = _Encoder(name, _repeated(state))
    tree = encoder.encode(state, (), 0)
    encoder.say_what_is_shared()
    return tree, encoder.tensors


def _repeated(state: object) -> set[int]:
    """By `id`, what is in `state` several times and can be changed: it must stay one."""
    seen: set[int] = set()
    found: set[int] = set()
    stack = [state]
    while stack:
        value = stack.pop()
        if type(value) is not tuple:
            if id(value) in seen:
                found.add(id(value))
                continue
            if isinstance(value, _CHANGEABLE) or type(value).__name__ == "ndarray":
                seen.add(id(value))
        if isinstance(value, list | tuple):
            stack += value
        elif isinstance(value, dict):
            stack += value.values()
    return found


class _Encoder:
    def __init__(self, name: str, repeated: set[int]) -> None:
        self.name = name
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.used: set[str] = set()
        self.repeated = repeated
        self.numbers: dict[int, int] = {}
        """Of what is repeated and was met."""
        self.first: dict[int, str] = {}
        """Names of repeated tensors."""
        self.plain: dict[str, dict[str, Json]] = {}
        """The leaves of tensors that are not a rank's shard, by name."""

    def encode(self, value: object, path: tuple[str, ...], depth: int) -> Json:
        if depth > MAX_DEPTH:
            raise UsageError(
                f"{self.where(path)}: nested more than {MAX_DEPTH} levels deep (or inside itself)"
            )
        if id(value) in self.repeated and not isinstance(value, torch.Tensor):
            if (number := self.numbers.get(id(value))) is not None:
                return {"$same": number}
            tree = self.of_type(value, path, depth)
            number = self.numbers[id(value)] = len(self.numbers)
            return {"$shared": [number, tree]}
        return self.of_type(value, path, depth)

    def of_type(self, value: object, path: tuple[str, ...], depth: int) -> Json:
        kind = type(value)
        encode = _ENCODERS.get(kind)
        if encode is not None:
            return encode(self, value, path, depth + 1)
        numpy = sys.modules.get("numpy")
        if numpy is not None and kind is numpy.ndarray:
            return self.of_ndarray(value, path)
        if numpy is not None and isinstance(value, numpy.generic):
            return self.of_numpy_scalar(value, path)
        distributed = sys.modules.get("torch.distributed.tensor")
        if distributed is not None and kind is distributed.DTensor:
            return self.of_dtensor(value, path)
        raise self.refusal(kind, path)

    def where(self, path: tuple[str, ...]) -> str:
        return f"{self.name}/{'.'.join(path)}" if path else self.name

    def refusal(self, kind: type, path: tuple[str, ...], detail: str = "") -> UsageError:
        return UsageError(
            f"{self.where(path)}: a {kind.__module__}.{kind.__qualname__}{detail} cannot be saved"
            " without pickle",
            hint="give it a state_dict of plain values (numbers, strings, lists, dicts, tensors)",
        )

    def of_plain(self, value: object, path: tuple[str, ...], depth: int) -> Json:
        return value

    def of_int(self, value: int, path: tuple[str, ...], depth: int) -> Json:
        return value if value.bit_length() <= _LARGEST_PLAIN_INT_BITS else {"$int": hex(value)}

    def of_float(self, value: float, path: tuple[str, ...], depth: int) -> Json:
        return value if math.isfinite(value) else {"$float": repr(value)}

    def of_complex(self, value: complex, path: tuple[str, ...], depth: int) -> Json:
        return {"$complex": [self.of_float(part, path, depth) for part in (value.real, value.imag)]}

    def of_str(self, value: str, path: tuple[str, ...], depth: int) -> Json:
        if _plain_text(value):
            return value
        return {"$str": value.encode("utf-8", "surrogatepass").hex()}

    def of_bytes(self, value: bytes, path: tuple[str, ...], depth: int) -> Json:
        return {"$bytes": value.hex()}

    def of_list(self, value: list[object], path: tuple[str, ...], depth: int) -> Json:
        return [self.encode(v, (*path, str(i)), depth) for i, v in enumerate(value)]

    def of_tuple(self, value: tuple[object, ...], path: tuple[str, ...], depth: int) -> Json:
        return {"$tuple": [self.encode(v, (*path, str(i)), depth) for i, v in enumerate(value)]}

    def of_set(self, value: set[object], path: tuple[str, ...], depth: int) -> Json:
        # Sorted, because the order of a set differs between two processes.
        members = [self.encode(member, path, depth) for member in value]
        return {"$set": sorted(members, key=canonical)}

    def of_frozenset(self, value: frozenset[object], path: tuple[str, ...], depth: int) -> Json:
        return {"$frozenset": self.of_set(set(value), path, depth)["$set"]}

    def of_dict(self, value: dict[object, object], path: tuple[str, ...], depth: int) -> Json:
        if all(type(k) is str and not k.startswith("$") and _plain_text(k) for k in value):
            return {k: self.encode(v, (*path, _label(k)), depth) for k, v in value.items()}
        return {"$dict": self.pairs(value, path, depth)}

    def pairs(self, value: Mapping[Any, object], path: tuple[str, ...], depth: int) -> Json:
        return [
            [self.key(k, path, depth), self.encode(v, (*path, _label(k)), depth)]
            for k, v in value.items()
        ]

    def key(self, key: object, path: tuple[str, ...], depth: int) -> Json:
        if isinstance(key, torch.Tensor):
            raise self.refusal(type(key), path, " as a key of a dict")
        return self.encode(key, (*path, "key"), depth)

    def of_ordered_dict(
        self, value: OrderedDict[object, object], path: tuple[str, ...], depth: int
    ) -> Json:
        tree = {"$ordered": self.pairs(value, path, depth)}
        if (metadata := getattr(value, "_metadata", None)) is not None:
            return {"$module": [tree, self.encode(metadata, (*path, "_metadata"), depth)]}
        return tree

    def of_counter(self, value: Counter[object], path: tuple[str, ...], depth: int) -> Json:
        return {"$counter": self.pairs(value, path, depth)}

    def of_default_dict(
        self, value: defaultdict[object, object], path: tuple[str, ...], depth: int
    ) -> Json:
        factory = value.default_factory
        if factory not in _FACTORY_NAMES:
            raise self.refusal(defaultdict, path, f" with default {factory!r}")
        return {"$default": [_FACTORY_NAMES[factory], self.pairs(value, path, depth)]}

    def of_tensor(self, value: torch.Tensor, path: tuple[str, ...], depth: int) -> Json:
        leaf = {**self.leaf("$tensor", value, path), **layout.described(value)}
        if "same" not in leaf:
            self.plain[leaf["$tensor"]] = leaf
        return leaf

    def of_dtensor(self, value: Any, path: tuple[str, ...]) -> Json:
        sharding = sharding_of(value, self.where(path))
        return {
            **self.leaf("$dtensor", value, path),
            **layout.described(local(value)),
            **sharding.to_json(),
        }

    def say_what_is_shared(self) -> None:
        """Among tensors: known when all of them are."""
        tensors = [each for each in self.tensors if each[0] in self.plain]
        for name, member in layout.shared(tensors).items():
            self.plain[name]["memory"] = member

    def leaf(self, tag: str, value: torch.Tensor, path: tuple[str, ...]) -> dict[str, Json]:
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise self.refusal(type(value), path, f" ({value.layout}, {value.dtype})")
        if value.device.type == "meta":
            raise self.refusal(type(value), path, " without data")
        if dtype_name(value.dtype) not in DTYPE_BYTES:
            raise self.refusal(type(value), path, f" of {value.dtype}")
        name = self.add(local(value).detach(), path)
        leaf: dict[str, Json] = {tag: name}
        if id(value) in self.repeated and (first := self.first.setdefault(id(value), name)) != name:
            leaf["same"] = first
        if value.device.type != "cpu":
            leaf["device"] = value.device.type
        if isinstance(value, torch.nn.Parameter):
            leaf["parameter"] = True
        if value.requires_grad:
            leaf["requires_grad"] = True
        return leaf

    def add(self, tensor: torch.Tensor, path: tuple[str, ...]) -> Json:
        base = name = f"{self.name}/{'.'.join(path)}"
        clash = 1
        while name in self.used:
            clash += 1
            name = f"{base}~{clash}"
        self.used.add(name)
        self.tensors.append((name, tensor))
        return name

    def of_size(self, value: torch.Size, path: tuple[str, ...], depth: int) -> Json:
        return {"$size": list(value)}

    def of_dtype(self, value: torch.dtype, path: tuple[str, ...], depth: int) -> Json:
        return {"$dtype": dtype_name(value)}

    def of_device(self, value: torch.device, path: tuple[str, ...], depth: int) -> Json:
        return {"$device": str(value)}

    def of_ndarray(self, value: Any, path: tuple[str, ...]) -> Json:
        self.check_numpy(value, path)
        data = bytearray(value.tobytes())
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else _empty()
        tree = {"$ndarray": [value.dtype.str, list(value.shape), self.add(flat, path)]}
        return {**tree, "order": "F"} if value.flags.fnc else tree

    def of_numpy_scalar(self, value: Any, path: tuple[str, ...]) -> Json:
        self.check_numpy(value, path)
        return {"$numpy": [value.dtype.str, value.tobytes().hex()]}

    def check_numpy(self, value: Any, path: tuple[str, ...]) -> None:
        if value.dtype.hasobject or value.dtype.kind == "V" or not value.dtype.itemsize:
            raise self.refusal(type(value), path, f" of dtype {value.dtype}")


_ENCODERS: Mapping[type, Callable[[_Encoder, Any, tuple[str, ...], int], Json]] = {
    type(None): _Encoder.of_plain,
    bool: _Encoder.of_plain,
    int: _Encoder.of_int,
    float: _Encoder.of_float,
    complex: _Encoder.of_complex,
    str: _Encoder.of_str,
    bytes: _Encoder.of_bytes,
    list: _Encoder.of_list,
    tuple: _Encoder.of_tuple,
    set: _Encoder.of_set,
    frozenset: _Encoder.of_frozenset,
    dict: _Encoder.of_dict,
    OrderedDict: _Encoder.of_ordered_dict,
    Counter: _Encoder.of_counter,
    defaultdict: _Encoder.of_default_dict,
    **dict.fromkeys(_TENSOR_TYPES, _Encoder.of_tensor),
    torch.Size: _Encoder.of_size,
    torch.dtype: _Encoder.of_dtype,
    torch.device: _Encoder.of_device,
}


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable, one dimension of bytes; no copy."""
    import ctypes

    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("only a contiguous tensor in host memory has bytes to view")
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(bytearray())
    array = (ctypes.c_char * size).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]  # the view must keep the memory alive
    return memoryview(array).cast("B")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process has: of a DTensor its shard."""
    return getattr(tensor, "_local_tensor", tensor)


def _plain_text(text: str) -> bool:
    """JSON joins two halves of a surrogate pair, which Python keeps apart."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _label(key: object) -> str:
    """A dict's key as a piece of a tensor's name: for people, and safe in JSON."""
    try:
        text = key if isinstance(key, str) else repr(key)
    except ValueError:  # the decimal digits of a huge integer
        text = type(key).__name__
    if len(text) <= 200 and text.isascii():
        return text
    return text[:200].encode("utf-8", "replace").decode()


def _empty() -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8)
