"""Checkpoint folders: whole or absent, summed, newest first, pruned.

Order of a save: every rank writes into a folder with a hidden name; rank 0 collects the sums, writes the state and,
last, the manifest; the folder gets its name; only then older ones go. A folder without a manifest, or one whose files
do not have the manifest's sums, is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_dist.distributed.control import Control

FORMAT = "hybrid-dist/1"
STATE, MANIFEST = "state.json", "manifest.json"


@dataclass(frozen=True)
class Found:
    """A checkpoint that has passed its sums."""

    path: Path
    state: dict[str, Any]

    @property
    def shards(self) -> list[Path]:
        """Its tensor files."""
        return sorted(self.path.glob("shard-*.safetensors"))


class Store:
    """A run's `checkpoints/` folder, shared by all ranks."""

    def __init__(self, folder: Path, keep: int, control: Control, warn: Callable[[str], None]):
        self.folder = folder
        self.keep = keep
        self.control = control
        self.warn = warn

    def save(self, name: str, state: dict[str, Any], write: Callable[[Path], None], files: dict[str, str]) -> Path:
        """Write checkpoint `name`; all ranks call it together.

        Args:
            name: Its folder's name, `PHASE-STEP`.
            state: Plain values; only rank 0's are written.
            write: Writes this rank's shard to the path it is given.
            files: More text files by name; only rank 0's are written.
        """
        rank, world = self.control.rank, self.control.world_size
        final, temporary = self.folder / name, self.folder / f".{name}.partial"
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.control.barrier()
        shard = temporary / f"shard-{rank:05d}-of-{world:05d}.safetensors"
        write(shard)
        _sync(shard)
        sums = self.control.to_main({shard.name: _describe(shard)})
        if rank == 0:
            assert sums is not None
            manifest = {file: facts for part in sums for file, facts in part.items()}
            for file, text in {**files, STATE: json.dumps(state, indent=1, sort_keys=True)}.items():
                (temporary / file).write_text(text, encoding="utf-8")
                _sync(temporary / file)
                manifest[file] = _describe(temporary / file)
            write_atomic(temporary / MANIFEST, json.dumps({"format": FORMAT, "files": manifest}, indent=1))
            replaced = final.with_name(f".{name}.old")
            if final.exists():
                final.replace(replaced)
            temporary.replace(final)
            shutil.rmtree(replaced, ignore_errors=True)
            _sync(self.folder)
            self._prune(final)
        self.control.barrier()
        return final

    def newest(self) -> Found | None:
        """The newest checkpoint that passes its sums, the same on every rank; others are named in a warning."""
        name: str | None = None
        if self.control.rank == 0:
            for path in self._candidates():
                problem = verify(path)
                if problem is None:
                    name = path.name
                    break
                self.warn(f"checkpoint {path} is skipped: {problem}")
        name = self.control.from_main(name)
        if name is None:
            return None
        path = self.folder / name
        return Found(path, json.loads((path / STATE).read_text(encoding="utf-8")))

    def _candidates(self) -> list[Path]:
        """Named folders, newest first: by the step in their name, then by the time of their manifest."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        return sorted(found, key=lambda path: (_step_of(path), _written(path)), reverse=True)

    def sweep(self) -> None:
        """Clear away what saves that were cut off have left; rank 0 alone, while nothing is being saved."""
        for pattern in (".*.partial", ".*.old"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def _prune(self, newest: Path) -> None:
        older = [path for path in self._candidates() if _step_of(path) < _step_of(newest)]
        for path in older[max(self.keep - 1, 0) :]:
            # Renamed first: a deletion that is cut short must not leave something that looks like a checkpoint.
            doomed = path.with_name(f".{path.name}.old")
            shutil.rmtree(doomed, ignore_errors=True)
            path.replace(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def verify(path: Path) -> str | None:
    """What is wrong with the checkpoint in `path`; None if it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}, this version reads {FORMAT!r}"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} can't be read ({type(error).__name__})"
    for name, facts in files.items():
        if Path(name).name != name:
            return f"its {MANIFEST} names a file outside of the folder: {name!r}"
        problem = _differs(path / name, facts)
        if problem:
            return f"{name} {problem}"
    return None if STATE in files else f"its {MANIFEST} lists no {STATE}"


def _differs(path: Path, facts: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            return f"has {size} bytes, not {facts['bytes']}"
        return None if _sha256(path) == facts["sha256"] else "does not have its SHA-256 sum"
    except FileNotFoundError:
        return "is missing"
    except (OSError, KeyError, TypeError) as error:
        return f"can't be checked ({type(error).__name__})"


def write_atomic(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    _sync(beside)
    beside.replace(path)


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the system put a file's bytes, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _step_of(path: Path) -> int:
    step = path.name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1


def _written(path: Path) -> float:
    try:
        return (path / MANIFEST).stat().st_mtime
    except OSError:
        return 0.0
