"""What a plan says."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_dist.plan.seconds import Pace


@dataclass(frozen=True)
class Row:
    """A phase under a launch file at a micro batch: bytes of the process that needs most."""

    phase: str
    launch: str
    recompute: bool
    """With `train.checkpoint_activations`."""
    micro_batch: int
    accumulation: int
    parameters: int
    gradients: int
    optimizer: int
    ema: int
    """The running mean of the weights, if `train.ema` asks for one."""
    activations: int
    """What autograd keeps from the forward to the backward pass."""
    buckets: int
    """Buffers that gradients are reduced in."""
    workspace: int
    """The allowance for what is not traced."""
    peak: int
    """Of all that at the fullest moment, the workspace with it; not everything above is there at once."""
    fullest: str
    """That moment: forward, backward, reduction or step."""
    host: int
    """Host memory for what is offloaded, and for the copy that a checkpoint is written from."""
    fits: bool
    pace: Pace | None
    """None: the machine isn't known."""
    sent: float
    """Bytes that each process sends to others in an optimizer step."""


@dataclass(frozen=True)
class Choice:
    """A launch file and a micro batch."""

    launch: str
    recompute: bool
    """With `train.checkpoint_activations`."""
    micro_batch: int
    peak: int
    """Bytes, of the phase that needs most."""
    hours: float | None
    """Of all its phases' steps; None: the machine or the number of pictures isn't known."""
    gpu_hours: float | None
    overrides: tuple[str, ...]
    """The `key.path=value` that it takes beside the config."""


@dataclass(frozen=True)
class Kept:
    """What a phase with `cache_features` keeps."""

    branches: tuple[str, ...]
    """Those that are frozen,"""
    views: int
    """of so many views of each picture, an epoch each;"""
    steps: int
    """and those of its steps that come later, in which they do not run."""


@dataclass(frozen=True)
class Scale:
    """The best for all phases in one job on another number of processes."""

    processes: int
    choice: Choice | None
    images_per_s: dict[str, float]
    """By phase; empty where nothing fits."""
    bottleneck: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """What `hybrid-dist plan` tells."""

    processes: int
    memory: int
    """Bytes that each has."""
    precision: str
    global_batch: int
    pictures: int | None
    """Of the training split, as far as it is known."""
    steps: dict[str, int | None]
    """Optimizer steps of each phase; None: they follow from the number of pictures, which isn't known."""
    kept: dict[str, Kept | None]
    """By phase."""
    flops: dict[str, tuple[float, float]]
    """By phase, for a picture: forward and backward."""
    rows: tuple[Row, ...]
    phases: dict[str, Choice | None]
    """The best for each phase as a job of its own; None: nothing fits."""
    run: Choice | None
    """The best for all phases in one job."""
    scaling: tuple[Scale, ...]
    """Empty where the machine isn't known."""
