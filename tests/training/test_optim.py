"""Groups that cover what trains exactly once, and a schedule that is a function of the step alone."""

from __future__ import annotations

import math

import pytest
import torch
from timm.optim import param_groups_layer_decay

from hybrid_dist.config import BranchConfig, ModelConfig, PhaseConfig, TaskConfig
from hybrid_dist.errors import UserError
from hybrid_dist.model.hybrid import Hybrid, build_model
from hybrid_dist.training.optim import learning_rate, param_groups, peak_rates


@pytest.fixture(scope="module")
def model() -> Hybrid:
    config = ModelConfig(
        cnn=BranchConfig(
            name="convnext_tiny", weights="scratch", kwargs={"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}
        ),
        transformer=BranchConfig(
            name="swin_tiny_patch4_window7_224",
            weights="scratch",
            kwargs={"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 3},
        ),
        fusion="cross_attention",
        allow_scratch=True,
    )
    tasks = {
        "type": TaskConfig(kind="classification", column="typename"),
        "clarity": TaskConfig(kind="regression", column="clarity"),
    }
    return build_model(config, tasks, {"type": 5}, 96, 0)


@pytest.mark.parametrize("rules", [["heads"], ["heads", "fusion", "transformer"], ["all"], ["cnn.*stages.1*", "heads"]])
def test_groups_partition_what_trains(model, rules):
    """Catches a trainable parameter left out or stepped twice, a frozen one decayed, and names out of line."""
    model.set_trainable(rules)
    groups = param_groups(model, 0.05)
    named = dict(model.named_parameters())
    listed = [name for group in groups for name in group["names"]]
    assert sorted(listed) == sorted(name for name, p in named.items() if p.requires_grad)
    for group in groups:
        assert group["params"] and len(group["params"]) == len(group["names"])
        assert all(named[name] is p for name, p in zip(group["names"], group["params"], strict=True))
        assert {name.partition(".")[0] for name in group["names"]} == {group["part"]}
    keys = [(group["part"], group["weight_decay"]) for group in groups]
    assert len(keys) == len(set(keys))


def test_only_maps_decay(model):
    """Catches decay on norms, biases, layer scale and position tables, or none on the weights."""
    model.set_trainable(["all"])
    groups = param_groups(model, 0.05)
    decayed = {name for group in groups if group["weight_decay"] == 0.05 for name in group["names"]}
    spared = {name for group in groups if group["weight_decay"] == 0.0 for name in group["names"]}
    assert "cnn.net.stem.0.weight" in decayed and "transformer.net.layers.1.downsample.reduction.weight" in decayed
    assert "heads.task_type.linear.weight" in decayed and "fusion.first.query.weight" in decayed
    assert "transformer.net.layers.0.blocks.0.attn.relative_position_bias_table" in spared
    for ending in ("bias", "gamma", "norm.weight", "norm1.weight", "norm_asked.weight"):
        matching = {name for name in decayed | spared if name.endswith(ending)}
        assert matching and matching <= spared, ending
    assert len(decayed) + len(spared) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "exempt"),
    [
        ("test_vit", ["pos_embed", "cls_token"]),
        ("swinv2_tiny_window8_256", ["layers.0.blocks.0.attn.cpb_mlp.0.weight", "layers.0.blocks.0.attn.logit_scale"]),
    ],
)
def test_tables_and_what_timm_exempts_are_spared(name, exempt):
    """Catches (1, N, C) tables decayed because they have more than one axis, and timm's own list ignored."""
    config = ModelConfig(cnn=None, transformer=BranchConfig(name=name))
    with torch.device("meta"):
        model = build_model(config, {"s": TaskConfig(kind="regression", column="s")}, {}, 256, 0, load=False)
    spared = {name for group in param_groups(model, 0.1) if group["weight_decay"] == 0 for name in group["names"]}
    assert {f"transformer.net.{entry}" for entry in exempt} <= spared


def test_rates_of_layers_are_timms(model):
    """Catches layers counted from the wrong end or without the frozen ones, and one part at the rate of another."""
    lr = {"heads": 1e-3, "fusion": 5e-4, "cnn": 2e-4, "transformer": 1e-4}
    phase = PhaseConfig(name="c", trainable=["all"], steps=1, lr=lr, layer_decay=0.7)
    model.set_trainable(["all"])
    peaks = peak_rates(model, phase)
    expected = {name: lr[name.partition(".")[0]] for name in peaks}
    for part, branch in model.branches().items():
        names = {id(parameter): f"{part}.net.{name}" for name, parameter in branch.net.named_parameters()}
        for group in param_groups_layer_decay(branch.net, layer_decay=0.7):
            expected.update({names[id(p)]: lr[part] * group["lr_scale"] for p in group["params"]})
    assert peaks == pytest.approx(expected, rel=1e-12)
    assert len(set(peaks.values())) > 12
    groups = param_groups(model, 0.05, peaks=peaks)
    for group in groups:
        assert [peaks[name] for name in group["names"]] == pytest.approx(
            [1e-3 * group["lr_scale"]] * len(group["names"])
        )
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    model.set_trainable(["cnn.*stages.1*"])
    lower = peak_rates(model, phase)
    assert lower == {name: peaks[name] for name in lower} and len(lower) > 4, "the depth is the backbone's"
    assert max(group["lr_scale"] for group in param_groups(model, 0.05, peaks=lower)) == 1.0


def test_a_part_without_a_rate_is_named(model):
    """Catches a part that trains at some other part's rate, or not at all."""
    model.set_trainable(["heads", "fusion", "cnn.*stages.1*"])
    rates = {"heads": 1e-3, "transformer": 1e-4}
    with pytest.raises(UserError, match=r"^lr: no rate for cnn and fusion.*one number"):
        peak_rates(model, PhaseConfig(name="a", trainable=["heads"], steps=1, lr=rates))


def test_rate_at_chosen_steps():
    """Catches an off-by-one in the warm-up, a first or last step at rate 0, and an end above 0."""
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(2.0 / 11) and rates[9] == pytest.approx(20.0 / 11) and rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90))
    assert rates[99] > 0 and rates[100] == 0
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    ("step", "total", "fraction", "expected"),
    [(0, 1, 0.0, 1.0), (0, 1, 1.0, 0.5), (0, 7, 0.05, 1.0), (3, 4, 1.0, 0.8), (4, 4, 1.0, 0.0)],
)
def test_rate_of_short_phases(step, total, fraction, expected):
    """Catches a division by zero in phases of a few steps."""
    assert learning_rate(step, total, 1.0, fraction) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "total", "fraction"), [(-1, 5, 0.1), (6, 5, 0.1), (0, 0, 0.1), (0, 5, 1.5)])
def test_rate_outside_the_phase_is_refused(step, total, fraction):
    """Catches a loop that runs past its phase unnoticed."""
    with pytest.raises(ValueError, match="no rate"):
        learning_rate(step, total, 1.0, fraction)
