"""Pictures of any size: windows that fit, and tables of positions that mean the same as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resize_rel_pos_bias_table

from hybrid_dist.config import BranchConfig, ModelConfig, TaskConfig
from hybrid_dist.errors import UserError
from hybrid_dist.model.backbones import Backbone, probe, sized_kwargs
from hybrid_dist.model.hybrid import build_model, fit_weights
from hybrid_dist.model.weights import find_weights, load_weights

SIZES = (224, 256, 288, 384)
TABLE = "relative_position_bias_table"
# Swin's own windows and sizes, and one block a stage.
SHALLOW: dict[str, Any] = {"depths": [1, 1, 1, 1], "embed_dim": 24, "num_heads": [1, 2, 4, 8], "drop_path_rate": 0.0}
SWIN = BranchConfig(name="swin_tiny_patch4_window7_224", kwargs=SHALLOW, weights="scratch")
TASKS = {"clarity": TaskConfig(kind="regression", column="clarity")}


def windows(net: Any) -> list[tuple[int, ...]]:
    """Of all blocks; none of them pads its map."""
    blocks = [block for stage in net.layers for block in stage.blocks]
    for block in blocks:
        assert all(side % own == 0 for side, own in zip(block.input_resolution, block.window_size, strict=True))
    return [block.attn.window_size for block in blocks]


def plain(size: int, **more: Any) -> Any:
    """timm's own model."""
    kwargs = {name: tuple(value) if isinstance(value, list) else value for name, value in SHALLOW.items()}
    return timm.create_model(SWIN.name, num_classes=0, img_size=size, **kwargs, **more).eval()


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_base_patch4_window12_384", "convnext_tiny"])
def test_every_size_builds(name: str) -> None:
    """Catches: a window that leaves part of a map to padding, or shows another share of the picture than it did."""
    for size in SIZES:
        config = BranchConfig(name=name, weights="scratch")
        if "convnext" in name:
            assert probe("cnn", config, size) == (768, 768)
            continue
        with torch.device("meta"):
            found = windows(timm.create_model(name, num_classes=0, **sized_kwargs("transformer", config, size)))
        if "window7" in name:
            assert set(found) == {(size // 32, size // 32)}
    assert "window_size" not in sized_kwargs("transformer", BranchConfig(name="swin_base_patch4_window7_224"), 224)


@pytest.mark.parametrize(
    ("kwargs", "size", "expected"),
    [
        ({}, 448, None),  # its own divide every map still
        ({"window_size": 3}, 96, None),
        ({"window_size": 3}, 64, ((4, 4), (4, 4), (4, 4), (3, 3))),
        ({"window_size": [[7, 7], [7, 7], [14, 14], [7, 7]]}, 288, ((8, 8), (6, 6), (18, 18), (9, 9))),
        ({"patch_size": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 6}, 64, ((8, 8), (6, 6))),
        ({"patch_size": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 6}, 128, 8),
    ],
)
def test_windows_that_the_config_names(kwargs: dict[str, Any], size: int, expected: Any) -> None:
    """Catches: a window that fits and is changed all the same; pairs that timm takes for one window's two sides."""
    config = SWIN.model_copy(update={"kwargs": {**SHALLOW, **kwargs}})
    found = sized_kwargs("transformer", config, size)
    assert found.get("window_size") == (kwargs.get("window_size") if expected is None else expected)
    backbone = Backbone("transformer", config, size)
    windows(backbone.net)
    again = sized_kwargs("transformer", config.model_copy(update={"kwargs": found}), size)
    assert again == found, "what an export says of its model builds it"


@pytest.mark.parametrize(("size", "near"), [(112, "96 or 128"), (230, "224 or 256"), (40, "32 or 64")])
def test_sizes_that_no_window_fits(size: int, near: str) -> None:
    """Catches: a size at which rows of pixels or places fall off an edge, or are made up."""
    with pytest.raises(
        UserError, match=rf"model\.transformer: swin.* {size} pixels: .*multiples of 32; {near} would do"
    ):
        Backbone("transformer", SWIN, size)


@pytest.mark.parametrize("size", [256, 288])
def test_pretrained_tables_are_those_of_timm(size: int, tmp_path: Path) -> None:
    """Catches: a table that is cut, or filled from the front; a run's backbone that only its own size can take."""
    torch.manual_seed(1)
    original = plain(224)
    for name, parameter in original.named_parameters():
        if name.endswith(TABLE):  # as smooth as learned ones
            side = torch.linspace(-1, 1, 13)
            parameter.data = (side[:, None] ** 2 + side).flatten()[:, None] * torch.rand(parameter.shape[1])
    state = {name: value.contiguous() for name, value in original.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    (tmp_path / "run/model").mkdir(parents=True)
    save_file({f"transformer.net.{k}": v for k, v in state.items()}, tmp_path / "run/model/model.safetensors")
    images = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    overlay = {"file": str(tmp_path / "w.safetensors"), "num_classes": 0}
    loaded = plain(size, window_size=size // 32, pretrained=True, pretrained_cfg_overlay=overlay)
    original.set_input_size((size, size))
    for weights in ("w.safetensors", "run"):
        config = SWIN.model_copy(update={"weights": str(tmp_path / weights)})
        branch = Backbone("transformer", config, size).eval()
        load_weights("transformer", config, find_weights("transformer", config, allow_scratch=False), branch.net)
        with torch.no_grad():
            pooled = branch(images).pooled
            for net in (loaded, original):
                torch.testing.assert_close(pooled, net(branch.normalise(images)), atol=1e-5, rtol=1e-5)
    before, after = state[f"layers.0.blocks.0.attn.{TABLE}"], branch.net.layers[0].blocks[0].attn
    table, middle = after.relative_position_bias_table.detach(), (2 * size // 32 - 1) ** 2 // 2
    torch.testing.assert_close(table[middle], before[13 * 13 // 2], msg="a place's bias for itself")
    assert before.min() - 0.1 <= table.min() <= table.max() <= before.max() + 0.1


def test_weights_of_another_size() -> None:
    """Catches: a phase of another size that begins with anything else but the weights of the phase before."""
    config = ModelConfig(
        cnn=BranchConfig(name="convnext_atto", kwargs={"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}),
        transformer=SWIN.model_copy(update={"kwargs": {**SHALLOW, "window_size": 3}}),
        allow_scratch=True,
    )
    small, large = (build_model(config, TASKS, {}, size, seed, load=False) for size, seed in ((64, 1), (96, 2)))
    state = small.state_dict()
    fitted = fit_weights(config, state, large)
    for name, value in fitted.items():
        expected = state[name]
        if name.endswith(TABLE):
            attention = large.get_submodule(name.removesuffix(f".{TABLE}"))
            shape = attention.relative_position_bias_table.shape
            expected = resize_rel_pos_bias_table(expected, attention.window_size, shape)
            assert expected.shape == shape != state[name].shape
        assert torch.equal(value, expected), name
    large.load_state_dict(fitted)
    assert all(fit_weights(config, fitted, large)[name] is value for name, value in fitted.items())
