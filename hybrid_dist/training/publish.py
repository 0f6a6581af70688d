"""What a phase and a run leave behind: the best weights, predictions, the final model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hybrid_dist.checkpoint import PieceReader, write_atomic
from hybrid_dist.config import Config
from hybrid_dist.data.labels import ClassMap

PREDICTIONS = "predictions_val.csv"


def phase_folder(run: Path, phase: str) -> Path:
    """Where a phase's best goes."""
    return run / f"phase_{phase}"


def publish_best(run: Path, checkpoint: Path) -> None:
    """Make `phase_NAME/` from a checkpoint if that is the phase's best so far; rank 0 alone.

    Everything comes from the checkpoint's files, and best.json, which says that the rest is there, is written last.
    So a run that is cut off on the way does it again when it starts from that checkpoint, and no rank has to send its
    weights to another.
    """
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    folder = phase_folder(run, state["phase"])
    if state["best_step"] != state["step"] or _step_in(folder / "best.json") == state["step"]:
        return
    folder.mkdir(exist_ok=True)
    reader = PieceReader(sorted(checkpoint.glob("shard-*.safetensors")))
    partial = folder / ".best.safetensors.partial"
    reader.write_weights(partial, {name: torch.Size(shape) for name, shape in state["shapes"].items()})
    partial.replace(folder / "best.safetensors")
    write_atomic(folder / PREDICTIONS, (checkpoint / PREDICTIONS).read_text(encoding="utf-8"))
    facts = {"phase": state["phase"], "step": state["step"]}
    facts |= {"score": state["best_score"], "metrics": state["best_metrics"]}
    write_atomic(folder / "best.json", json.dumps(facts, indent=1) + "\n")


def _step_in(file: Path) -> int | None:
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def publish_model(run: Path, phase: str, facts: dict[str, Any]) -> None:
    """`model/`: the last phase's best weights and, in model.json, all that it takes to use them."""
    best = json.loads((phase_folder(run, phase) / "best.json").read_text(encoding="utf-8"))
    folder, partial = run / "model", run / ".model.partial"
    if _step_in(folder / "model.json") == best["step"]:
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    shutil.copyfile(phase_folder(run, phase) / "best.safetensors", partial / "model.safetensors")
    described = {"format": "hybrid-dist/1", **facts, "phase": phase, "step": best["step"], "metrics": best["metrics"]}
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
