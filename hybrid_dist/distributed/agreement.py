"""What one rank finds wrong is told to all, and all leave together: none is left waiting in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from hybrid_dist.distributed.launch import Place
from hybrid_dist.errors import UserError

T = TypeVar("T")


def agree(place: Place, check: Callable[[], T]) -> T:
    """Run `check` on every rank; if it fails on any, it fails on all, with the first rank's message.

    No collective in `check`: a rank that fails before it leaves the others waiting there.
    """
    result, message = None, None
    try:
        result = check()
    except UserError as error:
        message = str(error)
    found = [text for text in place.control.to_all(message) if text is not None]
    if found:
        raise UserError(found[0], shared=True)
    return cast(T, result)


def decide(place: Place, check: Callable[[], T]) -> T:
    """Run `check` on rank 0 alone, for all: what others see of a shared disk may be old. Its error is theirs too."""
    result, message = None, None
    if place.is_main:
        try:
            result = check()
        except UserError as error:
            message = str(error)
    result, message = place.control.from_main((result, message))
    if message is not None:
        raise UserError(message, shared=True)
    return cast(T, result)
