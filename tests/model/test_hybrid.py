"""The whole model: what goes in and out, what is frozen, and what its fresh parameters depend on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hybrid_dist.config import PARTS, BranchConfig, ModelConfig, TaskConfig, load_config
from hybrid_dist.errors import UserError
from hybrid_dist.model.fusion import FUSIONS
from hybrid_dist.model.heads import Linear32
from hybrid_dist.model.hybrid import Hybrid, build_model, check_model, describe

CONFIGS = Path(__file__).parents[2] / "configs"
SIZE = 96
CNN = BranchConfig(
    name="convnext_atto",
    weights="scratch",
    kwargs={"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64], "drop_path_rate": 0.5},
)
SWIN = BranchConfig(
    name="swin_tiny_patch4_window7_224",
    weights="scratch",
    kwargs={
        "embed_dim": 24,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 4, 8],
        "window_size": 3,
        "drop_path_rate": 0.5,
    },
)
MODEL = ModelConfig(cnn=CNN, transformer=SWIN, allow_scratch=True)
TASKS = {
    "type": TaskConfig(kind="classification", column="typename"),
    "clarity": TaskConfig(kind="regression", column="clarity"),
}
CLASSES = {"type": 5}


def build(seed: int = 0, tasks: dict[str, TaskConfig] = TASKS, load: bool = True, **changes) -> Hybrid:
    return build_model(MODEL.model_copy(update=changes), tasks, {**CLASSES, "airline": 3}, SIZE, seed, load)


def pictures(count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)


def parameters(model: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.startswith(prefix)}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_answers_features_and_their_shapes():
    """Catches a task called `type` colliding with nn.Module.type, and features that aren't what the heads see."""
    model = build().eval()
    images = pictures()
    with torch.no_grad():
        answers, features = model(images), model.get_features(images)
    assert {name: tuple(value.shape) for name, value in answers.items()} == {"type": (2, 5), "clarity": (2,)}
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "cnn": (2, 64),
        "transformer": (2, 192),
        "fused": (2, 256),
    }
    head = model.heads["task_type"].linear
    torch.testing.assert_close(answers["type"], features["fused"] @ head.weight.T + head.bias)
    assert ((answers["clarity"] > 0) & (answers["clarity"] < 1)).all()
    assert model.to(torch.float32) is model and not [name for name in model.state_dict() if "mean" in name]


def test_regression_head_is_its_formula():
    """Catches a missing ReLU or sigmoid in the score."""
    model = build().eval()
    head, fused = model.heads["task_clarity"], torch.randn(3, 256)
    hidden = (fused @ head.hidden.weight.T + head.hidden.bias).clamp(min=0)
    expected = 1 / (1 + torch.exp(-(hidden @ head.linear.weight.T + head.linear.bias)))
    torch.testing.assert_close(head(fused), expected[:, 0])


def test_every_parameter_belongs_to_exactly_one_part():
    """Catches a parameter that no phase could freeze."""
    model = build(fusion="cross_attention")
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == set(PARTS)
    counts = describe(model)
    assert (
        counts["all"]["total"]
        == sum(p.numel() for p in model.parameters())
        == sum(counts[part]["total"] for part in PARTS)
    )
    model.stray = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="stray"):
        model.set_trainable(["all"])


def test_rules_set_every_parameter():
    """Catches a phase that trains more or less than it says, also after another phase."""
    model = build(fusion="gated")
    names = [name for name, _ in model.named_parameters()]
    fusion_and_heads = {name for name in names if name.startswith(("fusion.", "heads."))}
    for rules, expected in [
        (["heads", "fusion"], fusion_and_heads),
        (["heads", "fusion", "transformer"], {name for name in names if not name.startswith("cnn.")}),
        (["all"], set(names)),
        (["heads", "cnn.*stages.3*"], {name for name in names if name.startswith(("heads.", "cnn.net.stages.3."))}),
    ]:
        model.set_trainable(rules)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
        assert describe(model)["all"]["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert not model.cnn.frozen and model.transformer.frozen


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (["heads", "transfomer"], r"'transfomer' matches nothing.*cnn, transformer, fusion, heads"),
        (["cnn.stages.*"], "matches nothing"),
        (["fusion"], "nothing to train"),
        ([], "nothing to train"),
    ],
)
def test_rules_that_match_nothing_are_refused(rules, words):
    """Catches a phase with a typo that would train for days without its branch."""
    model = build()
    model.set_trainable(["heads"])
    with pytest.raises(UserError, match=words):
        model.set_trainable(rules)
    assert describe(model)["all"]["trainable"] == describe(model)["heads"]["total"]


