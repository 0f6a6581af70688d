"""What a step has to do and send, by hand, and what follows from it for its time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_dist.config import load_config
from hybrid_dist.errors import UserError
from hybrid_dist.plan import Planner, table
from hybrid_dist.plan.answer import Kept
from hybrid_dist.plan.choose import CLOSE
from hybrid_dist.plan.devices import DEVICES, named, usual
from hybrid_dist.plan.fake import Parameter
from hybrid_dist.plan.gather import GLOO_THREADS, Gatherer
from hybrid_dist.plan.seconds import Machine
from hybrid_dist.plan.strategies import ONE_PROCESS, SEVERAL, buffers
from hybrid_dist.plan.traffic import DDP_BUCKET, traffic
from hybrid_dist.plan.work import Costs, Tally, Unit

CLASSES = {"type": 3, "airline": 2}
DDP, ZERO1, ZERO2, ZERO3, ZERO2_OFFLOAD, ZERO3_OFFLOAD = SEVERAL
PLENTY = 80_000_000_000


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.tally.add(func, args, kwargs or {}, result)
        return result


def count(run: Callable[[], Tensor]) -> tuple[Costs, Costs]:
    """Forward, and backward of its sum."""
    with Counting() as forward:
        result = run().sum()
    with Counting() as backward:
        result.backward()
    return forward.tally.costs(), backward.tally.costs()


def test_flops_by_hand() -> None:
    """Catches: a product counted as one operation, a gradient forgotten, the groups of a convolution taken for none."""
    weight, bias = torch.randn(7, 5, requires_grad=True), torch.randn(7, requires_grad=True)
    forward, backward = count(lambda: F.linear(torch.randn(3, 5), weight, bias))
    assert forward.flops.sum() == 2 * 3 * 5 * 7
    assert backward.flops.sum() == 2 * 3 * 5 * 7, "of the weight alone: the input wants none"

    for groups in (1, 4):
        filters = torch.randn(8, 4 // groups, 3, 3, requires_grad=True)
        pictures = torch.randn(2, 4, 10, 10, requires_grad=True)
        forward, backward = count(partial(F.conv2d, pictures, filters, padding=1, groups=groups))
        once = 2 * (2 * 10 * 10) * 8 * (4 // groups) * 9
        assert (forward.flops.sum(), backward.flops.sum()) == (once, 2 * once)


def test_bytes_by_hand() -> None:
    """Catches: views that cost something, a write or a read forgotten, a tensor read twice that is there once."""
    first, second = torch.randn(100, 10), torch.randn(100, 10)
    for run, moved in (
        (lambda: first.view(10, 100).t()[3:].detach(), 0),
        (lambda: torch.empty(1000), 0),
        (lambda: torch.zeros(1000), 4000),
        (lambda: first + second, 12_000),
        (lambda: first * first, 8000),
        (lambda: first.add_(second), 12_000),
        (lambda: first.to(torch.bfloat16), 6000),
        (lambda: torch.cat([first, second]), 16_000),
        (lambda: first[:1].expand(100, 10) + second, 40 + 8000),
    ):
        with Counting() as counting:
            run()
        # An expanded tensor is told by its storage, in which the whole of `first` lies.
        assert counting.tally.costs().moved.sum() in (moved, moved + 4000 - 40)


def test_units() -> None:
    """Catches: a depthwise convolution, or fp32, put on matrix units."""
    low = torch.randn(4, 4, dtype=torch.bfloat16)
    pictures, filters = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16), torch.randn(4, 1, 3, 3, dtype=torch.bfloat16)
    for run, unit in (
        (lambda: low @ low, Unit.MATRIX),
        (lambda: low.float() @ low.float(), Unit.FP32),
        (lambda: F.conv2d(pictures, filters, groups=4), Unit.FP32),
        (lambda: F.conv2d(pictures, filters.expand(4, 4, 3, 3)), Unit.MATRIX),
    ):
        with Counting() as counting:
            run()
        costs = counting.tally.costs()
        assert costs.unit[np.argmax(costs.flops)] == unit


@pytest.fixture(scope="module")
def config_file(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ruamel.yaml import YAML

    from tests.conftest import tiny_values

    folder = tmp_path_factory.mktemp("time")
    values = tiny_values(tiny_data, folder) | {"train": {"global_batch_size": 64, "precision": "bf16"}}
    YAML().dump(values, folder / "config.yaml")
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def planner(config_file: Path) -> Planner:
    """On 16 GPUs; the tests change memory and machine."""
    return Planner(load_config(config_file), CLASSES, 16, PLENTY, "cuda", MACHINE, 64 * 10)


MACHINE = Machine(named("a100-80"), 8, 100.0, None)


def test_sent_by_hand(planner: Planner) -> None:
    """Catches: a gradient sent that is frozen, a gather forgotten, micro batches not counted where each sends."""
    low, high = 1_000_000, 200_000
    parameters = [
        Parameter("frozen", 500_000, None, True), Parameter("linear", low, 0, True), Parameter("norm", high, 1, False),
    ]  # fmt: skip
    line = planner._timeline(planner.rules["a"], False)
    ring, trained = 3 / 4, low + high
    reduced, updated = 2 * ring * (2 * low + 4 * high), ring * 4 * trained

    def sent(strategy, accumulation: int) -> float:  # type: ignore[no-untyped-def]
        return traffic(strategy, parameters, line, True, 4, accumulation > 1).bytes(accumulation)

    for accumulation in (1, 3):
        assert sent(DDP, accumulation) == 2 * ring * 4 * trained
        assert sent(ZERO1, accumulation) == reduced + updated
        assert sent(ZERO2, accumulation) == sent(ZERO2_OFFLOAD, accumulation) == accumulation * reduced + updated
    assert traffic(ONE_PROCESS, parameters, line, True, 1, False).bytes(5) == 0
    assert traffic(DDP, parameters, line, True, 4, False).last.messages == -(-4 * trained // DDP_BUCKET)
    in_fp32 = traffic(ZERO2, parameters, line, False, 4, False)
    assert in_fp32.bytes(1) == 2 * ring * 4 * trained + updated
    offload = traffic(ZERO2_OFFLOAD, parameters, line, True, 4, False)
    assert (offload.updated, offload.updated_on_host) == (0, trained / 4)
    assert offload.host_backward == offload.host_step == trained


def test_zero3_gathers_frozen_weights_once_and_others_twice(config_file: Path) -> None:
    """Catches: frozen weights that stay at home, or come for a backward that does not pass them."""
    wide = ["model.cnn.kwargs.dims=[16,32,64,512]", "model.transformer.kwargs.embed_dim=96"]
    planner = Planner(load_config(config_file, wide), CLASSES, 4, PLENTY, "cuda", MACHINE, 640)
    parameters = planner._parameters(planner.rules["b"])
    found = planner._traffic(planner.rules["b"], ZERO3, 4, False)

    def ring(chosen: list[Parameter]) -> float:
        return 3 / 4 * sum(parameter.numel * (2 if parameter.low_precision else 4) for parameter in chosen)

    large = [parameter for parameter in parameters if parameter.numel > 100_000]
    trained = [parameter for parameter in large if parameter.trainable]
    assert len(large) > len(trained) > 3
    gathered = found.forward.bytes + found.backward.bytes - ring([p for p in parameters if p.trainable])
    assert ring(large) < gathered <= ring(large) + ring(trained), "what is still there is not gathered again"
    assert found.modules > 50


def test_gloo_holds_what_comes_twice(config_file: Path) -> None:
    """Catches: copies that the CPU's plan forgets, that stay when the buffer has come, or more than threads."""
    wide = ["model.cnn.kwargs.dims=[16,32,64,512]", "model.transformer.kwargs.embed_dim=96"]
    planner = Planner(load_config(config_file, wide), CLASSES, 4, PLENTY, "cpu", MACHINE, 640)
    parameters, line = planner._parameters(planner.rules["b"]), planner._timeline(planner.rules["b"], True)
    sizes = [p.numel for p in parameters if p.trainable], sum(p.numel for p in parameters)
    without, with_copies = (
        Gatherer(parameters, line.trace, buffers(3, *sizes), True, 4, copied) for copied in (False, True)
    )
    series = with_copies.run()
    copies = series - without.run()
    most = sorted(with_copies.sent[0] + with_copies.sent[1])
    assert most[-1] <= copies.max() <= sum(most[-GLOO_THREADS:])
    assert copies.min() == 0 and copies[-1] == 0
    assert np.array_equal(planner.process("b", ZERO3, 16)._gathered(), series), "the CPU's plan has them"


