"""One line of the doctor's answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Line:
    """A check's outcome; `remedy` says what would do where it is not ok."""

    check: str
    state: State
    text: str
    remedy: str = ""
    host: str = ""


def ok(check: str, text: str) -> Line:
    """All is well."""
    return Line(check, "ok", text)


def warn(check: str, text: str, remedy: str) -> Line:
    """It will run, and be the worse for it."""
    return Line(check, "warn", text, remedy)


def fail(check: str, text: str, remedy: str) -> Line:
    """It will not run."""
    return Line(check, "fail", text, remedy)
