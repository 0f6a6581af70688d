"""What the trace on fake tensors tells of a micro batch, beside torch on real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid_dist.config import Config, load_config
from hybrid_dist.model.hybrid import build_model
from hybrid_dist.plan.activations import timeline, trace
from hybrid_dist.plan.fake import FakeModel

CLASSES = {"type": 3, "airline": 2}


@pytest.fixture
def config(tiny_config: Callable[..., Path]) -> Config:
    return load_config(tiny_config(train={"precision": "bf16"}))


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[int, int]]:
    """Within it, address and bytes of each storage that autograd keeps, but for the model's own."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def losses(fake: FakeModel, outputs: dict[str, Tensor], device: str) -> Tensor:
    parts = []
    for task in fake.tasks:
        labels = fake.config.tasks[task.name].kind == "classification"
        count = len(outputs[task.name])
        target = torch.zeros(count, dtype=torch.int64 if labels else torch.float32, device=device)
        parts.append(task.losses(outputs[task.name], target).sum())
    return torch.stack(parts).sum()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_bytes_are_those_of_a_real_run(config: Config, precision: str) -> None:
    """Catches: a storage counted twice or not at all, parameters counted, a frozen branch that leaves a graph."""
    fake = FakeModel(config, CLASSES)
    real = build_model(config.model, config.tasks, CLASSES, config.data.image_size, 0, load=False)
    planned = []
    for phase in config.phases:
        fake.train(phase)
        planned.append(trace(fake, 3, precision, "cpu", uncast_linear=False).saved)
        real.set_trainable(phase.trainable)
        real.train()
        with counting(real) as found:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                outputs = real(torch.zeros(3, 3, 96, 96, dtype=torch.uint8))
            loss = losses(fake, outputs, "cpu")
        # On the CPU a layer norm in bf16 keeps its statistics in fp32, fake tensors keep them in bf16: 2 bytes of a
        # token, beside 2 for each of at least 12 channels.
        assert planned[-1] == pytest.approx(sum(found.values()), rel=0.0 if precision == "fp32" else 0.02), phase.name
        del loss
    assert planned[0] < planned[1] / 50 < planned[2] / 50


@pytest.mark.parametrize("uncast_linear", [False, True])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_affine_in_the_micro_batch(config: Config, device: str, uncast_linear: bool) -> None:
    """Catches: a micro batch whose memory is not on the line through the two that were run, at any operation."""
    fake = FakeModel(config, CLASSES)
    for phase in config.phases[::2]:
        fake.train(phase)
        line = timeline(fake, "bf16", device, uncast_linear)
        third = trace(fake, 7, "bf16", device, uncast_linear)
        assert (line.live(7) == third.live).all()
        assert line.saved(7) == third.saved
        trained = {index for index, parameter in enumerate(fake.model.parameters()) if parameter.requires_grad}
        assert {index for _, index in third.gradients} == trained
        assert third.live[-1] - 7 * 3 * 96 * 96 < 1000, "the pictures stay, and a few labels"


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch knows no CUDA")
@pytest.mark.parametrize("fusion", ["attention", "gated"])
def test_a_gpu_keeps_what_cuda_autocast_makes(config: Config, fusion: str, tmp_path: Path) -> None:
    """Catches: planning a GPU by the CPU's autocast, which leaves in bf16 what CUDA's makes fp32."""
    config = load_config(tmp_path / "config.yaml", ["train.precision=bf16", f"model.fusion={fusion}"])
    fake = FakeModel(config, CLASSES)
    fake.train(config.phases[-1])
    planned = trace(fake, 3, "bf16", "cuda", uncast_linear=False).saved
    on_the_cpu = trace(fake, 3, "bf16", "cpu", uncast_linear=False).saved
    with fake.mode:
        to_cuda(fake.model)
        fake.train(config.phases[-1])
        with counting(fake.model) as found, cuda_autocast():
            outputs = fake.model(torch.empty(3, 3, 96, 96, dtype=torch.uint8, device="cuda"))
    assert planned == pytest.approx(sum(found.values()), rel=0.001)
    assert on_the_cpu < 0.95 * planned
    assert outputs


def to_cuda(model: nn.Module) -> None:
    """Every tensor as a fake one on a GPU, which needs not be there."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, device="cuda")))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))


@contextmanager
def cuda_autocast() -> Iterator[Any]:
    """`torch.autocast` itself turns off where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