def test_single_backbone():
    """Catches `transformer: null` breaking the build, and a rule that speaks of the absent branch."""
    model = build(transformer=None, fusion="attention")
    assert model.transformer is None and model.parts() == ["cnn", "fusion", "heads"]
    assert model(pictures())["type"].shape == (2, 5)
    assert torch.equal(model.eval().get_features(pictures())["fused"], model.get_features(pictures())["cnn"])
    model.set_trainable(["heads", "fusion"])
    with pytest.raises(UserError, match=r"'transformer' matches nothing.*cnn, fusion, heads"):
        model.set_trainable(["heads", "transformer"])
    assert build(cnn=None)(pictures())["clarity"].shape == (2,)


def test_frozen_branch_is_still_and_has_no_graph():
    """Catches drop path, dropout or a wasted graph in a branch that doesn't train."""
    model = build()
    model.set_trainable(["heads", "transformer"])
    model.train()
    images = pictures(8)
    graphs = []
    model.cnn.net.stem.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    one, two = (model.cnn(images).pooled for _ in range(2))
    assert graphs == [False, False]
    training = [model.transformer(images).pooled for _ in range(2)]
    assert torch.equal(one, two) and one.grad_fn is None and not one.requires_grad
    assert not torch.equal(*training) and training[0].grad_fn is not None
    assert model.training and not model.cnn.training and not model.cnn.net.training and model.transformer.training
    model.set_trainable(["all"])
    assert model.cnn.net.training and model.cnn(images).pooled.grad_fn is not None
    sum(answer.sum() for answer in model(images).values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_partly_frozen_branch_trains():
    """Catches a branch taken for frozen as soon as something in it is."""
    model = build()
    model.set_trainable(["heads", "transformer.*layers.3*"])
    model(pictures())["type"].sum().backward()
    assert model.transformer.training
    for name, parameter in model.named_parameters():
        trains = name.startswith("transformer.net.layers.3.") or name.startswith("heads.task_type")
        assert (parameter.grad is not None) == trains, name


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
def test_bf16_autocast_trains_and_answers_in_fp32(fusion):
    """Catches Swin's shifted windows or a fusion failing on mixed types, and heads that answer in bf16."""
    model = build(fusion=fusion).train()
    images = pictures()
    with torch.autocast("cpu", torch.bfloat16):
        answers = model(images)
    assert {answer.dtype for answer in answers.values()} == {torch.float32}
    (answers["type"].square().mean() + answers["clarity"].mean()).backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters()
    )
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(images)
    with torch.no_grad():
        high = model(images)
    torch.testing.assert_close(low, high, atol=0.05, rtol=0.05)


def test_linear32_escapes_autocast_and_deepspeeds_list():
    """Catches heads in bf16: by autocast, or by DeepSpeed, which picks modules by their exact class."""
    torch.manual_seed(3)
    linear, x = Linear32(7, 3), torch.randn(4, 7)
    plain = linear(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x), plain)
        assert not torch.equal(nn.functional.linear(x, linear.weight, linear.bias).float(), plain)
    assert type(linear) is not nn.Linear


