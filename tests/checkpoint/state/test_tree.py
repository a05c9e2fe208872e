from __future__ import annotations

import functools
import io
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, namedtuple
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from autoglm_resume.checkpoint.format.tables import DTYPE_BYTES
from autoglm_resume.checkpoint.state import decoding, tree
from autoglm_resume.errors import CorruptCheckpoint, UsageError

numpy = pytest.importorskip("numpy")


def same(a: Any, b: Any) -> bool:
    """Equal in type, value, order and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) and bits(a) == bits(
            b
        )
    if isinstance(a, numpy.ndarray | numpy.generic):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, dict):
        if isinstance(a, defaultdict) and a.default_factory is not b.default_factory:
            return False
        return same(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tree.as_bytes(tensor.resolve_conj().resolve_neg().contiguous()))


def round_trip(state: Any) -> Any:
    encoded, tensors = tree.encode(state, "x")
    assert len({name for name, _ in tensors}) == len(tensors)
    text = json.dumps(encoded, allow_nan=False)
    fresh = {name: t.resolve_conj().resolve_neg().clone() for name, t in tensors}
    return decoding.decode(json.loads(text), fresh)


texts = st.text(st.characters(), max_size=5) | st.sampled_from(
    ["$dict", "$", "a.b", "\ud83d\ude00"]
)
floats = st.floats(allow_nan=False)
keys = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | texts | st.binary(max_size=3),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
tensors = st.builds(
    lambda shape, dtype, seed: torch.randint(
        0, 255, (*shape, tree.dtype_named(dtype).itemsize), dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    ).view(tree.dtype_named(dtype)).squeeze(-1),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(["float32", "bfloat16", "int64", "float8_e4m3fn", "complex64", "uint8"]),
    st.integers(0, 9),
)  # fmt: skip
leaves = keys | st.floats() | st.complex_numbers() | tensors | st.integers(-(2**5000), 2**5000)
states = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(texts, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
        st.dictionaries(keys, inner, max_size=3).map(lambda d: defaultdict(list, d)),
        st.sets(keys, max_size=3),
    ),
    max_leaves=12,
)


@given(states)
@settings(max_examples=200)
def test_any_state_comes_back_exactly(state: Any) -> None:
    assert same(round_trip(state), state)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", sorted(DTYPE_BYTES))
def test_every_dtype_has_the_size_that_torch_gives_it(name: str) -> None:
    if not hasattr(torch, name):
        pytest.skip(f"this torch has no {name}")
    dtype = tree.dtype_named(name)
    assert dtype.itemsize == DTYPE_BYTES[name]
    tensor = torch.arange(6 * dtype.itemsize, dtype=torch.uint8).view(dtype)
    if dtype is torch.bool:
        tensor = torch.tensor([True, False])
    assert same(round_trip(tensor), tensor)


BASE = torch.arange(24, dtype=torch.float32).reshape(4, 6)


@pytest.mark.parametrize(
    "value",
    [
        BASE.T,
        BASE[::2, 1:3],
        BASE.expand(2, 4, 6),
        torch.tensor(3.5),
        torch.empty(0, 3),
        torch.complex(BASE, BASE).conj(),
        torch.complex(BASE, BASE).conj().imag,
        torch.tensor([math.nan, -0.0, math.inf]),
        torch.Size([2, 3]),
        torch.bfloat16,
        torch.device("cuda:1"),
        Counter("abca"),
        defaultdict(None, {1: 2}),
        numpy.arange(6, dtype=">i2").reshape(2, 3),
        numpy.zeros((0, 2)),
        numpy.array(5.0),
        numpy.array(["a", "bcd"]),
        numpy.array(["2020-01-01"], dtype="datetime64[D]"),
        numpy.float32(2.5),
        numpy.bool_(True),
        numpy.datetime64("2020-01-01"),
        numpy.random.default_rng(1).bit_generator.state,
        numpy.random.RandomState(1).get_state(),
    ],
    ids=repr,
)
def test_a_special_value_comes_back_exactly(value: Any) -> None:
    assert same(round_trip(value), value)


def test_a_module_keeps_its_metadata() -> None:
    module = torch.nn.BatchNorm1d(3)
    back = round_trip(module.state_dict())
    assert back._metadata == module.state_dict()._metadata


def test_an_optimizer_and_a_scheduler_continue_from_what_comes_back() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    for tracked in (optimizer, scheduler):
        tracked.load_state_dict(round_trip(tracked.state_dict()))
        assert repr(round_trip(tracked.state_dict())) == repr(tracked.state_dict())


class Odd(dict):  # type: ignore[type-arg]
    pass


Pair = namedtuple("Pair", "a b")
CIRCULAR: list[Any] = []
CIRCULAR.append(CIRCULAR)


@pytest.mark.parametrize(
    ("value", "place", "says"),
    [
        (io.BytesIO(), "x/a.1", "_io.BytesIO"),
        (functools.partial(print), "x/a.1", "functools.partial"),
        (Odd(), "x/a.1", "Odd"),
        (Pair(1, 2), "x/a.1", "Pair"),
        (torch.eye(2).to_sparse(), "x/a.1", "sparse"),
        (torch.empty(2, device="meta"), "x/a.1", "without data"),
        (defaultdict(lambda: 1), "x/a.1", "default"),
        ({torch.ones(1): 1}, "x/a.1", "key of a dict"),
        (numpy.array([object()]), "x/a.1", "object"),
        ([[{"deep": print}]], "x/a.1.0.0.deep", "builtin_function"),
        (CIRCULAR, "x/a.1.0", "inside itself"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_needs_pickle_is_refused_with_its_path(value: Any, place: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        tree.encode({"a": [0, value]}, "x")
    assert place in caught.value.message
    assert says in caught.value.message


@pytest.mark.parametrize(
    "bad",
    [
        {"$pickle": "gASV"},
        {"$tensor": "x/none"},
        {"$dict": [[[], 1]]},
        {"$dict": 3},
        {"$numpy": ["O", "00"]},
        {"$ndarray": ["<f4", [9], "x/t"]},
        {"$dtype": "Tensor"},
        {"$device": "nowhere"},
        {"$bytes": "zz"},
        [{"$tensor": "x/t"}, {"$tensor": "x/t"}],
    ],
    ids=str,
)
def test_a_tree_that_was_never_written_is_corrupt(bad: Any) -> None:
    with pytest.raises(CorruptCheckpoint):
        decoding.decode(bad, {"x/t": torch.zeros(4, dtype=torch.uint8)})


def test_tensors_whose_paths_look_alike_keep_different_names() -> None:
    state = {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}, 1: torch.ones(2), "1": torch.ones(3)}
    assert same(round_trip(state), state)


def test_the_view_of_a_tensor_keeps_its_memory_alive() -> None:
    view = tree.as_bytes(torch.full((1 << 20,), 7, dtype=torch.uint8))
    torch.zeros(1 << 20, dtype=torch.uint8)
    assert bytes(view) == b"\7" * (1 << 20)
