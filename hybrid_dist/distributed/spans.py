"""Names for the parts of an optimizer step, for whoever measures them; while nobody does they cost nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

DATA, FORWARD, BACKWARD, OPTIMIZER = PARTS = ("data", "forward", "backward", "optimizer")
"""Where one stands within another, as the update within ZeRO's backward, the later in this list is meant."""

_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
_open: Callable[[str], contextlib.AbstractContextManager[Any]] | None = None


def span(part: str) -> contextlib.AbstractContextManager[Any]:
    """A context for one of `PARTS`, in the thread that trains."""
    return _NOTHING if _open is None else _open(part)


@contextlib.contextmanager
def measured(opened: Callable[[str], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """In here each `span` is what `opened` gives for its part."""
    global _open
    before, _open = _open, opened
    try:
        yield
    finally:
        _open = before
