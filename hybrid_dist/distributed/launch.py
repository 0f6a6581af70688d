"""Launch facts: what `accelerate launch`, `torchrun` or plain `python` started, and on which device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from hybrid_dist.distributed.control import Control
from hybrid_dist.errors import UserError

LEAST_PATIENCE = timedelta(minutes=30)
MOST_PATIENCE = timedelta(days=1)
"""How long a collective waits for the other ranks: the watch, which says more, is to be quicker."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among the others."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    control: Control

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Topology(Place):
    """A place in training, with what Accelerate makes of the launch."""

    label: str
    accelerator: Accelerator


def meet() -> Place:
    """Join the other processes, if there are any, for work that needs nothing of each other but facts.

    Each holds a whole model: whatever launch file started them, no engine takes it apart.
    """
    rank, world_size, local_rank = (int(os.environ.get(key, default)) for key, default in _LAUNCHED)
    if world_size > 1:
        dist.init_process_group("gloo", timeout=MOST_PATIENCE)
    device = torch.device("cuda", local_rank) if _has_cuda() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    control = Control(rank, world_size, MOST_PATIENCE)
    return Place(rank, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device, control)


_LAUNCHED = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def _has_cuda() -> bool:
    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")
    return torch.cuda.is_available() and not asked_for_cpu


def start(precision: str, stall_timeout: float | None) -> Topology:
    """Join the other processes, if there are any, and choose the device.

    Args:
        precision: `fp32`, `bf16` or `fp16`, as in `train.precision`.
        stall_timeout: Seconds, as in `train.stall_timeout`.

    Raises:
        UserError: the device can't do the precision.
    """
    has_cuda = _has_cuda()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    _check_precision(precision, has_cuda)
    patience = _patience(stall_timeout)
    group = InitProcessGroupKwargs(backend=None if has_cuda else "gloo", timeout=patience)
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if _under_launcher():
        handlers.append(group)
    if deepspeed and not has_cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    accelerator = Accelerator(
        # Without a GPU accelerate must hear that the CPU is meant; but told so, it leaves DeepSpeed out.
        cpu=not has_cuda and not deepspeed,
        # DeepSpeed does its own autocast (see zero.py): a second one around it is an error.
        mixed_precision="no" if deepspeed or precision == "fp32" else precision,
        kwargs_handlers=handlers,
    )
    if precision == "fp16" and deepspeed and accelerator.state.deepspeed_plugin.zero_stage > 0:
        # Its loss scale and its clipping don't know of each other: gradients come out 65,536 times too small.
        raise UserError(
            "train.precision: DeepSpeed's fp16 autocast is wrong at ZeRO 1 to 3; bf16, fp32, or DDP would do"
        )
    return Topology(
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        device=accelerator.device,
        label=_label(accelerator),
        accelerator=accelerator,
        control=Control(accelerator.process_index, accelerator.num_processes, patience),
    )


def _patience(stall_timeout: float | None) -> timedelta:
    if stall_timeout is None:
        return MOST_PATIENCE
    return max(LEAST_PATIENCE, timedelta(seconds=min(2 * stall_timeout, MOST_PATIENCE.total_seconds())))


def _under_launcher() -> bool:
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def _check_precision(precision: str, has_cuda: bool) -> None:
    if precision == "fp16" and not has_cuda:
        raise UserError("train.precision: fp16 needs a GPU for its loss scaler; bf16 or fp32 would do on this machine")
    if precision == "bf16" and has_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise UserError(f"train.precision: {name} can't do bf16; fp16 or fp32 would do on this machine")


def _label(accelerator: Accelerator) -> str:
    processes = accelerator.num_processes
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        offload = ", offload" if plugin.hf_ds_config.is_offload() else ""
        kind = f"ZeRO {plugin.zero_stage}{offload}"
    else:
        kind = "DDP" if processes > 1 else "one process"
    return (
        f"{kind} × {processes} on {accelerator.device.type}"
        if processes > 1
        else f"{kind} on {accelerator.device.type}"
    )


def leave() -> None:
    """Part from the other processes; safe to call twice."""
    if dist.is_initialized():
        dist.destroy_process_group()