def test_phases_cost_what_they_train(planner: Planner) -> None:
    """Catches: a backward counted through a frozen branch, or none through a trained one."""
    (a, back_a), (b, back_b), (c, back_c) = (
        planner._timeline(planner.rules[phase], False).work.flops_per_sample() for phase in ("a", "b", "c")
    )
    assert a == b == c
    assert back_a < 0.02 * a
    assert 0.2 * a < back_b < back_c
    assert 1.7 * c < back_c < 2 * c, "each product twice, but for the first layer's, whose input wants none"


def test_kept_features(config_file: Path) -> None:
    """Catches: hours in which frozen branches run in all epochs, or in none; a loader waited for that has no pictures
    to load; a cache counted where it has no effect, or where nobody knows how many steps there are."""
    keys = ["phases.0.cache_features=2", "phases.1.cache_features=3"]
    config = load_config(config_file, [*keys, "phases.0.steps=100", "phases.1.steps=40"])
    planner = Planner(config, CLASSES, 16, PLENTY, "cuda", MACHINE, 64 * 10)
    assert planner.kept("a") == Kept(("cnn", "transformer"), 2, 80)
    assert planner.kept("b") == Kept(("cnn",), 3, 10)
    assert planner.kept("c") is None

    def flops(phase: str, *given: str) -> tuple[float, float]:
        return planner._timeline(planner.rules[phase]._replace(given=given), False).work.flops_per_sample()

    (whole, back), (rest, rest_back), (none, _) = flops("b"), flops("b", "cnn"), flops("a", "cnn", "transformer")
    (alone, _) = flops("a", "transformer")
    assert whole - rest == pytest.approx(alone - none), "what the cnn takes"
    assert rest_back == back
    assert none < 0.02 * whole

    def hours(phase: str, **machine: float) -> float:
        planner.machine = dataclasses.replace(MACHINE, **machine)
        found = planner._hours([phase], DDP, 4)
        assert found is not None
        return found

    for phase, first, later, given in (("a", 20, 80, ("cnn", "transformer")), ("b", 30, 10, ("cnn",))):
        slow, fast = (planner._known_pace(phase, DDP, 4, parts).seconds for parts in ((), given))
        assert fast < slow
        assert hours(phase) == pytest.approx((first * slow + later * fast) / 3600)
    waits = 64 / 16 / 3600  # hours a step
    assert hours("a", loader=1.0) == pytest.approx(20 * waits, rel=0.01)
    assert hours("b", loader=1.0) == pytest.approx(40 * waits)
    assert "in the 80 steps after that" in next(table._kept(planner.plan(lambda _: None)))
    for other, pictures in ((["phases.0.steps=20"], 640), ([], None)):
        changed = load_config(config_file, [*keys, *other])
        assert Planner(changed, CLASSES, 16, PLENTY, "cuda", MACHINE, pictures).kept("a") is None


