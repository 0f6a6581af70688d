"""What a phase and a run leave behind: the best weights, predictions, the final model."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hybrid_dist.checkpoint import MANIFEST, Damaged, Found, inspect, write_atomic
from hybrid_dist.config import Config
from hybrid_dist.data.labels import ClassMap
from hybrid_dist.errors import UserError

PREDICTIONS = "predictions_val.csv"


def phase_folder(run: Path, phase: str) -> Path:
    """Where a phase's best goes."""
    return run / f"phase_{phase}"


def checkpoint_name(phase: str, step: int) -> str:
    """What a checkpoint's folder is called."""
    return f"{phase}-{step}"


def publish_best(run: Path, newest: Found, tick: Callable[[], None] = lambda: None) -> None:
    """Make `phase_NAME/` from the checkpoint of the phase's best, as the newest one knows it; rank 0 alone.

    Everything comes from that checkpoint's files, and best.json, which says that the rest is there, is written last.
    So a run that is cut off on the way, or finds the disk full, does it again later, and no rank has to send its
    weights to another. Nothing is done where it is out already, or the checkpoint is gone because it was.
    """
    phase, step = newest.state["phase"], newest.state["best_step"]
    checkpoint = newest.path.parent / checkpoint_name(phase, step) if step is not None else None
    if checkpoint is None or not (checkpoint / MANIFEST).exists():
        return
    source = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    folder = phase_folder(run, phase)
    if _value_in(folder / "best.json", "source") == source:
        return
    try:
        best = newest if checkpoint == newest.path else inspect(checkpoint)
    except Damaged:
        return
    folder.mkdir(exist_ok=True)
    shapes = {name: torch.Size(shape) for name, shape in best.state["shapes"].items()}
    partial = folder / ".best.safetensors.partial"
    written = best.reader().write_weights(partial, shapes, tick)
    partial.replace(folder / "best.safetensors")
    write_atomic(folder / PREDICTIONS, (checkpoint / PREDICTIONS).read_text(encoding="utf-8"))
    facts = {"phase": phase, "step": step, "score": best.state["best_score"], "metrics": best.state["best_metrics"]}
    # Not the step alone: after going back behind a damaged checkpoint, the same step is made a second time.
    facts |= {"source": source, "sha256": written["sha256"]}
    write_atomic(folder / "best.json", json.dumps(facts, indent=1) + "\n")


def find_best(run: Path, phase: str) -> Path:
    """The weights of a finished phase's best.

    Raises:
        UserError: they are gone, or not what was written.
    """
    file = phase_folder(run, phase) / "best.safetensors"
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file} can't be read ({error.strerror}); --fresh would start over") from None
    if found != _value_in(file.with_name("best.json"), "sha256"):
        raise UserError(f"{file} is not what best.json beside it says (SHA-256); --fresh would start over")
    return file


def _value_in(file: Path, key: str) -> Any:
    """A value of a file of JSON; None where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def publish_model(run: Path, phase: str, facts: dict[str, Any]) -> None:
    """`model/`: the last phase's best weights and, in model.json, all that it takes to use them."""
    best = json.loads((phase_folder(run, phase) / "best.json").read_text(encoding="utf-8"))
    folder, partial = run / "model", run / ".model.partial"
    if _value_in(folder / "model.json", "source") == best["source"]:
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    shutil.copyfile(phase_folder(run, phase) / "best.safetensors", partial / "model.safetensors")
    described = {"format": "hybrid-dist/1", **facts, "phase": phase}
    described |= {key: best[key] for key in ("step", "metrics", "source")}
    write_atomic(partial / "model.json", json.dumps(described, indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def describe_model(config: Config, class_maps: Mapping[str, ClassMap]) -> dict[str, Any]:
    """model.json: architecture, tasks, label names and preprocessing."""
    values = config.model_dump(mode="json")
    return {
        "architecture": {**values["model"], "image_size": config.data.image_size},
        "tasks": values["tasks"],
        "labels": {name: found.to_json() for name, found in class_maps.items()},
    }
