"""Shares of the parameters, and what DeepSpeed is taken to do by itself."""

from __future__ import annotations

import pytest
from ruamel.yaml import YAML

from hybrid_dist.plan import strategies
from hybrid_dist.plan.fake import Parameter
from hybrid_dist.plan.states import shares, states
from hybrid_dist.plan.strategies import ON_THE_CPU, ONE_PROCESS, SEVERAL
from tests.conftest import ROOT

SIZES = [7, 200_000, 120_000, 1, 64, 150_001, 80_000, 30]
GROUPS = [0, 0, 0, 1, 1, 1, 1, None]
TRAINED = SIZES[:3], SIZES[3:7]


def parameters() -> list[Parameter]:
    """Two groups and something frozen."""
    pairs = enumerate(zip(SIZES, GROUPS, strict=True))
    return [Parameter(str(index), numel, group, False) for index, (numel, group) in pairs]


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_shares_cover_everything_once(processes: int) -> None:
    """Catches: elements that no process keeps, or padding that is more than it has to be."""
    flat = [shares(parameters(), 2, processes, rank) for rank in range(processes)]
    whole = [sum(sizes) for sizes in TRAINED]
    for share in flat:
        assert share.groups == tuple(whole)
        for part, count in zip(share.part, whole, strict=True):
            assert count <= part * processes < count + 2 * processes
            assert part % 2 == 0
    assert sum(share.touched for share in flat) >= sum(whole)
    third = shares(parameters(), 3, processes, 0)
    assert third.part == tuple(sum(-(-n // processes) for n in sizes) for sizes in TRAINED)
    assert third.frozen_part == -(-SIZES[7] // processes)


def test_states_by_hand() -> None:
    """Catches: a moment, a master copy or a gradient forgotten; frozen parameters that cost more than weights."""
    trained, frozen = sum(SIZES[:7]), SIZES[7]
    alone = states(ONE_PROCESS, shares(parameters(), 0, 1, 0), parameters(), 1000)
    assert alone.parameters == 4 * (trained + frozen) + 1000
    assert alone.gradients == 4 * trained
    assert alone.optimizer == 8 * trained + 4 * 7
    by_name = {
        strategy.name: states(strategy, shares(parameters(), strategy.stage, 2, 0), parameters(), 0)
        for strategy in SEVERAL
    }
    assert by_name["zero1"].optimizer == by_name["zero2"].optimizer < by_name["ddp"].optimizer
    assert by_name["zero2"].gradients < by_name["zero1"].gradients == by_name["ddp"].gradients
    assert by_name["zero3"].parameters < by_name["zero2"].parameters
    assert by_name["zero2_offload"].optimizer == 0 < by_name["zero2_offload"].host_optimizer
    assert by_name["zero3_offload"].device < by_name["zero3"].device
    for strategy in (ONE_PROCESS, *SEVERAL):
        share = shares(parameters(), strategy.stage, 2, 0)
        without, averaged = (states(strategy, share, parameters(), 0, averages) for averages in (False, True))
        mean = 4 * (trained if strategy.stage == 0 else sum(share.part))
        kept = "host" if strategy.offload_optimizer else "device"
        assert getattr(averaged, kept) == getattr(without, kept) + mean


def test_launch_files_say_the_same() -> None:
    """Catches: a strategy that plans another stage or offload than its launch file starts."""
    for strategy in (ONE_PROCESS, ON_THE_CPU, *SEVERAL):
        path = ROOT / "launch" / "accelerate" / f"{strategy.name}.yaml"
        values = YAML(typ="safe").load(path.read_text())
        zero = values.get("deepspeed_config", {})
        assert zero.get("zero_stage", 0) == strategy.stage
        assert (zero.get("offload_optimizer_device", "none") == "cpu") == strategy.offload_optimizer
        assert (zero.get("offload_param_device", "none") == "cpu") == strategy.offload_parameters


def test_deepspeed_says_the_same() -> None:
    """Catches: a DeepSpeed whose own settings have changed under the plan."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    third = DeepSpeedZeroConfig(stage=3)
    assert third.param_persistence_threshold == strategies.PERSISTENT
    assert third.contiguous_gradients
    assert third.reduce_scatter
    assert not DeepSpeedZeroConfig(stage=2).overlap_comm, "there would be two buckets of each kind"
