"""Frozen branches run once, what they gave is read: the same run but for its time. In this process, on real data.

On several processes: tests/distributed/test_trajectory.py.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_dist.config import load_config, parse_config
from hybrid_dist.data.dataset import Batch, Samples
from hybrid_dist.data.order import Key
from hybrid_dist.data.pictures import PictureError
from hybrid_dist.errors import UserError
from hybrid_dist.model.backbones import Backbone, Features
from hybrid_dist.training import phase as phase_module
from hybrid_dist.training import run as run_module
from hybrid_dist.training import val_features
from hybrid_dist.training.frozen import Pixels, identity
from tests.conftest import read_lines
from tests.distributed.running import expect_same_run

# Four steps are an epoch, of two micro batches each but for the last, which has seven samples and a batch of padding.
PHASES = [
    {"name": "a", "trainable": ["heads", "fusion"], "steps": 13, "lr": 1e-3, "cache_features": 2},
    {"name": "b", "trainable": ["heads", "transformer"], "steps": 6, "lr": 1e-3, "cache_features": 1},
]


@pytest.fixture
def config(tiny_data: Path, tiny_config: Callable[..., Path], tmp_path: Path) -> Path:
    """Whatever changes pixels and labels is on, one picture is bad, and the fusion reads tokens."""
    own = shutil.copytree(tiny_data, tmp_path / "data")
    (own / "train" / "0011.png").write_bytes(b"no picture")
    return tiny_config(
        phases=PHASES,
        data={
            "train_csv": str(own / "train.csv"), "train_images": str(own / "train"), "max_bad": 0.1,
            "mixup": 0.4, "cutmix": 1.0, "mix_prob": 0.4, "degrade": 0.5,
        },
        model={"fusion": "cross_attention"},
    )  # fmt: skip


def folder(config: Path, runs: str) -> Path:
    return config.parent / runs / "tiny"


class Seen:
    """What was loaded and run: in training, and in validation."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.turns: dict[str, set[int]] = {}
        self.runs = self.judging = self.val_loads = 0
        load, forward = Samples._load, Backbone.forward

        def seen_load(samples: Samples, keys: Sequence[Key]) -> Batch:
            if samples.augment.train:
                self.turns.setdefault(samples.phase, set()).update(turn for turn, _ in keys)
            else:
                self.val_loads += 1
            return load(samples, keys)

        def seen_forward(branch: Backbone, images: torch.Tensor) -> Features:
            self.runs += branch.frozen and torch.is_grad_enabled()
            self.judging += branch.frozen and not torch.is_grad_enabled()
            return forward(branch, images)

        patch.setattr(Samples, "_load", seen_load)
        patch.setattr(Backbone, "forward", seen_forward)


def uncached(job: Any, phase: Any, *_: Any) -> Pixels:
    """The same views, and nothing kept of them."""
    found = Pixels(job.folder)
    found.views = phase.cache_features
    return found


def expect_near(run: Path, whole: Path) -> None:
    """The same samples, pixels and, but for rounding, numbers."""
    wants, haves = read_lines(whole / "trace.jsonl"), read_lines(run / "trace.jsonl")
    assert [(line["sample_ids"], line["digest"]) for line in haves] == [
        (line["sample_ids"], line["digest"]) for line in wants
    ]
    assert [line["loss"] for line in haves] == pytest.approx([line["loss"] for line in wants], rel=1e-5)
    for name in (f"phase_{phase['name']}/best.json" for phase in PHASES):
        want, have = (json.loads((each / name).read_text()) for each in (whole, run))
        assert have["step"] == want["step"]
        assert have["metrics"]["val/loss"] == pytest.approx(want["metrics"]["val/loss"], rel=1e-5)
    wants, haves = (
        [line for line in read_lines(each / "metrics.jsonl") if "val/loss" in line] for each in (whole, run)
    )
    assert [line["val/loss"] for line in haves] == pytest.approx([line["val/loss"] for line in wants], rel=1e-5)


