"""Immutable objects with typed fields, to and from JSON. Pure.

Like frozen, keyword-only dataclasses, without the half millisecond each of them takes to be made:
every command, rank and saver imports some fifty.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from types import NoneType, SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from typing_extensions import Self, dataclass_transform
else:  # its import takes longer than ours

    def dataclass_transform(**_):
        return lambda cls: cls


T = TypeVar("T")
_Read = Callable[[Any], Any]
_LARGEST = 1e18
"""No step, time or size of ours comes near; what is beyond (or not finite) was damaged."""
_NEEDED: Any = object()


class Unfit(ValueError):
    """JSON that is no such object: a field is missing, or of another type."""


class _Unsaid:
    def __init__(self, default: object) -> None:
        self.default = default


def unsaid(default: T) -> T:
    """The default of a field that is left out of the JSON where it has it."""
    return cast(T, _Unsaid(default))


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Record:
    """Base of such objects. A name that Python has taken ends in “_” here, and not in the JSON."""

    _defaults: ClassVar[Mapping[str, Any]] = {}
    _left_out: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls) -> None:
        own = {}
        for name, hint in vars(cls).get("__annotations__", {}).items():
            if hint.startswith("ClassVar"):
                continue
            own[name] = cls.__dict__.get(name, _NEEDED)
            if isinstance(own[name], _Unsaid):
                own[name] = own[name].default
                setattr(cls, name, own[name])
                cls._left_out |= {name}
        cls._defaults = {**cls._defaults, **own}

    def __init__(self, **fields: Any) -> None:
        values = {**self._defaults, **fields}
        missing = [name for name, value in values.items() if value is _NEEDED]
        if missing or len(values) > len(self._defaults):
            wrong = ", ".join([*missing, *(fields.keys() - self._defaults.keys())])
            raise TypeError(f"{type(self).__name__}: missing or unknown: {wrong}")
        vars(self).update(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # a field may be a dict

    def __repr__(self) -> str:
        fields = (f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({', '.join(fields)})"

    def but(self, **fields: Any) -> Self:
        """The same, but for these fields."""
        return type(self)(**{**vars(self), **fields})

    def to_json(self) -> dict[str, Any]:
        """Its fields, in their order."""
        return {
            name.removesuffix("_"): _plain(value)
            for name, value in vars(self).items()
            if name not in self._left_out or value != self._defaults[name]
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """Of any JSON object: what it has more is passed over, and a field without a value of its
        type has its default. Raises Unfit for one that has none.
        """
        values = {}
        for name, read in _readers(cls).items():  # type: ignore[arg-type]  # a class is hashable
            try:
                values[name] = read(found[name.removesuffix("_")])
            except (KeyError, Unfit):
                if cls._defaults[name] is _NEEDED:
                    raise Unfit(f"{cls.__name__}: {name}") from None
        return cls(**values)


def _plain(value: Any) -> Any:
    match value:
        case Record():
            return value.to_json()
        case tuple() | list():
            return [_plain(each) for each in value]
        case dict():
            return {str(key): _plain(each) for key, each in value.items()}
    return value


@functools.cache
def _readers(cls: Any) -> dict[str, _Read]:
    return {
        name: _reads(hint, each.__module__)
        for each in reversed(cls.__mro__)
        for name, hint in vars(each).get("__annotations__", {}).items()
        if name in cls._defaults
    }


@functools.cache
def _reads(hint: str, module: str) -> _Read:
    """Once for all fields of that type: evaluating all of each class takes 0.2 ms a class."""
    holder = SimpleNamespace(__annotations__={"it": hint})
    return _reader(get_type_hints(holder, vars(sys.modules[module]))["it"])


def _reader(hint: Any) -> _Read:
    """What makes a value of type `hint` of a JSON value, or raises Unfit."""
    arguments = get_args(hint)
    match get_origin(hint) or hint:
        case origin if origin is UnionType:
            (some,) = (each for each in arguments if each is not NoneType)
            read = _reader(some)
            return lambda value: None if value is None else read(value)
        case origin if origin is tuple:
            return _tuples(_reader(arguments[0]))
        case origin if origin is Mapping:
            return _mappings(int if arguments[0] is int else str, _reader(arguments[1]))
        case origin if isinstance(origin, type) and issubclass(origin, Record):
            return lambda value: origin.from_json(_of(dict, value))
        case origin if origin is int or origin is float:
            return lambda value: _number(origin, value)
        case origin if origin is bool or origin is str:
            return lambda value: _of(origin, value)
    return lambda value: value


def _of(kind: type[T], value: object) -> T:
    if not isinstance(value, kind):
        raise Unfit
    return value


def _number(kind: type[int | float], value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        raise Unfit
    return kind(value)


def _tuples(read: _Read) -> _Read:
    """Of a list; what in it is of another type is left out."""

    def reader(value: object) -> tuple[Any, ...]:
        found = []
        for each in _of(list, value):
            try:
                found.append(read(each))
            except Unfit:
                continue
        return tuple(found)

    return reader


def _mappings(key: Callable[[Any], Any], read: _Read) -> _Read:
    """Of an object; what in it is of another type is left out."""

    def reader(value: object) -> dict[Any, Any]:
        found = {}
        for name, each in _of(dict, value).items():
            try:
                found[key(name)] = read(each)
            except ValueError:  # Unfit is one
                continue
        return found

    return reader
