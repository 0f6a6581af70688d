"""Checkpoint folders: whole or absent, summed, newest first, pruned. Files only; `saver` brings the ranks together.

Order of a save: every rank writes into a folder with a hidden name; rank 0 writes the state and, last, the manifest
with all sums; the folder gets its name; only then older ones go. A folder without a manifest, or one whose files do not
have the manifest's sums, is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hybrid_dist.checkpoint.portable import PieceReader
from hybrid_dist.files import read_object, sync, write_atomic

FORMAT = "hybrid-dist/1"
STATE, MANIFEST = "state.json", "manifest.json"


class Damaged(Exception):
    """A folder is not a checkpoint that can be gone on from; says why."""


@dataclass(frozen=True)
class Found:
    """A checkpoint: its folder, its state as plain values, its tensor files."""

    path: Path
    state: dict[str, Any]
    shards: list[Path]

    def reader(self) -> PieceReader:
        """Its tensors."""
        return PieceReader(self.shards)


class Store:
    """A run's `checkpoints/` folder."""

    def __init__(self, folder: Path, keep: int, phases: Collection[str]):
        """`phases`: of the run; what is not called after one of them and a step is never pruned."""
        self.folder, self.keep, self.phases = folder, keep, phases
        self._skipped: set[Path] = set()

    def begin(self, name: str) -> Path:
        """An empty folder for checkpoint `name` that nobody takes for one; every attempt gets its own.

        A rank that outlives its run must not write into the next one's.
        """
        for left in self.folder.glob(f".{name}.*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        partial = self.folder / f".{name}.{os.getpid()}-{time.time_ns():x}.partial"
        partial.mkdir(parents=True)
        return partial

    def commit(
        self, partial: Path, name: str, state: dict[str, Any], files: dict[str, str], sums: dict[str, Any]
    ) -> Path:
        """Make `partial`, with the shards that `sums` lists, the checkpoint `name`.

        Args:
            state: Plain values.
            files: More text files by name.
        """
        manifest = dict(sums)
        for file, text in {**files, STATE: json.dumps(state, indent=1, sort_keys=True)}.items():
            data = text.encode()
            (partial / file).write_bytes(data)
            sync(partial / file)
            manifest[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_atomic(partial / MANIFEST, json.dumps({"format": FORMAT, "files": manifest}, indent=1))
        sync(partial)
        final = self.folder / name
        self._skipped.discard(final)
        if final.exists():
            final.replace(self._aside(final))
        partial.replace(final)
        sync(self.folder)
        shutil.rmtree(self._aside(final), ignore_errors=True)
        return final

    def newest(self, accept: Callable[[Found], None], warn: Callable[[str], None]) -> Found | None:
        """The newest checkpoint that is whole and that `accept` does not refuse; the others are named in a warning.

        Args:
            accept: Raises `Damaged` for one that is whole, but not this run's.
        """
        for path in self.candidates():
            try:
                found = inspect(path)
                accept(found)
            except Damaged as reason:
                self._skipped.add(path)
                warn(f"checkpoint {path} is skipped: {reason}")
            else:
                return found
        return None

    def candidates(self) -> list[Path]:
        """Named folders, newest first: by the step in their name, then by the time of their manifest."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        return sorted(found, key=lambda path: (step_of(path), _written(path)), reverse=True)

    def survey(
        self, accept: Callable[[Found], None], tick: Callable[[str], None] = lambda name: None
    ) -> list[dict[str, Any]]:
        """What is known of each candidate, newest first, as plain values; `problem` is None for those that are whole.

        Args:
            accept: As in `newest`.
            tick: Told each name before its sums are made.
        """
        rows: list[dict[str, Any]] = []
        bests: dict[str | None, int | None] = {}
        for path in self.candidates():
            tick(path.name)
            state: dict[str, Any] = {}
            problem = None
            try:
                found = inspect(path)
                state = found.state
                accept(found)
            except Damaged as reason:
                problem = str(reason)
            try:
                size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
            except FileNotFoundError:
                continue  # pruned meanwhile by a run that goes on
            facts = {key: state.get(key) for key in ("phase", "step", "phase_step", "finished", "topology")}
            # The newest of a phase knows its best.
            best_step = bests.setdefault(facts["phase"], state.get("best_step")) if problem is None else None
            best = best_step is not None and best_step == state.get("step")
            rows.append(
                {"name": path.name, **facts, "best": best, "bytes": size, "written": _written(path), "problem": problem}
            )
        return rows

    def sweep(self) -> None:
        """Clear away what saves that were cut off have left; while nothing is being saved."""
        for aside in self.folder.glob(".*.old"):
            name = aside.name.removeprefix(".").removesuffix(".old")
            # Cut off between two renames: what was there before is still the newest that is whole.
            if not (self.folder / name).exists() and (aside / MANIFEST).exists():
                aside.replace(self.folder / name)
        for pattern in (".*.partial", ".*.old", ".*.doomed"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def prune(self, newest: Path, spare: Collection[str] = ()) -> None:
        """Remove what is older than the newest `keep`, but for those called in `spare`."""
        for path in self._older(newest)[self.keep - 1 :]:
            if path.name in spare:
                continue
            self._remove(path)

    def _remove(self, path: Path) -> None:
        # Renamed first: a deletion that is cut short must not leave something that looks like a checkpoint.
        doomed = path.with_name(f".{path.name}.doomed")
        shutil.rmtree(doomed, ignore_errors=True)
        path.replace(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def newest_name(self, test: Callable[[dict[str, Any]], bool]) -> str | None:
        """The newest that says so of itself, unchecked; None where there is none."""
        return next((path.name for path in self.candidates() if test(read_object(path / STATE))), None)

    def drop_after(self, step: int) -> None:
        """Remove what has been made after `step`: it is to be made once more."""
        for path in self.candidates():
            if path.name.rpartition("-")[0] in self.phases and step_of(path) > step:
                self._remove(path)

    def kept(self, newest: Path) -> list[str]:
        """The names that `prune` leaves in any case."""
        return [newest.name, *(path.name for path in self._older(newest)[: self.keep - 1])]

    def _older(self, newest: Path) -> list[Path]:
        """Newest first; but what was found to be damaged takes no whole one's place."""
        candidates = [path for path in self.candidates() if path.name.rpartition("-")[0] in self.phases]
        older = [path for path in candidates if 0 <= step_of(path) < step_of(newest)]
        return sorted(older, key=lambda path: path in self._skipped)

    def _aside(self, final: Path) -> Path:
        return final.with_name(f".{final.name}.old")


def inspect(path: Path) -> Found:
    """The checkpoint in `path`, with every byte of it checked.

    Raises:
        Damaged: it is not whole.
    """
    files = _manifest(path)
    for name in files:
        if Path(name).name != name:
            raise Damaged(f"its {MANIFEST} names a file outside of the folder: {name!r}")
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing leaves Python's lock alone
        problems = list(pool.map(lambda name: _differs(path / name, files[name]), files))
    for name, problem in zip(files, problems, strict=True):
        if problem:
            raise Damaged(f"{name} {problem}")
    if STATE not in files:
        raise Damaged(f"its {MANIFEST} lists no {STATE}")
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        found = Found(path, state, [path / name for name in sorted(files) if name.startswith("shard-")])
        gap = found.reader().missing(state["shapes"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"it can't be read ({type(error).__name__}: {error})") from None
    if gap is not None:
        raise Damaged(f"its shards do not hold all of {gap}")
    return found


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest's files, each with its facts."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        found = manifest["format"]
    except FileNotFoundError:
        raise Damaged(f"it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"its {MANIFEST} can't be read ({type(error).__name__})") from None
    if found != FORMAT:
        raise Damaged(f"its format is {found!r}, this version reads {FORMAT!r}")
    return files


def _differs(path: Path, facts: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            return f"has {size} bytes, not {facts['bytes']}"
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == facts["sha256"]
        return None if same else "does not have its SHA-256 sum"
    except FileNotFoundError:
        return "is missing"
    except (OSError, KeyError, TypeError) as error:
        return f"can't be checked ({type(error).__name__})"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 if there is none."""
    step = path.name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1


def _written(path: Path) -> float:
    try:
        return (path / MANIFEST).stat().st_mtime
    except OSError:
        return 0.0
