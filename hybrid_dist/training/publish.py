"""What a phase and a run leave behind: the best weights, predictions, the final model."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hybrid_dist.checkpoint import MANIFEST, Damaged, Found, inspect
from hybrid_dist.errors import UserError
from hybrid_dist.files import read_object, sync, write_atomic

PREDICTIONS = "predictions_val.csv"
BEST = "best.safetensors"
KEYS = ("step", "metrics", "temperature", "source", "sha256")
"""What model.json says of the best that it is."""


def phase_folder(run: Path, phase: str) -> Path:
    """Where a phase's best goes."""
    return run / f"phase_{phase}"


def checkpoint_name(phase: str, step: int) -> str:
    """What a checkpoint's folder is called."""
    return f"{phase}-{step}"


def checkpoint_phase(name: str) -> str:
    """The phase that a checkpoint's name begins with."""
    return name.rpartition("-")[0]


def publish_best(run: Path, newest: Found, tick: Callable[[], None] = lambda: None, verify: bool = False) -> None:
    """Make `phase_NAME/` from the checkpoint of the phase's best, as the newest one knows it; rank 0 alone.

    Everything comes from that checkpoint's files, and best.json, which says that the rest is there, is written last.
    So a run that is cut off on the way, or finds the disk full, does it again later, and no rank has to send its
    weights to another. Nothing is done where it is out already, or the checkpoint is gone because it was.

    Args:
        tick: Called as it moves.
        verify: Read what is out already, and make it again if it is not what was written.
    """
    phase, step = newest.state["phase"], newest.state["best_step"]
    checkpoint = newest.path.parent / checkpoint_name(phase, step) if step is not None else None
    if checkpoint is None or not (checkpoint / MANIFEST).exists():
        return
    source = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    folder = phase_folder(run, phase)
    if read_object(folder / "best.json").get("source") == source and not (verify and _best_differs(folder)):
        return
    try:
        best = newest if checkpoint == newest.path else inspect(checkpoint)
    except Damaged:
        return
    folder.mkdir(exist_ok=True)
    shapes = {name: torch.Size(shape) for name, shape in sorted(best.state["shapes"].items())}  # as in a file
    partial = folder / f".{BEST}.partial"
    written = best.reader().write_weights(partial, shapes, tick)
    partial.replace(folder / BEST)
    write_atomic(folder / PREDICTIONS, (checkpoint / PREDICTIONS).read_text(encoding="utf-8"))
    facts = {"phase": phase, "step": step, "score": best.state["best_score"], "metrics": best.state["best_metrics"]}
    facts["temperature"] = best.state["best_temperature"]
    # Not the step alone: after going back behind a damaged checkpoint, the same step is made a second time.
    facts |= {"source": source, "sha256": written["sha256"]}
    write_atomic(folder / "best.json", json.dumps(facts, indent=1) + "\n")
    sync(folder)  # before the checkpoint that it comes from may go


def best_is_there(run: Path, phase: str, step: int) -> bool:
    """Whether a phase's best, which is of `step`, is out and what was written."""
    try:
        find_best(run, phase, step)
    except UserError:
        return False
    return True


def best_step(run: Path, phase: str) -> int | None:
    """The step whose weights are out as the phase's best."""
    found: int | None = read_object(phase_folder(run, phase) / "best.json").get("step")
    return found


def find_best(run: Path, phase: str, step: int | None) -> Path:
    """The weights of a finished phase's best, which is of `step`.

    Raises:
        UserError: they are gone, or not what was written.
    """
    folder = phase_folder(run, phase)
    problem = _best_differs(folder)
    if problem is None and best_step(run, phase) != step:
        problem = f"it is of step {best_step(run, phase)}, and the best is of step {step}"
    if problem is not None:
        raise UserError(f"{folder / BEST}: {problem}; its checkpoint is gone, so only --fresh or a copy of it would do")
    return folder / BEST


def _best_differs(folder: Path) -> str | None:
    """What is wrong with a phase's best; None if it is what was written."""
    try:
        found = _sum_of(folder / BEST)
    except OSError as error:
        return f"it can't be read ({error.strerror})"
    same = found == read_object(folder / "best.json").get("sha256")
    return None if same else "it is not what best.json beside it says (SHA-256)"


def _sum_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def publish_model(run: Path, phase: str, step: int | None, facts: dict[str, Any]) -> None:
    """`model/`: the last phase's best weights and, in model.json, all that it takes to use them.

    Args:
        facts: From `describe_model`.

    Raises:
        UserError: the best is not what was written.
    """
    best = {key: read_object(phase_folder(run, phase) / "best.json").get(key) for key in KEYS}
    folder, partial = run / "model", run / ".model.partial"
    if read_object(folder / "model.json").get("source") == best["source"]:
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    shutil.copyfile(find_best(run, phase, step), partial / "model.safetensors")
    if _sum_of(partial / "model.safetensors") != best["sha256"]:
        raise UserError(f"{partial / 'model.safetensors'} is not what was copied there; is the disk all right?")
    sync(partial / "model.safetensors")
    described = {**facts, "phase": phase, **best}
    write_atomic(partial / "model.json", json.dumps(described, indent=1, ensure_ascii=False) + "\n")
    sync(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    sync(run)
