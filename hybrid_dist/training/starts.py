"""starts.jsonl: when, where and on what each phase was begun or gone on with; never cut back."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hybrid_dist.distributed import Topology
from hybrid_dist.files import append_line, read_lines
from hybrid_dist.training.state import TrainState

STARTS = "starts.jsonl"
VERSIONS = ("hybrid-dist", "torch", "timm", "accelerate", "deepspeed", "albumentations")


def note_start(folder: Path, state: TrainState, topology: Topology) -> None:
    """Add a line: the position that training goes on from, the topology, the device, versions. Rank 0 alone."""
    device = topology.device
    facts = {
        "time": time.time(), "phase": state.phase, "step": state.step, "goes_on": state.phase_step > 0,
        "topology": topology.label,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"Python": platform.python_version(), **{name: _version(name) for name in VERSIONS}},
    }  # fmt: skip
    append_line(folder / STARTS, json.dumps(facts))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a clone on PYTHONPATH
        return "unknown"


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """All of them, in order; none where there is no such file."""
    found = []
    for start in read_lines(folder / STARTS):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # somebody else's
            found.append({**start, "time": float(start["time"]), "step": int(start["step"])})
    return found