def stopped_after(call: Callable[..., int], config: Path, runs: str, step: int, patch: pytest.MonkeyPatch) -> Path:
    """Train up to a step; the run's folder."""
    make_step, run, made = phase_module.train_step, folder(config, runs), 0
    begun = len(read_lines(run / "trace.jsonl")) if run.exists() else 0

    def ask_to_stop(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        if begun + made == step:
            (run / "STOP").touch()
        return make_step(*arguments)

    with patch.context() as here:
        here.setattr(phase_module, "train_step", ask_to_stop)
        assert call(config, f"run.dir={config.parent / runs}") == 75
    assert len(read_lines(run / "trace.jsonl")) == step
    return run


def test_same_run_but_for_its_time(
    call: Callable[..., int], config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: features of another view, picture or branch, labels, partners or shares that do not belong to them, a
    branch that runs or pixels that are loaded although nothing wants them, also in validation; a resume that reads
    what the uninterrupted run computed, or the other way round; files that stay; one that was torn, cut off, deleted or
    made by other weights and is believed."""
    seen = Seen(monkeypatch)
    assert call(config, f"run.dir={config.parent / 'whole'}") == 0
    whole = folder(config, "whole")
    assert seen.turns == {"a": {0, 1}, "b": {0, 1}}
    assert seen.runs == 2 * 8 * 2 + 8, "two branches over two turns, one over one"
    pictures = len((Path(load_config(config).data.val_csv)).read_text().splitlines()) - 1
    batches = -(-pictures // 8)
    assert seen.judging == 3 * (batches + 1), "validation: each frozen branch once a phase, and for the sizes"
    assert seen.val_loads == (1 + 2) * batches, "phase a's first validation, and both of phase b, which wants pixels"
    assert not (whole / "features").exists()
    assert (whole / "bad_pictures.csv").read_text().count("0011.png") == 1
    (whole / "features" / "b").mkdir(parents=True)  # as if it had been cut off between its end and this one's
    assert call(config, f"run.dir={config.parent / 'whole'}") == 0
    assert not (whole / "features").exists()
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "open_features", uncached)
        assert call(config, f"run.dir={config.parent / 'uncached'}") == 0
    expect_near(whole, folder(config, "uncached"))

    for step in (6, 10):  # while they are made, while they are read
        run = stopped_after(call, config, "again", step, monkeypatch)
        assert [path.name for path in (run / "features").iterdir()] == ["a"]
    shutil.copytree(run.parent, config.parent / "lost")
    assert call(config, f"run.dir={run.parent}") == 0
    expect_same_run(run, whole)
    capsys.readouterr()

    kept = folder(config, "lost") / "features"
    raw = bytearray((kept / "a" / "00000.entries").read_bytes())
    size = len(raw) // 112
    for place in range(50):
        raw[place * size + size // 2] ^= 1
    (kept / "a" / "00000.entries").write_bytes(raw[: 100 * size + 7])
    (kept / "b").mkdir()  # of a phase that was cut off before its end, say
    seen.runs = 0
    run = stopped_after(call, config, "lost", 11, monkeypatch)
    assert seen.runs > 0, "what is torn is computed"
    assert "the features of 12 of 112 views are missing" in capsys.readouterr().err
    assert not (kept / "b").exists()
    manifest = json.loads((kept / "a" / "manifest.json").read_text())
    manifest["weights"]["cnn"] = "others"
    (kept / "a" / "manifest.json").write_text(json.dumps(manifest))
    assert call(config, f"run.dir={run.parent}") == 0
    said = capsys.readouterr().err
    assert "features are made anew, for weights differ" in said
    assert "112 of 112 views are missing" in said
    expect_near(run, whole)


def test_what_it_follows_from(config: Path) -> None:
    """Catches: features that outlive what they were made from."""
    plain = load_config(config)
    wants = identity(plain, plain.phases[0], {"train": "x"}, {"cnn": "y", "transformer": "z"})
    for override in (
        "run.seed=4", "data.image_size=64", "data.augment=false", "data.mixup=0", "data.cutmix=0.5", "data.mix_prob=0",
        "data.degrade=0", "tasks.type.sensitive_to=[colour]", "train.precision=bf16", "phases.0.cache_features=3",
        "phases.0.name=x", "model.cnn.name=convnext_femto",
    ):  # fmt: skip
        other = load_config(config, [override])
        assert identity(other, other.phases[0], {"train": "x"}, {"cnn": "y", "transformer": "z"}) != wants, override
    assert identity(plain, plain.phases[0], {"train": "X"}, {"cnn": "y", "transformer": "z"}) != wants
    same = load_config(config, ["train.micro_batch_size=4", "phases.0.lr=1", "data.workers=1"])
    assert identity(same, same.phases[0], {"train": "x"}, {"cnn": "y", "transformer": "z"}) == wants


def test_where_it_can_not_be(call: Callable[..., int], config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a start that finds out later that there is no room; a key that does nothing, and says nothing."""
    huge = 10**12
    assert call(config, f"phases.0.cache_features={huge}", f"phases.0.steps={5 * huge}") == 2
    said = capsys.readouterr().err
    assert "phases.0.cache_features: the features take" in said
    assert "GB left; fewer views, or null, would do" in said
    many = ["phases.0.steps=1", "phases.1.trainable=[all]", "phases.1.steps=1", "run.name=other"]
    assert call(config, *many, "debug.trace=false") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "phase a: cache_features has no effect, for in its 1 steps no picture comes more than 2 times" in said
    assert "phase b: cache_features has no effect, for no branch is wholly frozen in it" in said
    values = load_config(config).model_dump(mode="json")
    values["data"]["balance"] = "airline"
    with pytest.raises(UserError, match=r"phases\.0\.cache_features: with data\.balance"):
        parse_config(values, "x")


def validations(run: Path) -> list[dict[str, Any]]:
    """Their lines, without times and speeds."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if "val/loss" in line]
    return [{key: value for key, value in line.items() if key.startswith(("val", "step"))} for line in lines]


def test_validations_that_ask_nothing_twice(
    call: Callable[..., int], config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: another validation than without; one that is stopped half-way and taken for whole; a full disk that ends
    the run; loader processes that go on with what an early end has left behind; a picture that could not be had at
    first, and is judged by another one's features once it can."""
    shape = ["train.ema=0.9", "data.workers=2", "phases.0.steps=40", "phases.0.patience=2", "phases.1.patience=1"]

    def train(runs: str, *more: str) -> Path:
        found = call(config, f"run.dir={config.parent / runs}", *shape, *more)
        assert found == (75 if runs == "stopped" else 0)
        return folder(config, runs)

    whole = validations(train("whole"))
    assert 2 < len(whole) < 12, "patience ends phase a early"
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "open_features", uncached)
        plain = validations(train("plain"))
    assert [line.keys() for line in plain] == [line.keys() for line in whole]
    assert "val_raw/loss" in {key for line in whole for key in line}
    for want, have in zip(plain, whole, strict=True):
        assert have["val/loss"] == pytest.approx(want["val/loss"], rel=1e-5)

    with monkeypatch.context() as patch:
        patch.setattr(val_features, "write_at", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no room")))
        assert validations(train("full")) == whole
    assert "no room; frozen branches run in each validation" in " ".join(capsys.readouterr().err.split())

    validate = phase_module.validate

    def ask_to_stop(engine: Any, tasks: Any, batches: Any, *rest: Any) -> Any:
        def some() -> Iterator[Any]:
            yield next(batches)
            (folder(config, "stopped") / "STOP").touch()
            yield from batches

        return validate(engine, tasks, some(), *rest)

    with monkeypatch.context() as patch:
        patch.setattr(phase_module, "validate", ask_to_stop)
        train("stopped")
    shutil.move(config.parent / "stopped", config.parent / "again")
    assert validations(train("again", f"run.dir={config.parent / 'again'}")) == whole


def test_a_validation_picture_that_comes_later(
    call: Callable[..., int], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: it is judged by the features of what stood for it."""
    table = Path(load_config(config).data.val_csv)
    name = table.read_text().splitlines()[5].split(",")[0]
    picture, seen = Samples.picture, 0

    def late(samples: Samples, row: int) -> Any:
        nonlocal seen
        if not samples.augment.train and samples.table.filename(row) == name:
            seen += 1
            if seen == 1:
                raise PictureError(name, "the disk was away")
        return picture(samples, row)

    monkeypatch.setattr(Samples, "picture", late)
    phases = json.dumps([PHASES[1] | {"steps": 8}])
    assert call(config, f"phases={phases}", "data.max_bad=0.2") == 0
    assert seen == 2, "both validations want its pixels"
    said = (folder(config, "runs") / "phase_b" / "predictions_val.csv").read_text()
    assert name not in said
    assert said.count("\n") == len(table.read_text().splitlines()) - 1