def test_fresh_parameters_follow_from_the_seed_alone():
    """Catches ranks or reruns that start from different weights."""
    torch.manual_seed(1)
    one = parameters(build(fusion="gated", seed=7))
    torch.manual_seed(2)
    torch.rand(5), random.random()
    state = torch.get_rng_state()
    assert equal(one, parameters(build(fusion="gated", seed=7)))
    assert torch.equal(state, torch.get_rng_state())
    other = parameters(build(fusion="gated", seed=8))
    for part in ("cnn", "transformer", "heads"):
        assert any(not torch.equal(one[name], other[name]) for name in one if name.startswith(part)), part


def test_heads_do_not_depend_on_weights_or_other_tasks(tmp_path):
    """Catches fresh parts that change when a backbone's weights come from elsewhere, or a task is added."""
    fresh = build(fusion="cross_attention")
    lent = {name.removeprefix("cnn.net."): value.contiguous() + 1 for name, value in parameters(fresh, "cnn.").items()}
    save_file(lent, tmp_path / "w.safetensors")
    tasks = {"airline": TaskConfig(kind="classification", column="airlinename"), **TASKS}
    other = build(
        fusion="cross_attention", tasks=tasks, cnn=CNN.model_copy(update={"weights": str(tmp_path / "w.safetensors")})
    )
    assert torch.equal(other.cnn.net.stem[0].weight, lent["stem.0.weight"])
    for prefix in ("fusion.", "transformer.", "heads.task_type", "heads.task_clarity"):
        assert equal(parameters(fresh, prefix), parameters(other, prefix)), prefix
    twins = build(tasks=dict.fromkeys(("clarity", "block"), TASKS["clarity"])).heads
    assert not torch.equal(twins["task_clarity"].linear.weight, twins["task_block"].linear.weight)


def test_resume_builds_without_weights_or_their_policy(tmp_path):
    """Catches a resume that needs the original file, or scratch to be allowed, once more."""
    gone = CNN.model_copy(update={"weights": str(tmp_path / "gone.pth")})
    with pytest.raises(UserError, match="no file or folder"):
        build(cnn=gone)
    assert equal(parameters(build(cnn=gone, load=False)), parameters(build()))
    build(allow_scratch=False, load=False)


def test_check_finds_mistakes_before_anything_is_built(tmp_path):
    """Catches a run's folder made for a config that can't be built."""
    state = torch.get_rng_state()
    check_model(MODEL, SIZE)
    assert torch.equal(state, torch.get_rng_state())
    for change, size, words in [
        ({"fusion": "sum"}, SIZE, "there is no 'sum'"),
        ({"allow_scratch": False}, SIZE, "allow_scratch"),
        ({"cnn": CNN.model_copy(update={"name": "convnextt"})}, SIZE, "model.cnn.name"),
        ({"transformer": SWIN.model_copy(update={"weights": str(tmp_path / "x.pth")})}, SIZE, r"transformer\.weights"),
        ({"transformer": SWIN.model_copy(update={"kwargs": {**SWIN.kwargs, "img_size": 64}})}, SIZE, "its own 64"),
    ]:
        with pytest.raises(UserError, match=words):
            check_model(MODEL.model_copy(update=change), size)
    with pytest.raises(ValueError, match="'type'"):
        build_model(MODEL, TASKS, {}, SIZE, 0)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("small", 100), ("base", 175), ("large", 391), ("stage2_convnext", 88), ("stage4_convnext", 88)],
)
def test_configs_have_the_sizes_that_they_name(name, millions):
    """Catches a config that isn't accepted, names another backbone or a phase's rule that matches nothing."""
    config = load_config(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        model = build_model(
            config.model, config.tasks, {"type": 100, "airline": 60}, config.data.image_size, 0, load=False
        )
    assert describe(model)["all"]["total"] / 1e6 == pytest.approx(millions, rel=0.02)
    for phase in config.phases:
        model.set_trainable(phase.trainable)
    assert describe(model)["all"]["trainable"] == describe(model)["all"]["total"]
    assert [phase.name for phase in config.phases] == (["a", "b", "c"] if model.transformer is not None else ["a", "c"])
