"""Branches against timm itself, and every way in which their weights may come or be refused."""

from __future__ import annotations

import json
import pickle
import re
import time
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import save_file

from hybrid_dist.config import BranchConfig
from hybrid_dist.errors import UserError
from hybrid_dist.model.backbones import Backbone, probe
from hybrid_dist.model.weights import find_weights, load_weights

SIZE = 96
CNN = BranchConfig(name="convnext_atto", kwargs={"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}, weights="scratch")
SWIN = BranchConfig(
    name="swin_tiny_patch4_window7_224",
    weights="scratch",
    kwargs={"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 3},
)
VIT = BranchConfig(name="test_vit", weights="scratch")
HUB = BranchConfig(name="test_convnext")
HUB_REPO = "models--timm--test_convnext.r160_in1k"


def pictures(count: int = 2, size: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def timm_model(config: BranchConfig, seed: int = 1, classes: int = 7) -> torch.nn.Module:
    """Another timm model of this architecture, with a classifier, as a file on disk would come from."""
    torch.manual_seed(seed)
    kwargs = {name: tuple(value) if isinstance(value, list) else value for name, value in config.kwargs.items()}
    if config is not CNN:
        kwargs.setdefault("img_size", SIZE)
    kwargs = {name: value for name, value in kwargs.items() if not (name == "img_size" and "convnext" in config.name)}
    return timm.create_model(config.name, num_classes=classes, **kwargs).eval()


def loaded(config: BranchConfig, weights: str | Path, part: str = "cnn") -> Backbone:
    """A branch built and filled as `build_model` does."""
    config = config.model_copy(update={"weights": str(weights)})
    source = find_weights(part, config, allow_scratch=False)
    torch.manual_seed(2)
    backbone = Backbone(part, config, SIZE)
    load_weights(part, config, source, backbone.net)
    return backbone


def assert_holds(backbone: Backbone, original: torch.nn.Module) -> None:
    expected = original.state_dict()
    for name, value in backbone.net.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("config", "grid"), [(CNN, 3), (SWIN, 3), (VIT, 6)], ids=["nchw", "nhwc", "tokens"])
def test_branch_equals_timm_on_the_same_normalised_input(config, grid):
    """Catches a wrong normalisation, pooling, norm or layout (NCHW, NHWC, class tokens)."""
    backbone = Backbone("cnn", config, SIZE).eval()
    images = pictures()
    mean, std = (torch.tensor(backbone.net.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        pooled, tokens = backbone(images.contiguous(memory_format=torch.channels_last))
        expected = backbone.net((images / 255.0 - mean) / std)
        everything = backbone.net.forward_features((images / 255.0 - mean) / std)
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
    assert tokens.shape == (2, grid * grid, backbone.token_width)
    if everything.ndim == 4:
        place = everything[:, :, 0, 1] if everything.shape[1] == backbone.token_width else everything[:, 0, 1]
        torch.testing.assert_close(tokens[:, 1], place, atol=1e-5, rtol=1e-5)
    assert pooled.shape == (2, backbone.width)


def test_each_branch_normalises_by_its_own_numbers():
    """Catches one mean and std for both branches."""
    clip = Backbone(
        "cnn",
        CNN.model_copy(
            update={
                "kwargs": {
                    **CNN.kwargs,
                    "pretrained_cfg_overlay": {"mean": [0.5, 0.25, 0.125], "std": [0.5, 0.5, 0.25]},
                }
            }
        ),
        SIZE,
    )
    assert clip.mean.flatten().tolist() == [0.5, 0.25, 0.125] and clip.std.flatten().tolist() == [0.5, 0.5, 0.25]
    assert Backbone("cnn", CNN, SIZE).mean.flatten()[0] == pytest.approx(0.485)


def test_float_pictures_are_refused():
    """Catches pictures normalised twice."""
    with pytest.raises(ValueError, match="uint8"):
        Backbone("cnn", CNN, SIZE)(pictures().float())


def test_batch_norms_never_use_batch_statistics():
    """Catches results that depend on the micro batch."""
    backbone = Backbone("cnn", BranchConfig(name="lcnet_035", weights="scratch"), 64).train()
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    images = pictures(4, 64)
    together = backbone(images).pooled
    apart = torch.cat([backbone(image[None]).pooled for image in images])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in backbone.named_buffers())
    assert backbone.net.training and backbone.width != backbone.token_width  # lcnet widens after pooling


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("convnext_bse", "convnext_base"),
        ("swin_base_patch4_window7_244.ms_in22k", "swin_base_patch4_window7_224.ms_in22k"),
        ("convnext_base.fb_in22k_ft_in1", "convnext_base.fb_in22k_ft_in1k"),
        ("resnet18.nothing_alike", "resnet18.a1_in1k"),
    ],
)
def test_unknown_names_come_with_close_ones(name, near):
    """Catches timm's bare RuntimeError reaching the user."""
    with pytest.raises(UserError, match=rf"model\.cnn\.name.*{re.escape(near)}"):
        probe("cnn", BranchConfig(name=name), 224)


@pytest.mark.parametrize(
    ("config", "size", "words"),
    [
        (CNN.model_copy(update={"kwargs": {"no_such": 1}}), 96, "no_such"),
        (CNN.model_copy(update={"kwargs": {"num_classes": 5}}), 96, "own head"),
        (CNN.model_copy(update={"kwargs": {"pretrained": True}}), 96, "weights"),
        (CNN.model_copy(update={"kwargs": {"in_chans": 1}}), 96, "3 channels"),
        (CNN.model_copy(update={"kwargs": {"global_pool": ""}}), 96, "pooled"),
        (CNN.model_copy(update={"kwargs": {"pretrained_cfg_overlay": {"no_such": 1}}}), 96, "no_such"),
        (SWIN.model_copy(update={"kwargs": {**SWIN.kwargs, "img_size": 96}}), 224, "set data.image_size to its own 96"),
        (BranchConfig(name="test_vit", kwargs={"patch_size": [200, 200]}), 96, "data.image_size"),
    ],
)
def test_bad_arguments_are_the_users_to_fix(config, size, words):
    """Catches a TypeError or AssertionError from inside timm, at build or at the first step."""
    with pytest.raises(UserError, match=words):
        probe("transformer", config, size)


def test_probe_agrees_with_what_is_built_and_kwargs_win():
    """Catches widths guessed wrongly, and an image size that overrides the user's img_size."""
    assert probe("transformer", SWIN, SIZE) == (192, 192)
    own = SWIN.model_copy(update={"kwargs": {**SWIN.kwargs, "img_size": 96, "strict_img_size": False}})
    assert Backbone("transformer", own, 128).net.patch_embed.img_size == (96, 96)
    assert Backbone("transformer", SWIN, 128).net.patch_embed.img_size == (128, 128)


def test_scratch_has_to_be_meant():
    """Catches a run that quietly starts from noise."""
    with pytest.raises(UserError, match=r"model\.allow_scratch: true"):
        find_weights("cnn", CNN, allow_scratch=False)
    assert find_weights("cnn", CNN, allow_scratch=True).file is None


@pytest.mark.parametrize("config", [CNN, SWIN], ids=["convnext", "swin"])
@pytest.mark.parametrize("wrap", ["plain.safetensors", "plain.pth", "state_dict.pt", "model.bin"])
def test_local_files_arrive(tmp_path, config, wrap):
    """Catches weights that are read and not copied, classifiers in the way, wrappers and DDP's prefix not seen."""
    original = timm_model(config)
    kind, _, suffix = wrap.partition(".")
    file = tmp_path / wrap
    state = original.state_dict()
    if suffix == "safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, file)
    elif kind == "plain":
        torch.save({f"module.{name}": value for name, value in state.items()}, file)
    else:
        torch.save({kind: state, "epoch": 3}, file)
    assert_holds(loaded(config, file), original)


def test_original_convnext_files_load(tmp_path):
    """Catches Facebook's own key names not being translated."""
    config = BranchConfig(name="convnext_tiny", kwargs={"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]})
    original = timm_model(config)
    state = {}
    for name, value in original.state_dict().items():
        name = re.sub(r"stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2", name)
        name = re.sub(r"stages\.(\d)\.blocks", r"stages.\1", name)
        for ours, theirs in [
            ("stem.", "downsample_layers.0."),
            ("conv_dw", "dwconv"),
            ("mlp.fc", "pwconv"),
            ("head.norm", "norm"),
            ("head.fc", "head"),
        ]:
            name = name.replace(ours, theirs)
        state[name] = value
    torch.save({"model": state}, tmp_path / "fb.pth")
    assert_holds(loaded(config, tmp_path / "fb.pth"), original)


def test_original_swin_files_load(tmp_path):
    """Catches Microsoft's key names, whose downsampling ends a stage where timm's begins the next."""
    original = timm_model(SWIN)
    state = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.long)}
    for name, value in original.state_dict().items():
        name = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        state[name.replace("head.fc", "head")] = value
    torch.save({"model": state}, tmp_path / "ms.pth")
    assert_holds(loaded(SWIN, tmp_path / "ms.pth", "transformer"), original)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    """Catches torch.load without weights_only."""
    marker = tmp_path / "ran"
    torch.save({"state_dict": {"stem.0.weight": Bomb(marker)}}, tmp_path / "bad.pth")
    (tmp_path / "old.bin").write_bytes(pickle.dumps(Bomb(marker), protocol=2))
    for name in ("bad.pth", "old.bin"):
        with pytest.raises(UserError, match=r"run code.*safetensors"):
            loaded(CNN, tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("stem.0.weight"), r"1 missing \(stem\.0\.weight\)"),
        (lambda s: s.update({"stem.0.bias": torch.zeros(9)}), r"stem\.0\.bias is \(9,\), not \(8,\)"),
        (lambda s: s.update({"stages.3.blocks.1.gamma": torch.zeros(64)}), r"doesn't have \(stages\.3\.blocks\.1\.gam"),
    ],
)
def test_files_of_another_backbone_are_refused(tmp_path, change, words):
    """Catches a partly filled backbone: the rest would be noise."""
    state = timm_model(CNN).state_dict()
    change(state)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=words):
        loaded(CNN, tmp_path / "w.safetensors")


