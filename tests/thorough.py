"""What is tested only by `scripts/test --thorough`; a whole test: `@pytest.mark.thorough`."""

from __future__ import annotations

from typing import Any

import pytest


def thorough(*values: Any) -> list[Any]:
    """Values of a parameter."""
    return [pytest.param(value, marks=pytest.mark.thorough) for value in values]
