"""Other values for names of a module or a class, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Swap = tuple[Any, str, Any]  # owner, name, value


@contextmanager
def swapped(*swaps: Swap) -> Iterator[None]:
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in swaps]
    for swap in swaps:
        setattr(*swap)
    try:
        yield
    finally:
        for original in before:
            setattr(*original)
