"""What the leaves of a tree say of their tensors; see tree.py."""

from __future__ import annotations

from collections.abc import Iterator

from autoglm_resume.checkpoint.format.document import Json
from autoglm_resume.checkpoint.state.sharding import Sharding


def device_leaves(tree: Json) -> dict[str, str]:
    """Name to device type of the tensors in `tree` that were not on the CPU."""
    return {name: str(leaf["device"]) for name, leaf in leaves(tree) if "device" in leaf}


def sharded_leaves(tree: Json) -> dict[str, Sharding]:
    """Name to sharding of the DTensors in `tree`. Raises CorruptCheckpoint."""
    return {name: Sharding.from_json(leaf) for name, leaf in leaves(tree) if "$dtensor" in leaf}


def leaves(tree: Json) -> Iterator[tuple[str, dict[str, Json]]]:
    """Of all tensors, by name."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack += node
        elif isinstance(node, dict):
            name = node.get("$tensor", node.get("$dtensor"))
            if isinstance(name, str):
                yield name, node
            else:
                stack += node.values()
