"""Files that are whole or absent, and stay so when the power goes."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomic(path: Path, text: str, writer: str = "") -> None:
    """Write a text file whole or not at all; processes that may do so at the same time give each a `writer`."""
    beside = path.with_name(f".{path.name}{writer}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)  # a full disk takes half of it


def sync(path: Path) -> None:
    """Have the system put a file's bytes, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
