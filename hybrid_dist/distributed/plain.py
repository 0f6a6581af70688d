"""One process and DDP: every rank holds everything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_dist.distributed.engine import Engine, OptimizerSlice, Piece, not_finite, set_rate
from hybrid_dist.distributed.launch import Topology


class PlainEngine(Engine):
    """Accelerate's DDP, or no wrapper at all with one process."""

    def __init__(self, topology: Topology, model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float):
        self.accelerator = topology.accelerator
        self.topology = topology
        self.clip_norm = clip_norm
        self.model = model
        # A launcher's environment may say otherwise, and Accelerate would divide each gradient by it.
        self.accelerator.gradient_accumulation_steps = 1
        if self.accelerator.scaler is not None:
            # Accelerate makes one for the process; a phase begins with a fresh one, in one job or in three.
            self.accelerator.scaler = torch.amp.GradScaler(topology.device.type)
        self.wrapped, self.prepared = self.accelerator.prepare(model, optimizer)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.norm: Tensor | None = None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.prepared.optimizer

    def forward(self, images: Tensor, **known: Any) -> dict[str, Tensor]:
        # Outside of training there is nothing to synchronise: DDP's wrapper would only add to the cost.
        return self.wrapped(images, **known) if torch.is_grad_enabled() else self.model(images, **known)

    def accumulating(self, last: bool) -> Any:
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.accelerator.sync_gradients = last
        # DDP takes the mean over ranks; the loss is a share of a sum.
        self.accelerator.backward(loss * self.topology.world_size)

    def step(self) -> None:
        self._spoil(self.trainable)
        self.norm = self.accelerator.clip_grad_norm_(self.trainable, self.clip_norm)
        if self.accelerator.scaler is None:
            assert self.norm is not None
            # A fused step looks at this on the device, as it does for a scaler, and changes nothing where it is set.
            self.optimizer.found_inf = not_finite(self.norm)  # type: ignore[attr-defined]
        self.prepared.step()
        self.prepared.zero_grad()

    def left_out(self) -> Tensor:
        if self.accelerator.scaler is not None or self.norm is None:
            return self._bad_losses()
        return not_finite(self.norm)

    def grad_norm(self) -> float:
        return float(self.norm) if self.norm is not None else 0.0

    def set_lr(self, lr: float) -> None:
        set_rate(self.optimizer, lr)

    def slices(self) -> Iterator[OptimizerSlice]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield OptimizerSlice(name, 0, parameter.numel(), parameter, 0)

    def pieces(self) -> Iterator[Piece]:
        world, rank = self.topology.world_size, self.topology.rank
        for index, (name, parameter) in enumerate(self.model.named_parameters()):
            if index % world == rank:
                yield self._piece(OptimizerSlice(name, 0, parameter.numel(), parameter, 0))

    def extra_state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {"scaler": scaler.state_dict()} if scaler is not None else {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _spread(self) -> None:
        """Nothing: they are the model's own, on every rank."""

    def close(self) -> None:
        self.trainable = []
        self.wrapped, self.prepared, self.model = self.accelerator.free_memory(self.wrapped, self.prepared, self.model)