def test_more_is_never_slower(planner: Planner) -> None:
    """Catches: a recommendation that more memory, a faster network or loader makes slower, or that does not fit."""
    phases = list(planner.rules)

    def hours(memory: int = PLENTY, **machine: float) -> float:
        planner.memory, planner.machine = memory, dataclasses.replace(MACHINE, **machine)
        try:
            found = planner.choose(phases)
        finally:
            planner.memory, planner.machine = PLENTY, MACHINE
        if found is None:
            return float("inf")
        assert found.peak <= memory
        assert found.hours is not None
        assert found.gpu_hours == pytest.approx(16 * found.hours)
        return found.hours

    peaks = sorted({row.peak for row in planner._rows(lambda _: None) if row.phase == "c"})
    by_memory = [hours(memory=memory) for memory in (1, *peaks)]
    assert by_memory[0] == float("inf") > by_memory[-1]
    by_network = [hours(network=network) for network in (0.01, 0.1, 1, 10, 100, 1000)]
    for found in (by_memory, by_network):
        assert all(after <= CLOSE * before for before, after in itertools.pairwise(found))
    assert by_network[0] > 2 * by_network[-1]
    by_loader = [hours(loader=rate) for rate in (1, 100, 1e6)]
    assert by_loader[0] == pytest.approx(100 * by_loader[1], rel=0.01), "steps of 64 pictures wait for the loader"
    assert by_loader[2] == hours()
    assert hours(gpus_per_node=16) <= CLOSE * hours()


def test_what_holds_it_up(planner: Planner) -> None:
    """Catches: another limit named than the one that was made the narrowest."""

    def slowest(strategy=DDP, micro_batch: int = 4, device=MACHINE.device, **machine: float) -> str:  # type: ignore[no-untyped-def]
        on = planner.on(16)
        on.machine = dataclasses.replace(MACHINE, device=device, **machine)
        on._passes = on._on_the_device
        found = on.pace("c", strategy, micro_batch)
        assert found is not None
        assert found.seconds == pytest.approx(sum(found.parts.values()))
        assert found.images_per_s == pytest.approx(64 / found.seconds)
        assert 0 < found.mfu < 1
        return found.bottleneck

    assert slowest() == "batch too small"
    assert slowest(network=0.001) == "network"
    assert slowest(loader=1.0) == "loader"
    assert slowest(device=dataclasses.replace(MACHINE.device, low=0.01, fp32=0.01)) == "compute"
    assert slowest(device=dataclasses.replace(MACHINE.device, bandwidth=1)) == "memory bandwidth"
    assert slowest(ZERO2_OFFLOAD, device=dataclasses.replace(MACHINE.device, host=1e-4)) == "offload"


def test_scaling(planner: Planner) -> None:
    """Catches: numbers of GPUs that don't divide the batch, or a row that another plan would not give."""
    found = list(planner._scaling(lambda _: None))
    assert [scale.processes for scale in found] == [1, 2, 4, 8, 16, 32, 64]
    same = next(scale for scale in found if scale.processes == planner.processes)
    assert same.choice == planner.choose(list(planner.rules))
    assert found[0].choice is not None
    assert found[0].choice.launch == "single_gpu"


def test_devices() -> None:
    """Catches: a name twice, a sparse rate, a device taken that has not got the precision."""
    assert len({device.name for device in DEVICES}) == len(DEVICES)
    assert named("H100").low == 989
    assert usual(80, "bf16").name == "a100-80"
    assert usual(16, "bf16").bf16
    assert usual(16, "fp16").name == "t4"
    with pytest.raises(UserError, match="did you mean a100-80"):
        named("a100_80")
    with pytest.raises(UserError, match=r"train\.precision=fp16 would do"):
        named("v100").flops("bf16")
    assert named("v100").flops("fp16") == (125e12, 15.7e12)
    assert named("a100-40").flops("fp32") == (19.5e12, 19.5e12)
