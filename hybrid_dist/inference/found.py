"""Where a model lies: in a run's folder, finished or not, or in one that was exported."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_dist.config import Config, load_config
from hybrid_dist.errors import UserError
from hybrid_dist.training.description import DESCRIPTION, Description, parse_description, read_json
from hybrid_dist.training.publish import KEYS, best_step, find_best, phase_folder

WEIGHTS, MODEL_JSON = "model.safetensors", "model.json"
OTHERS = {"model.onnx": "ONNX, for onnxruntime", "model.pt2": "torch.export, for torch.export.load"}
"""Exports that are for others to load."""


@dataclass(frozen=True)
class FoundModel:
    """A model's two files, the description read and checked, the weights not yet."""

    folder: Path
    """As it was asked for."""
    weights: Path
    source: Path
    """What the description was read from, for messages."""
    description: Description
    config: Config | None = None
    """The run's; an export has none."""
    note: str = ""
    """What whoever uses it should hear."""


def find_model(folder: Path | str) -> FoundModel:
    """Find a run's final model (its newest phase's best where it is not finished), or an exported one.

    Raises:
        UserError: there is none, or its description is not as it must be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; a run's, or one that hybrid-dist export made, would do")
    if (folder / "config.yaml").is_file():
        return _in_run(folder)
    if (folder / MODEL_JSON).is_file():
        return _in_folder(folder, folder)
    raise UserError(
        f"{folder} is neither a run's folder (it has no config.yaml) nor an exported model's (it has no {MODEL_JSON})"
    )


def _in_folder(folder: Path, asked: Path, config: Config | None = None) -> FoundModel:
    source = folder / MODEL_JSON
    description = parse_description(read_json(source), str(source))
    weights = folder / WEIGHTS
    if not weights.is_file():
        other = next((f"{name} is {what}" for name, what in OTHERS.items() if (folder / name).is_file()), "")
        raise UserError(
            f"{folder} has no {WEIGHTS}"
            + (f": {other}; a run, or an export with --format safetensors, would do here" if other else "")
        )
    if description.sha256 is not None and _sum_of(weights) != description.sha256:
        raise UserError(f"{weights} is not the file that {MODEL_JSON} beside it was written for (SHA-256)")
    return FoundModel(asked, weights, source, description, config)


def _in_run(run: Path) -> FoundModel:
    config = load_config(run / "config.yaml")
    if (run / "model" / MODEL_JSON).is_file():
        return _in_folder(run / "model", run, config)
    for phase in reversed(config.phases):
        step = best_step(run, phase.name)
        if step is None:
            continue
        weights = find_best(run, phase.name, step)
        source = run / DESCRIPTION
        values = {**read_json(source), **_of_best(run, phase.name)}
        architecture = values.get("architecture")
        if isinstance(architecture, dict):  # what is wrong with another one is said below
            architecture["image_size"] = config.size(phase)
        note = f"{run} is not finished: this is the best so far of its phase {phase.name}, of step {step}"
        return FoundModel(run, weights, source, parse_description(values, str(source)), config, note)
    raise UserError(f"{run} has no model yet: it has not come to the end of an epoch")


def _of_best(run: Path, phase: str) -> dict[str, Any]:
    best = read_json(phase_folder(run, phase) / "best.json")
    return {key: best[key] for key in ("phase", *KEYS) if key in best}


def _sum_of(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}") from None
