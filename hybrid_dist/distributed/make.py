"""Choose the engine that the launch asked for."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from hybrid_dist.config import TrainConfig
from hybrid_dist.distributed.engine import Engine
from hybrid_dist.distributed.launch import Topology
from hybrid_dist.distributed.plain import PlainEngine
from hybrid_dist.machine import give_back_freed_memory, keep_freed_memory
from hybrid_dist.model.on_cpu import hasten


def make_engine(
    topology: Topology,
    model: nn.Module,
    groups: list[dict[str, Any]],
    train: TrainConfig,
    micro_batch: int,
    accumulation: int,
) -> Engine:
    """Put `model` with AdamW over `groups` (as `param_groups` gives them) on the topology.

    The model's weights have to be right by now: ZeRO takes its fp32 master copies from them, and their mean, if
    `train.ema` asks for one, begins there. AdamW is fused: one pass over memory instead of several, and a step that can
    be left out on the device.

    Args:
        micro_batch: Samples that each process takes at a time.
        accumulation: Micro batches in a step.
    """
    if topology.device.type == "cpu":
        hasten(model)
    options: dict[str, Any] = {"lr": 0.0, "betas": train.betas, "weight_decay": train.weight_decay}
    engine: Engine
    if topology.accelerator.distributed_type != DistributedType.DEEPSPEED:
        if topology.device.type == "cpu":  # DeepSpeed's steps are no faster for it, and their peak is higher
            keep_freed_memory()
        model.to(topology.device)
        engine = PlainEngine(topology, model, torch.optim.AdamW(groups, fused=True, **options), train.clip_norm)
    else:
        from hybrid_dist.distributed.zero import ZeroEngine, configure, offloads_optimizer

        offloads = offloads_optimizer(configure(topology, model, train, micro_batch, accumulation))
        optimizer = _for_deepspeed(groups, options, train, offloads)
        engine = ZeroEngine(topology, model, optimizer, train.clip_norm)
        give_back_freed_memory()  # at stage 3 the whole model lay here before it was split
    if train.ema is not None:
        engine.keep_average()
    return engine


def _for_deepspeed(
    groups: list[dict[str, Any]], options: dict[str, Any], train: TrainConfig, offloads: bool
) -> torch.optim.Optimizer:
    if offloads:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    # A scaler hands scaled gradients to a fused optimizer. At ZeRO 0, where clipping comes last, they would be clipped
    # as if they were not.
    return torch.optim.AdamW(groups, fused=train.precision != "fp16", **options)