def test_files_that_are_no_weights_are_refused(tmp_path):
    """Catches tracebacks for broken, empty, foreign and absent files."""
    (tmp_path / "broken.safetensors").write_bytes(b"\x07")
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    torch.save(timm_model(SWIN).state_dict(), tmp_path / "swin.pth")
    (tmp_path / "w.npz").touch()
    for name, words in [
        ("broken.safetensors", "can't be loaded"),
        ("text.pth", "can't be loaded"),
        ("other.pth", "epoch are no tensors"),
        ("swin.pth", "doesn't hold the weights of convnext"),
        ("w.npz", "isn't one of"),
        ("absent.pth", "no file or folder"),
    ]:
        with pytest.raises(UserError, match=words):
            loaded(CNN, tmp_path / name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache, and a hub that nobody answers at."""
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def fill(hub: Path, repo: str, state: dict[str, torch.Tensor]) -> None:
    """What the hub's client leaves in its cache."""
    snapshot = hub / repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (hub / repo / "refs").mkdir()
    (hub / repo / "refs" / "main").write_text("abc")
    save_file({name: value.contiguous() for name, value in state.items()}, snapshot / "model.safetensors")


def test_hub_weights_come_from_the_cache(hub):
    """Catches a cache that is only used online, or loaded without arriving."""
    original = timm_model(HUB, classes=1000)
    fill(hub, HUB_REPO, original.state_dict())
    assert_holds(loaded(HUB, "hub"), original)


def test_hub_out_of_reach_is_one_quick_message(hub):
    """Catches half a minute of retries, and a message without a way on."""
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        find_weights("cnn", HUB, allow_scratch=False)
    assert time.monotonic() - start < 6
    for words in ("hf download timm/test_convnext.r160_in1k", "local file", "allow_scratch: true"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gcvit_base.in1k", "download that file"),
        ("convnext_zepto_rms.untrained", "no pretrained tag"),
        ("vit_base_patch16_18x2_224", "no pretrained weights"),
    ],
)
def test_models_without_hub_weights_say_so(hub, name, words):
    """Catches random weights where there are no pretrained ones."""
    with pytest.raises(UserError, match=words):  # noqa: PT012 - whichever of the two finds it
        probe("cnn", BranchConfig(name=name), 224)
        find_weights("cnn", BranchConfig(name=name), allow_scratch=True)


