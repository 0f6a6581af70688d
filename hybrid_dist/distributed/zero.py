"""DeepSpeed, stages 0 to 3, with and without offload, through Accelerate."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_dist.config import TrainConfig
from hybrid_dist.distributed.engine import Engine, OptimizerSlice, Piece, not_finite, set_rate
from hybrid_dist.distributed.launch import Topology
from hybrid_dist.distributed.spans import OPTIMIZER, span
from hybrid_dist.distributed.tuning import fill_in, tuned


def configure(
    topology: Topology, model: nn.Module, train: TrainConfig, micro_batch: int, accumulation: int
) -> dict[str, Any]:
    """Write what the run's config and the model fix into the launch file's DeepSpeed config, and return that."""
    # DeepSpeed 0.19 calls what torch 2.14 has renamed; that says it again at every collective.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    plugin = topology.accelerator.state.deepspeed_plugin
    config: dict[str, Any] = plugin.deepspeed_config
    # One dict for all phases, and each has its own sizes: what the phase before has left there nobody has asked for.
    zero = config["zero_optimization"]
    zero.clear()
    zero.update(copy.deepcopy(topology.zero))
    trainable = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in model.parameters())
    cuda = topology.device.type == "cuda"
    fill_in(zero, tuned(plugin.zero_stage, trainable, total), cuda)
    config.update(
        train_micro_batch_size_per_gpu=micro_batch,
        gradient_accumulation_steps=accumulation,
        train_batch_size=micro_batch * accumulation * topology.world_size,
        # At stage 0 DeepSpeed would clip without telling the norm: there it is done in ZeroEngine.
        gradient_clipping=train.clip_norm if plugin.zero_stage > 0 else 0.0,
        steps_per_print=None,
        # The right optimizer for offload is made in make.py; accelerate's own mapping would drop its betas.
        zero_force_ds_cpu_optimizer=False,
        zero_allow_untested_optimizer=True,
    )
    # Accelerate warns, and lets DeepSpeed win, when the two differ.
    topology.accelerator.gradient_accumulation_steps = accumulation
    for section in ("bf16", "fp16"):
        config.pop(section, None)
    if train.precision != "fp32":
        # Ordinary autocast over fp32 parameters. "bf16": {"enabled": true} would cast the whole module, which timm's
        # Swin does not survive.
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[train.precision]
        config["torch_autocast"] = {"enabled": True, "dtype": dtype}
    return config


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether optimizer state lives in host memory."""
    return (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none") != "none"


class ZeroEngine(Engine):
    """A DeepSpeed engine. What requires a gradient is fixed when it is made: a phase has its own."""

    def __init__(self, topology: Topology, model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float):
        self.topology = topology
        self.accelerator = topology.accelerator
        self.model = model
        self.engine, self.prepared = self.accelerator.prepare(model, optimizer)
        self.zero = self.engine.optimizer
        self.group = self.engine.seq_data_parallel_group
        self.stage = self.engine.zero_optimization_stage()
        self.clip_norm = clip_norm
        self.norm: Tensor | None = None
        self.engine.step = functools.partial(self._step, self.engine.step)
        if self.stage == 0:
            self.trainable = [p for p in model.parameters() if p.requires_grad]
            self.zero.register_step_pre_hook(self._clip)
        else:
            self.zero._update_scale = functools.partial(self._look, self.zero._update_scale)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.zero if self.stage == 0 else self.zero.optimizer

    def forward(self, images: Tensor, **known: Any) -> dict[str, Tensor]:
        return self.engine(images, **known)

    def accumulating(self, last: bool) -> Any:
        # DeepSpeed looks at the boundary in the forward pass already.
        self.engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.accelerator.sync_gradients = last
        # DeepSpeed takes the mean over ranks; the loss is a share of a sum over ranks and micro batches.
        self.accelerator.backward(loss * self.topology.world_size, scale_wrt_gas=False)

    def step(self) -> None:
        """Nothing: `backward` of the last micro batch has made the step."""

    def _step(self, step: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """DeepSpeed's, which Accelerate calls within its backward: who measures the parts is to tell them apart."""
        with span(OPTIMIZER):
            if self.stage == 0:
                self._spoil(self.trainable)
            else:
                self._ask()
            step(*arguments, **options)

    def _look(self, update_scale: Callable[[bool], None], overflow: bool) -> None:
        """Where ZeRO 1 to 3 decide, after they have looked at the gradients themselves, whether to leave a step out."""
        if self.bad is not None and self.bad:
            self.zero.overflow = overflow = True
        update_scale(overflow)

    def _clip(self, *_: Any) -> None:
        """Before a stage 0 optimizer's step: gradients are reduced and unscaled by now."""
        self.norm = nn.utils.clip_grad_norm_(self.trainable, self.clip_norm)
        if self._scaler() is None:
            self.optimizer.found_inf = not_finite(self.norm)  # type: ignore[attr-defined]

    def left_out(self) -> Tensor:
        if self._scaler() is not None:
            return self._bad_losses()
        if self.stage == 0:
            assert self.norm is not None
            return not_finite(self.norm)
        # DeepSpeed has looked, and left the step out if so, on all ranks. Filled on the device: nothing is copied.
        return torch.full((), float(self.zero.overflow), device=self.topology.device)

    def grad_norm(self) -> float:
        norm = self.norm if self.stage == 0 else self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    def set_lr(self, lr: float) -> None:
        set_rate(self.zero, lr)

    def slices(self) -> Iterator[OptimizerSlice]:
        find = {0: self._slice_whole, 1: self._slice_flat, 2: self._slice_flat, 3: self._slice_partition}[self.stage]
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                part = find(name, parameter)
                if part is not None:
                    yield part

    def _slice_whole(self, name: str, parameter: Any) -> OptimizerSlice:
        return OptimizerSlice(name, 0, parameter.numel(), parameter, 0)

    def _slice_flat(self, name: str, parameter: Any) -> OptimizerSlice | None:
        """ZeRO 1 and 2: each rank keeps a contiguous part of every group's flat parameters."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        key = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        return OptimizerSlice(name, inside.start, inside.numel, key, flat.start)

    def _slice_partition(self, name: str, parameter: Any) -> OptimizerSlice | None:
        """ZeRO 3: each rank keeps an equal part of every parameter, the last one padded."""
        group, offset, padded = self.zero.grad_position[self.zero.get_param_id(parameter)]
        start = self.topology.rank * padded
        numel = min(padded, parameter.ds_numel - start)
        key = self.zero.fp32_partitioned_groups_flat[group]
        return OptimizerSlice(name, start, numel, key, offset) if numel > 0 else None

    def pieces(self) -> Iterator[Piece]:
        world, rank = self.topology.world_size, self.topology.rank
        if self.stage > 0:
            yield from map(self._piece, self.slices())
        for index, (name, parameter) in enumerate(self.model.named_parameters()):
            if parameter.requires_grad and self.stage > 0:
                continue
            if self.stage == 3:
                piece = self._frozen_partition(name, parameter)
                if piece is not None:
                    yield piece
            elif index % world == rank:
                yield self._piece(self._slice_whole(name, parameter))

    def _frozen_partition(self, name: str, parameter: Any) -> Piece | None:
        padded = parameter.ds_tensor.ds_numel
        start = self.topology.rank * padded
        numel = min(padded, parameter.ds_numel - start)
        if numel <= 0:
            return None
        return Piece(name, start, {"weight": parameter.ds_tensor.detach().reshape(-1)[:numel]}, None)

    def _fresh_state(self, key: Tensor, step: int) -> dict[str, Any]:
        state = super()._fresh_state(key, step)
        if type(self.optimizer).__name__ == "DeepSpeedCPUAdam":
            state["step"] = step
        return state

    def extra_state(self) -> dict[str, Any]:
        scaler = self._scaler()
        return {"scaler": scaler.state_dict()} if scaler is not None else {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        scaler = self._scaler()
        if scaler is not None and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])

    def _scaler(self) -> Any:
        if self.stage == 0:
            return self.engine.torch_autocast_z0_gradscaler
        return getattr(self.zero, "torch_autocast_gradscaler", None)

    def _spread(self) -> None:
        if self.stage in (1, 2):
            self.zero.update_lp_params()
        elif self.stage == 3:
            # As DeepSpeed does after a step. What is gathered, above all the small ones that stay so, is stale.
            self.zero._partition_all_parameters()
            for group in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            persistent = self.zero.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)

    def close(self) -> None:
        # Destroys DeepSpeed's engine, hooks and buffers with it.
        self.accelerator.free_memory()
        self.trainable, self.average = [], None
        if self.stage == 3:
            _forget_modules()
        # They lead back here from what only the garbage collector will find.
        vars(self.engine).pop("step", None)
        vars(self.zero).pop("_update_scale", None)
        del self.engine, self.prepared, self.zero, self.model


def _forget_modules() -> None:
    """Empty what DeepSpeed keeps of ZeRO 3's modules for ever, and with them all that it holds of their weights and
    their moments, beside the next phase's: a stack with the model at its bottom, and a cache of a method's calls."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    for method in vars(PartitionedParameterCoordinator).values():
        wrapped = [cell.cell_contents for cell in getattr(method, "__closure__", None) or ()]
        for function in (method, *wrapped):
            if hasattr(function, "cache_clear"):
                function.cache_clear()
