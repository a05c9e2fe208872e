"""How to write a part. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Compress: TypeAlias = Literal["auto", "fast", "small", "off"]


@dataclass(frozen=True)
class SaveOptions:
    """`timeout` seconds bound one save; a part needs at most `keyframe_every` older ones."""

    compress: Compress = "auto"
    keyframe_every: int = 8
    timeout: float = 600.0
