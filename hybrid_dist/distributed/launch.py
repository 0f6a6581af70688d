"""Launch facts: what `accelerate launch`, `torchrun` or plain `python` started, and on which device."""

from __future__ import annotations

import copy
import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from hybrid_dist.distributed.control import Control
from hybrid_dist.distributed.determinism import choose_algorithms
from hybrid_dist.distributed.meeting import choose_interface, connecting, meet, starting_point
from hybrid_dist.errors import UserError
from hybrid_dist.machine import has_bf16

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
    zero: dict[str, Any]
    """What the launch file says of ZeRO; empty without DeepSpeed."""


def join() -> Place:
    """Join the other processes, if there are any, for work that needs nothing of each other but facts.

    Each holds a whole model: whatever launch file started them, no engine takes it apart.

    Raises:
        UserError: there are fewer GPUs than processes; not all ranks have come, or they differ in their versions.
    """
    has_cuda = _has_cuda()
    _meet(has_cuda, _problem("fp32", has_cuda), {})
    control = Control(0, 1)
    if _under_launcher():
        with connecting():
            dist.init_process_group("gloo", timeout=MOST_PATIENCE)
            control = Control(dist.get_rank(), dist.get_world_size(), MOST_PATIENCE)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_cuda else torch.device("cpu")
    if has_cuda:
        torch.cuda.set_device(device)
    return Place(control.rank, control.world_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device, control)


def start(
    precision: str,
    stall_timeout: float | None,
    same: Mapping[str, Any] | None = None,
    deterministic: bool = False,
    compiled: bool = False,
) -> Topology:
    """Join the other processes, if there are any, and choose the device.

    Args:
        precision: `fp32`, `bf16` or `fp16`, as in `train.precision`.
        stall_timeout: Seconds, as in `train.stall_timeout`.
        same: What all ranks must have been started with, by name.
        deterministic: As in `train.deterministic`.
        compiled: As in `train.compile`.

    Raises:
        UserError: the device can't do the precision, or the stage can't be compiled; there are fewer GPUs than
            processes; not all ranks have come, or they differ in their versions, launch file or `same`; the launch
            file contradicts itself.
    """
    choose_algorithms(deterministic)
    has_cuda = _has_cuda()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    _meet(has_cuda, _problem(precision, has_cuda), same or {})
    topology = _accelerate(precision, has_cuda, deepspeed, _patience(stall_timeout))
    if compiled and topology.zero.get("stage") == 3:
        raise UserError(
            "train.compile: under ZeRO 3 DeepSpeed's hooks would be compiled anew for each module, until none is;"
            " false, or ZeRO 2, would do",
            shared=True,
        )
    return topology


def _has_cuda() -> bool:
    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")
    return torch.cuda.is_available() and not asked_for_cpu


def _meet(has_cuda: bool, problem: str | None, same: Mapping[str, Any]) -> None:
    if _under_launcher():
        choose_interface(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        meet({**common_facts(has_cuda), **same}, problem)
    elif problem is not None:
        raise UserError(problem, shared=True)


def _accelerate(precision: str, has_cuda: bool, deepspeed: bool, patience: timedelta) -> Topology:
    group = InitProcessGroupKwargs(backend=None if has_cuda else "gloo", timeout=patience)
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    control = Control(0, 1)
    if _under_launcher():
        handlers.append(group)
        # accelerate would do it, but not without loading DeepSpeed, which may take a minute to compile something.
        with connecting():
            dist.init_process_group("nccl" if has_cuda else "gloo", timeout=patience, **starting_point())
            control = Control(dist.get_rank(), dist.get_world_size(), patience)
            if has_cuda:  # NCCL connects at the first collective
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
                dist.all_reduce(torch.zeros(1, device="cuda"))
                torch.cuda.synchronize()
    if deepspeed and not has_cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        accelerator = Accelerator(
            # Without a GPU accelerate must hear that the CPU is meant; but told so, it leaves DeepSpeed out.
            cpu=not has_cuda and not deepspeed,
            # DeepSpeed does its own autocast (see zero.py): a second one around it is an error.
            mixed_precision="no" if deepspeed or precision == "fp32" else precision,
            kwargs_handlers=handlers,
        )
    except ValueError as error:  # accelerate's, about keys that exclude each other
        raise UserError(f"the launch file: {error}", shared=True) from None
    plugin = accelerator.state.deepspeed_plugin if deepspeed else None
    if precision == "fp16" and plugin is not None and plugin.zero_stage > 0:
        # Its loss scale and its clipping don't know of each other: gradients come out 65,536 times too small.
        raise UserError(
            "train.precision: DeepSpeed's fp16 autocast is wrong at ZeRO 1 to 3; bf16, fp32, or DDP would do",
            shared=True,
        )
    return Topology(
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        device=accelerator.device,
        label=_label(accelerator),
        accelerator=accelerator,
        control=control,
        zero=copy.deepcopy(plugin.deepspeed_config["zero_optimization"]) if plugin is not None else {},
    )


def _patience(stall_timeout: float | None) -> timedelta:
    if stall_timeout is None:
        return MOST_PATIENCE
    return max(LEAST_PATIENCE, timedelta(seconds=min(2 * stall_timeout, MOST_PATIENCE.total_seconds())))


def _under_launcher() -> bool:
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def common_facts(has_cuda: bool) -> dict[str, str]:
    """What has to be the same on all ranks whatever they train."""
    facts = {"Python": platform.python_version(), "device": "cuda" if has_cuda else "cpu"}
    facts |= {name: version(name) for name in ("torch", "accelerate", "deepspeed", "timm")}
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    facts["hybrid-dist's code"] = digest.hexdigest()[:12]
    # How accelerate hands a launch file on.
    for name, value in os.environ.items():
        if not name.startswith(("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_")):
            continue
        facts[name] = hashlib.sha256(Path(value).read_bytes()).hexdigest()[:12] if Path(value).is_file() else value
    return facts


def _problem(precision: str, has_cuda: bool) -> str | None:
    """Why this process can't take part, if so."""
    if precision == "fp16" and not has_cuda:
        return "train.precision: fp16 needs a GPU for its loss scaler; bf16 or fp32 would do on this machine"
    if not has_cuda:
        return None
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > gpus:
        return f"{processes} processes for {gpus} GPUs on this machine; {gpus} a machine would do"
    if precision == "bf16" and not has_bf16(torch.device("cuda")):
        return f"train.precision: {torch.cuda.get_device_name()} can't do bf16; fp16 or fp32 would do on this machine"
    return None


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
    """Part from the other processes; safe to call twice. Another run may begin in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it would keep this one's precision and device
    if dist.is_initialized():
        dist.destroy_process_group()