def test_hub_weights_with_another_architecture_are_refused(hub):
    """Catches pretrained weights half fitting a model that kwargs changed."""
    fill(hub, HUB_REPO, timm_model(HUB, classes=1000).state_dict())
    with pytest.raises(UserError, match=r"of another shape.*model\.cnn\.kwargs \(dims\)"):
        loaded(HUB.model_copy(update={"kwargs": {"dims": [24, 32, 48, 72]}}), "hub")


def test_overlay_names_a_local_file_for_hub(hub, tmp_path):
    """Catches timm's offline way (pretrained_cfg_overlay) being ignored."""
    original = timm_model(CNN)
    torch.save(original.state_dict(), tmp_path / "w.pth")
    overlay = {**CNN.kwargs, "pretrained_cfg_overlay": {"file": str(tmp_path / "w.pth")}}
    assert_holds(loaded(CNN.model_copy(update={"kwargs": overlay}), "hub"), original)
    overlay["pretrained_cfg_overlay"] = {"file": str(tmp_path / "absent.pth")}
    with pytest.raises(UserError, match="no such file"):
        loaded(CNN.model_copy(update={"kwargs": overlay}), "hub")


def test_a_run_lends_its_matching_backbone(tmp_path):
    """Catches the wrong phase's weights, the other branch's, and a run of another architecture."""
    older, newer, final = (timm_model(CNN, seed, classes=0) for seed in (1, 2, 3))
    for name, net, step in [("phase_a/best", newer, 40), ("phase_b/best", older, 10), ("model/model", final, 0)]:
        (tmp_path / name).parent.mkdir()
        state = {f"cnn.net.{key}": value.contiguous() for key, value in net.state_dict().items()}
        save_file({**state, "heads.task_type.linear.bias": torch.zeros(3)}, tmp_path / f"{name}.safetensors")
        (tmp_path / f"{name}.json").write_text(json.dumps({"step": step}))
    assert_holds(loaded(CNN, tmp_path), final)
    assert_holds(loaded(CNN, tmp_path / "phase_b" / "best.safetensors"), older)
    (tmp_path / "model" / "model.safetensors").unlink()
    assert_holds(loaded(CNN, tmp_path), newer)
    with pytest.raises(UserError, match="has no transformer; its model has cnn, heads"):
        loaded(SWIN, tmp_path, "transformer")
    held = {"architecture": {"cnn": {"name": "convnext_nano.d1h_in1k"}, "transformer": None}}
    (tmp_path / "model" / "model.json").write_text(json.dumps(held))
    with pytest.raises(UserError, match=r"has convnext_nano\.d1h_in1k as its cnn, model\.cnn\.name is convnext_atto"):
        loaded(CNN, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="isn't the folder of a run"):
        loaded(CNN, tmp_path / "empty")
