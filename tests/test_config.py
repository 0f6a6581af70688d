"""The config: typed, complete, refused with a hint, and read back as it was written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_dist.config import load_config, parse_config, reference, without_logins
from hybrid_dist.errors import UserError
from tests.conftest import ROOT

MINIMAL = """
run: {name: x}
data: {train_csv: a, train_images: b, val_csv: c, val_images: d}
model: {cnn: {name: convnext_tiny}, transformer: null}
tasks: {type: {kind: classification, column: typename}}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load_and_come_back(path: Path, tmp_path: Path) -> None:
    """Catches: a shipped config with a stale key; a resolved config.yaml that does not read as itself."""
    config = load_config(path)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


def test_defaults_and_overrides(minimal: Path) -> None:
    """Catches: other default phases than the issue's; an override that sets a text where a number is meant."""
    config = load_config(minimal)
    assert [(p.name, p.epochs, p.lr) for p in config.phases] == [("a", 5, 1e-3), ("b", 10, 5e-5), ("c", 15, 1e-5)]
    config = load_config(
        minimal,
        [
            "phases.0.epochs=1",
            "train.betas=[0.9, 0.95]",
            "phases.1.lr=1e-4",
            "tasks.block={kind: regression, column: block}",
        ],
    )
    assert config.phases[0].epochs == 1
    assert config.phases[1].lr == 1e-4
    assert config.phases[2].epochs == 15
    assert config.train.betas == (0.9, 0.95)
    assert list(config.tasks) == ["type", "block"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trian.x=1", ["trian", "train"]),
        ("train.micro_batch=3", ["train.micro_batch", "micro_batch_size"]),
        ("phases.0.epoch=1", ["phases.0.epoch", "epochs"]),
        ("tasks.type.kind=foo", ["tasks.type.kind", "classification", "regression"]),
        ("train.micro_batch_size=true", ["train.micro_batch_size", "integer"]),
        ("train.micro_batch_size=2.5", ["train.micro_batch_size", "integer"]),
        ("phases.0.lr=.nan", ["phases.0.lr", "finite"]),
        ("phases.0.lr={heads: 1e-3, wings: 1e-3}", ["phases.0.lr", "wings", "cnn, transformer, fusion, heads"]),
        ("phases.0.lr={heads: 0}", ["phases.0.lr", "heads", "above 0"]),
        ("phases.0.layer_decay=1.5", ["phases.0.layer_decay", "less than or equal to 1"]),
        ("data.workers=many", ["data.workers: input should be 'auto' or a valid integer, got 'many'"]),
        ("phases=[]", ["phases"]),
        ("model.cnn=null", ["model", "model.cnn"]),
        ("run.name=a/b", ["run.name"]),
        ("data.balance=clarity", ["data.balance", "type"]),
        ("tasks.type.smoothing=1", ["tasks.type.smoothing"]),
        ("no equals sign", ["key.path=value"]),
        ("run.name.x=1", ["run.name.x"]),
        ("phases.0.trainable.0.x=1", ["phases.0.trainable.0.x", "single value"]),
        ("phases.7.lr=1", ["phases.7.lr", "0 to 2"]),
        ("phases.².lr=1", ["phases.².lr", "not an index"]),
    ],
)
def test_refused_with_a_hint(minimal: Path, override: str, words: list[str]) -> None:
    """Catches: a mistake that passes, or a message without the key and what would do."""
    with pytest.raises(UserError) as error:
        load_config(minimal, [override])
    assert not [word for word in words if word not in str(error.value)], str(error.value)


def test_same_names_of_phases(minimal: Path) -> None:
    """Catches: two phases that would write into one folder."""
    phase = {"name": "a", "trainable": ["heads"], "epochs": 1, "lr": 0.1}
    values = load_config(minimal).model_dump(mode="json") | {"phases": [phase, phase]}
    with pytest.raises(UserError, match="different names"):
        parse_config(values, "x")


def test_a_key_twice_in_yaml(tmp_path: Path) -> None:
    """Catches: the second of two equal keys silently winning."""
    path = tmp_path / "x.yaml"
    path.write_text(MINIMAL + "run: {name: y}\n")
    with pytest.raises(UserError, match="run"):
        load_config(path)


def test_every_key_is_explained() -> None:
    """Catches: a key without a line for the reference, or a README that lacks it or says something else."""
    readme = (ROOT / "README.md").read_text()
    for key, default, meaning in reference():
        assert meaning, key
        shown = default if default == "required" else f"`{default}`"
        assert f"| `{key}` | {shown} | {meaning} |" in readme, key


def test_help_is_quick() -> None:
    """Catches: torch or its friends imported on the way to --help. Counted in imports: time depends on the machine."""
    code = (
        "import sys, hybrid_dist.cli as c; c.build_parser(); print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:hush@store/a b", "s3://store/a b"),
        ("https://user:a/b@store/x.zip", "https://store/x.zip"),
        ("zip://val::https://store/x.zip?sig=hush&sv=1", "zip://val::https://store/x.zip"),
        ("a: 'https://store/x?X-Amz-Signature=hush'", "a: 'https://store/x'"),
        ("someone@example.org? /data/a@b", "someone@example.org? /data/a@b"),
    ],
)
def test_logins_are_not_for_everyone(text: str, shown: str) -> None:
    """Catches: a key that gets into the report or to wandb; a path that is cut."""
    assert without_logins(text) == shown
