"""A run's life: stopped, cut off between two writes, as jobs of single phases. In this process, on real data."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors import safe_open
from safetensors.torch import load_file

import train
from hybrid_dist import cli
from hybrid_dist.checkpoint import Found, Store
from hybrid_dist.config import load_config
from hybrid_dist.training import job as job_module
from hybrid_dist.training import phase as phase_module
from hybrid_dist.training import run as run_module
from hybrid_dist.training.phase import PhaseLoop
from hybrid_dist.training.stop import Stop
from tests.conftest import ROOT, environment, fill, read_lines, tiny_values
from tests.distributed.running import expect_same_run, without_times

PHASES = [
    {"name": "a", "trainable": ["heads", "fusion"], "steps": 3, "lr": 1e-3},
    {"name": "b", "trainable": ["heads", "transformer"], "steps": 5, "lr": 1e-3},
    {"name": "c", "trainable": ["all"], "steps": 4, "lr": 1e-3},
]


@pytest.fixture
def config(tiny_config: Callable[..., Path]) -> Path:
    return tiny_config(phases=PHASES, checkpoint={"every_steps": 1, "keep": 50}, tracking={"log_every": 2})


def folder(config: Path, runs: str = "runs") -> Path:
    return config.parent / runs / "tiny"


def status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


def test_phases_as_jobs_and_stops_equal_one_run(call: Callable[..., int], config: Path, monkeypatch: Any) -> None:
    """Catches: a phase that begins otherwise in a job of its own; a stop that loses or repeats a step, or its code."""
    assert call(config, f"run.dir={config.parent / 'whole'}") == 0
    whole, run = folder(config, "whole"), folder(config)
    assert status(whole)["state"] == "finished"
    assert [len(read_lines(whole / "trace.jsonl"))] == [12]

    assert call(config, "--phase", "a") == 0
    assert status(run) | {"time": 0} == {
        "state": "finished", "phase": "a", "step": 3, "reason": "phase a is finished, b and c left", "time": 0,
    }  # fmt: skip
    assert call(config, "--phase", "c") == 2, "b comes first"

    make_step = phase_module.train_step

    def ask_to_stop(*arguments: Any) -> Any:
        (run / "STOP").touch()
        return make_step(*arguments)

    monkeypatch.setattr(phase_module, "train_step", ask_to_stop)
    assert call(config, "--phase", "b") == 75
    assert status(run)["state"] == "stopped"
    assert (status(run)["phase"], status(run)["step"]) == ("b", 4)
    assert not (run / "STOP").exists()

    heard = threading.Event()
    hear = Stop._heard

    def send_signal(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        assert heard.wait(60)
        return make_step(*arguments)

    monkeypatch.setattr(Stop, "_heard", lambda stop, number: (hear(stop, number), heard.set()))
    monkeypatch.setattr(phase_module, "train_step", send_signal)
    assert call(config) == 75
    assert status(run)["step"] == 5
    assert "SIGTERM" in status(run)["reason"]
    monkeypatch.setattr(phase_module, "train_step", make_step)
    assert call(config, "--phase", "a") == 0, "finished already"
    assert not (run / "model").exists()
    assert status(run)["state"] == "stopped", "a job with nothing to do says nothing new of the run"
    assert call(config) == 0
    assert call(config) == 0, "a finished run says so"
    expect_same_run(run, whole)


class CutOff(BaseException):
    """The process ends here, whatever stands around it."""


def test_cut_off_before_the_best_is_out(call: Callable[..., int], config: Path, monkeypatch: Any) -> None:
    """Catches: a kill between a phase's last checkpoint and its best.safetensors: the next phase would begin from an
    older best, or never."""
    assert call(config, f"run.dir={config.parent / 'whole'}") == 0
    whole, run = folder(config, "whole"), folder(config)
    bests = {name: json.loads((whole / f"phase_{name}/best.json").read_text())["step"] for name in "abc"}
    publish = job_module.publish_best

    def cut_off(where: Path, newest: Found, *tick: Any, **more: Any) -> None:
        if newest.path.name in {f"{name}-{step}" for name, step in bests.items()} and newest.path.name not in seen:
            seen.add(newest.path.name)
            raise CutOff
        publish(where, newest, *tick, **more)

    seen: set[str] = set()
    monkeypatch.setattr(job_module, "publish_best", cut_off)
    for _ in range(3):
        with pytest.raises(CutOff):
            call(config)
    assert call(config) == 0
    expect_same_run(run, whole)


def test_what_is_left_when_nothing_valid_is(call: Callable[..., int], config: Path, capsys: Any) -> None:
    """Catches: a run whose checkpoints are gone or broken that silently starts over on top of itself; other data or
    other classes taken for the ones it was trained on."""
    assert call(config, "--phase", "a") == 0
    run = folder(config)
    before = (run / "metrics.jsonl").read_text()
    for shard in run.glob("checkpoints/*/shard-*"):
        shard.write_bytes(shard.read_bytes()[:100])
    assert call(config) == 2
    assert "no valid checkpoint" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == before

    shutil.rmtree(run)
    assert call(config, "--phase", "a") == 0
    data = Path(load_config(config).data.train_csv)
    classes = data.parent / "type_classes.json"
    try:
        classes.write_text(json.dumps({"classes": ["B737-800", "A320", "ATR72"], "num_classes": 3}))
        assert call(config) == 2
    finally:
        classes.unlink()


@pytest.fixture
def broken(config: Path, tmp_path: Path) -> Path:
    """`config` on a copy of the data, of which a picture of each split is broken."""
    data = load_config(config).data
    shutil.copytree(Path(data.train_csv).parent, tmp_path / "data")
    (tmp_path / "data/train/0003.png").write_bytes(b"<html>not found</html>")
    (tmp_path / "data/val/0004.png").write_bytes(b"")
    text = config.read_text()
    config.write_text(text.replace(str(Path(data.train_csv).parent), str(tmp_path / "data")))
    return config


BAD = """split,line,filename,reason
train,5,0003.png,"is no picture, it starts with b'<html>not found<'"
val,6,0004.png,is no picture: it is empty
"""


def test_too_many_bad_pictures_end_the_run(call: Callable[..., int], broken: Path, capsys: Any) -> None:
    """Catches: a run that goes on with half of its data gone; a status that does not say why it ended."""
    assert call(broken) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1
    assert "1 of 56 pictures of " in said[0]
    assert "data.max_bad: 0.01" in said[0]
    run = folder(broken)
    assert status(run)["state"] == "failed"
    assert status(run)["reason"] in said[0]
    assert (run / "bad_pictures.csv").read_text() == BAD[: BAD.index("val")]


def test_a_bad_picture_changes_nothing_of_the_rest(
    call: Callable[..., int], broken: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Catches: a bad picture that others, their losses or their metrics notice; one that is listed twice, or lost in a
    resume; a list that is written where all is well."""
    run, where = folder(broken), ("data.max_bad=0.05",)
    assert call(broken, *where) == 0
    assert (run / "bad_pictures.csv").read_text() == BAD
    said = capsys.readouterr().err
    assert said.count("counts as a sample without labels") == 2
    predicted = (run / "phase_c/predictions_val.csv").read_text().splitlines()
    assert len(predicted) == 23, "23 less the bad one, and a header"

    # The same with good pictures there, and no labels.
    shutil.copytree(tmp_path / "data", tmp_path / "blank")
    for split, row in (("train", 3), ("val", 4)):
        shutil.copy(tmp_path / f"data/{split}/0001.png", tmp_path / f"blank/{split}/{row:04}.png")
        lines = (tmp_path / f"blank/{split}.csv").read_text().splitlines()
        lines[row + 1] = f"{row:04}.png" + "," * lines[0].count(",")
        (tmp_path / f"blank/{split}.csv").write_text("\n".join(lines) + "\n")
    values = broken.read_text().replace(str(tmp_path / "data"), str(tmp_path / "blank"))
    (tmp_path / "blank.yaml").write_text(values.replace("runs", "blank_runs"))
    assert call(tmp_path / "blank.yaml") == 0
    blank = tmp_path / "blank_runs" / "tiny"
    assert not (blank / "bad_pictures.csv").exists()
    for name in ("phase_a/best", "phase_c/best", "model/model"):
        same, other = load_file(run / f"{name}.safetensors"), load_file(blank / f"{name}.safetensors")
        assert all(torch.equal(same[key], other[key]) for key in other)
    assert without_times(run) == without_times(blank)

    stop_at(monkeypatch, tmp_path / "again" / "tiny", 2)
    where += (f"run.dir={tmp_path / 'again'}",)
    assert call(broken, *where) == 75
    (tmp_path / "again/tiny/bad_pictures.csv").open("a").write("train,9,0007.png,of a step that is made once more\n")
    assert call(broken, *where) == 0
    assert (tmp_path / "again/tiny/bad_pictures.csv").read_text() == BAD
    expect_same_run(tmp_path / "again" / "tiny", run)


def test_divergence_is_said(call: Callable[..., int], config: Path, capsys: Any) -> None:
    """Catches: NaN in metrics.jsonl, which is not JSON, or a traceback from a metric."""
    assert call(config, "phases.0.lr=1e30", "phases.0.steps=8") == 2
    assert "lower learning rate" in capsys.readouterr().err
    for line in (folder(config) / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be the GPU's affair")
def test_bf16_in_software_is_said(call: Callable[..., int], config: Path, monkeypatch: Any, capsys: Any) -> None:
    """Catches: ten times the time for nothing, unsaid; an alarm where the CPU has bf16."""
    for there in (False, True):
        monkeypatch.setattr("hybrid_dist.training.job.has_bf16", lambda device, there=there: there)
        assert call(config, "train.precision=bf16", f"run.name=there_{there}", "--phase", "a") == 0
        assert ("train.precision=fp32 would do" in capsys.readouterr().err) != there


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": {"rows": {"kind": "classification", "column": "typename"}}},
        {"phases": [{"name": "only", "trainable": ["all"], "epochs": 0.5, "lr": 1e-3}]},
        {"train": {"global_batch_size": 64, "micro_batch_size": 64, "precision": "fp32"}},
        {
            "model": {"transformer": None, "fusion": "concat"},
            "phases": [{"name": "x", "trainable": ["heads", "cnn.*stages.3*"], "steps": 2, "lr": 1e-3}],
        },
    ],
    ids=["a task called rows", "half an epoch", "more than an epoch in a batch", "one backbone, partly frozen"],
)
def test_unusual_but_legal(call: Callable[..., int], tiny_config: Callable[..., Path], changes: Any) -> None:
    """Catches: a legal config that dies on the way or ends without its model."""
    config = tiny_config(**({"phases": PHASES[:1]} | changes))
    assert call(config) == 0
    assert (folder(config) / "model" / "model.safetensors").is_file()
    assert status(folder(config))["state"] == "finished"


def test_a_stop_in_a_validation(call: Callable[..., int], config: Path, monkeypatch: Any) -> None:
    """Catches: a stop that has to wait for the end of a validation, or after which it is never made, or made twice."""
    assert call(config, f"run.dir={config.parent / 'whole'}") == 0
    whole, run = folder(config, "whole"), folder(config)
    validate, asked = phase_module.validate, []

    def ask_to_stop(engine: Any, tasks: Any, batches: Any, *rest: Any) -> Any:
        def some() -> Iterator[Any]:
            yield next(batches)
            (run / "STOP").touch()
            asked.append(True)
            yield from batches
            pytest.fail("the validation went on to its end")

        return validate(engine, tasks, some() if len(asked) < 4 else batches, *rest)

    monkeypatch.setattr(phase_module, "validate", ask_to_stop)
    steps = []
    for _ in range(4):
        assert call(config) == 75
        steps.append((status(run)["step"], json.loads(newest_state(run).read_text())["validation_due"]))
    assert steps == [(3, True)] * 4, "no step is made while the validation is due"
    assert call(config) == 0
    expect_same_run(run, whole)


def newest_state(run: Path) -> Path:
    return max(run.glob("checkpoints/*/state.json"), key=lambda path: int(path.parent.name.rpartition("-")[2]))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def resum(checkpoint: Path) -> None:
    """A manifest that fits what is there, as another program, or an attacker, would write it."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


class Malicious:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def become_pickle(path: Path) -> None:
    torch.save({"weight/x@0": Malicious(path.parents[3] / "ran")}, path)
    resum(path.parent)


def of_another_config(checkpoint: Path) -> None:
    state = checkpoint / "state.json"
    edit_json(state, config=json.loads(state.read_text())["config"] | {"run.seed": 99})
    resum(checkpoint)


def one_rank_left_out(checkpoint: Path) -> None:
    """Of two shards, the manifest only knows one."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    shard = checkpoint / SHARD
    with safe_open(shard, framework="pt") as file:
        keys = list(file.keys())
        half = {key: file.get_tensor(key) for key in keys[::2]}
        save_file(half, shard, metadata=file.metadata())
    resum(checkpoint)


def point_outside(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 0, "sha256": ""}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


SHARD = "shard-00000-of-00001.safetensors"
# What is done to the newest checkpoint, and what is said of it.
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard cut short": (lambda path: os.truncate(path / SHARD, 5000), f"{SHARD} has 5000 bytes, not "),
    "shard with a flipped bit": (lambda path: flip(path / SHARD), f"{SHARD} does not have its SHA-256 sum"),
    "shard missing": (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
    "shard that is a pickle": (lambda path: become_pickle(path / SHARD), "it can't be read (SafetensorError"),
    "shard that holds a part": (one_rank_left_out, "its shards do not hold all of "),
    "state cut short": (lambda path: os.truncate(path / "state.json", 9), "state.json has 9 bytes, not "),
    "state with a flipped bit": (lambda path: flip(path / "state.json"), "state.json does not have its SHA-256 sum"),
    "state missing": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "predictions cut short": (lambda path: os.truncate(path / "predictions_val.csv", 9), "predictions_val.csv has 9 "),
    "predictions flipped": (lambda path: flip(path / "predictions_val.csv"), "predictions_val.csv does not have its"),
    "predictions missing": (lambda path: (path / "predictions_val.csv").unlink(), "predictions_val.csv is missing"),
    "manifest cut short": (lambda path: os.truncate(path / "manifest.json", 20), "its manifest.json can't be read"),
    "manifest flipped": (lambda path: flip(path / "manifest.json"), ""),
    "manifest missing": (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
    "of another format": (lambda path: edit_json(path / "manifest.json", format="x"), "its format is 'x'"),
    "pointing outside": (point_outside, "names a file outside of the folder: '../../secret'"),
    "of another config": (of_another_config, "it belongs to another config: run.seed is 99 there and 3 here"),
    "empty": (lambda path: shutil.rmtree(path) or path.mkdir(), "it has no manifest.json"),
}


@pytest.fixture(scope="module")
def stopped(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A whole run, and one that was left with a best as its newest checkpoint, in the middle of phase b."""
    base = tmp_path_factory.mktemp("stopped")
    values = tiny_values(tiny_data, base) | {"phases": [dict(phase) for phase in PHASES]}
    values["phases"][1]["steps"] = 9
    values["checkpoint"] = {"every_steps": 1, "keep": 50}
    YAML().dump(values, base / "config.yaml")
    with pytest.MonkeyPatch.context() as patch:  # in this process, for as many threads as the others have
        patch.setattr(sys, "argv", ["train.py", "--config", str(base / "config.yaml")])
        assert train.main() == 0
    whole, run = base / "runs" / "tiny", base / "cut" / "tiny"
    shutil.copytree(whole, run)
    best = json.loads((whole / "phase_b/best.json").read_text())["step"]
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.rpartition("-")[2]) > best:
            shutil.rmtree(checkpoint)
    shutil.rmtree(run / "phase_c")
    shutil.rmtree(run / "model")
    return whole, run


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(
    name: str, stopped: tuple[Path, Path], call: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    """Catches: a broken checkpoint taken for whole, or a whole one lost for it; a message that does not say which and
    why; what an earlier attempt has left of a later step mixed into this one."""
    whole, cut = stopped
    run = tmp_path / "tiny"
    shutil.copytree(cut, run)
    newest = newest_state(run).parent
    step = int(newest.name.rpartition("-")[2])
    damage, message = DAMAGE[name]
    damage(newest)
    assert call(whole.parent.parent / "config.yaml", f"run.dir={tmp_path}") == 0
    said = capsys.readouterr().err
    assert f"checkpoint {newest} is skipped: " in said
    assert message in said
    assert said.count("is skipped") == 1
    assert f"from step {step - 1 - 3}" in said, "phase b's own count begins after the three steps of phase a"
    assert not (tmp_path / "ran").exists()
    expect_same_run(run, whole)


SCORES = {4: 0.3, 8: 0.6, 12: 0.5, 16: 0.45, 20: 0.4, 23: 0.5}
"""By step: which is the best would depend on the processor and its threads."""


@pytest.fixture
def long(tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A first phase of five validations, the best of which is not the last one; only few checkpoints stay."""
    validate, judge, now = PhaseLoop._validate, phase_module.metrics_of, [0]

    def note(loop: PhaseLoop) -> None:
        now[0] = loop.state.step
        validate(loop)

    monkeypatch.setattr(PhaseLoop, "_validate", note)
    monkeypatch.setattr(phase_module, "metrics_of", lambda *given: judge(*given) | {"val/score": SCORES[now[0]]})
    phases = [
        {"name": "a", "trainable": ["all"], "steps": 20, "lr": 1e-2},
        {"name": "b", "trainable": ["all"], "steps": 3, "lr": 1e-2, "carry_optimizer": True},
    ]
    return tiny_config(phases=phases, checkpoint={"every_steps": 1, "keep": 2})


@pytest.fixture
def whole(long: Path, call: Callable[..., int]) -> Path:
    """The run of `long` without any trouble."""
    assert call(long, f"run.dir={long.parent / 'whole'}") == 0
    assert best_of(folder(long, "whole")) == 8, "what these tests stand on"
    return folder(long, "whole")


def best_of(run: Path) -> int:
    step: int = json.loads((run / "phase_a/best.json").read_text())["step"]
    return step


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_best_that_is_not_what_was_written(
    damage: Callable[[Path], Any], call: Callable[..., int], long: Path, whole: Path, capsys: Any
) -> None:
    """Catches: the next phase, or the final model, made of a damaged file; a dead end where its checkpoint is there."""
    run, weights = folder(long), "phase_a/best.safetensors"
    assert call(long, "--phase", "a") == 0
    damage(run / weights)
    assert call(long, "--phase", "b") == 0, "made again from its checkpoint, which the next phase keeps"
    expect_same_run(run, whole)

    shutil.rmtree(run / "model")
    newest = newest_state(run)
    best = run / "phase_b" / "best.safetensors"
    damage(best)
    assert call(long) == 0
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()

    shutil.rmtree(run / "model")
    damage(best)
    edit_json(newest, best_step=21)  # of a checkpoint that is not there any more
    shutil.rmtree(run / "checkpoints/b-21", ignore_errors=True)
    resum(newest.parent)
    capsys.readouterr()
    assert call(long) == 2
    assert f"train.py: {best}: " in capsys.readouterr().err
    assert not (run / "model").exists()


def test_from_a_packed_copy(call: Callable[..., int], broken: Path, tmp_path: Path, capsys: Any) -> None:
    """Catches: a trajectory that depends on whether the pictures were packed, or on where they lie."""
    where = ("data.max_bad=0.05",)
    assert call(broken, *where) == 0
    assert cli.main(["pack", "--config", str(broken)]) == 3, "too many are bad"
    assert "more than data.max_bad: 0.01 allows" in capsys.readouterr().out
    assert cli.main(["pack", "--config", str(broken), *where]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/data/train.packed-96: 56 pictures, 1 of them can't be used" in out
    assert call(broken, *where, f"run.dir={tmp_path / 'packed'}", "data.packed=always") == 0
    assert "train pictures come from" in capsys.readouterr().err
    expect_same_run(tmp_path / "packed" / "tiny", folder(broken))
    assert (tmp_path / "packed/tiny/bad_pictures.csv").read_text() == BAD

    (tmp_path / "link").symlink_to(tmp_path / "data")
    images = [f"data.{split}_images={tmp_path / 'link' / split}" for split in ("train", "val")]
    assert call(broken, *where, *images, f"run.dir={tmp_path / 'link_runs'}", "data.packed=always") == 0

    # Packed from elsewhere, which training then does not look at any more.
    archive = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", tmp_path / "data"))
    urls = [f"data.{split}_images=zip://{split}::file://{archive}" for split in ("train", "val")]
    assert call(broken, *where, *urls, f"run.dir={tmp_path / 'none'}") == 2, "a copy of another place"
    assert "is of the pictures at" in capsys.readouterr().err
    assert cli.main(["pack", "--config", str(broken), *where, *urls]) == 0
    archive.unlink()
    assert call(broken, *where, *urls, f"run.dir={tmp_path / 'remote'}") == 0
    expect_same_run(tmp_path / "remote" / "tiny", folder(broken))
    shutil.rmtree(tmp_path / "data/val.packed-96")
    assert call(broken, *where, *urls, f"run.dir={tmp_path / 'none'}") == 2
    assert "hybrid-dist pack" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def stop_at(monkeypatch: Any, run: Path, phase_step: int) -> None:
    """The next start is asked to stop after that step."""
    make_step, made = phase_module.train_step, []

    def ask(*arguments: Any) -> Any:
        made.append(True)
        if len(made) == phase_step:
            (run / "STOP").touch()
            monkeypatch.setattr(phase_module, "train_step", make_step)
        return make_step(*arguments)

    monkeypatch.setattr(phase_module, "train_step", ask)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda weights: (weights.parent / "best.json").unlink()])
def test_a_best_that_is_lost(
    damage: Callable[[Path], Any], call: Callable[..., int], long: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Catches: a best whose checkpoint is pruned and whose weights are damaged, which keeps every later one from being
    the best, so that the phase ends with nothing to go on with."""
    run = folder(long)
    stop_at(monkeypatch, run, 14)
    assert call(long, "phases.1.carry_optimizer=false") == 75
    assert best_of(run) == 8
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["a-13", "a-14"]
    damage(run / "phase_a/best.safetensors")
    assert call(long, "phases.1.carry_optimizer=false") == 0
    assert "the best so far, of step 8, is gone or damaged" in capsys.readouterr().err
    assert best_of(run) == 16
    assert (run / "model/model.safetensors").is_file()


def failing_once(monkeypatch: Any, name: str, then: Callable[[], Any] = lambda: None) -> None:
    """The disk refuses to commit that checkpoint the first time."""
    commit, done = Store.commit, []

    def refuse(store: Store, partial: Path, name_of_it: str, *rest: Any) -> Path:
        if name_of_it == name and not done:
            done.append(True)
            then()
            raise OSError(errno.ENOSPC, "No space left on device")
        return commit(store, partial, name_of_it, *rest)

    monkeypatch.setattr(Store, "commit", refuse)


def test_a_best_that_can_not_be_saved(call: Callable[..., int], long: Path, whole: Path, monkeypatch: Any) -> None:
    """Catches: a best whose weights are nowhere, which later ones are measured by and the next phase looks for."""
    run = folder(long)
    failing_once(monkeypatch, "a-8")
    assert call(long) == 0
    scores = {line["step"]: line["val/score"] for line in read_lines(whole / "metrics.jsonl") if "val/score" in line}
    assert best_of(run) == max((4, 12, 16, 20), key=scores.__getitem__), "the best of those that there are"
    shutil.rmtree(run)

    failing_once(monkeypatch, "a-4")
    assert call(long) == 0
    expect_same_run(run, whole)


def test_a_best_that_can_not_be_saved_at_first(
    call: Callable[..., int], long: Path, whole: Path, monkeypatch: Any
) -> None:
    """Catches: a stop at the very step that saves again, but without what belongs to a best."""
    run, begin = folder(long), Store.begin

    def ask_to_stop(store: Store, name: str) -> Path:
        if name == "a-8":
            (run / "STOP").touch()
        return begin(store, name)

    monkeypatch.setattr(Store, "begin", ask_to_stop)
    failing_once(monkeypatch, "a-8")
    assert call(long) == 75
    monkeypatch.setattr(Store, "begin", begin)
    assert newest_state(run).parent.name == "a-8"
    assert call(long) == 0
    expect_same_run(run, whole)


def test_cut_off_between_two_renames(call: Callable[..., int], long: Path, whole: Path, monkeypatch: Any) -> None:
    """Catches: the newest checkpoint, put aside for its better at the moment of the cut, looked for too late."""
    run = folder(long)
    failing_once(monkeypatch, "a-10", lambda: (run / "STOP").touch())
    assert call(long, "checkpoint.keep=1") == 75
    newest = newest_state(run).parent
    newest.rename(newest.with_name(f".{newest.name}.old"))
    assert call(long, "checkpoint.keep=1") == 0
    expect_same_run(run, whole)


def test_the_optimizer_of_the_best_stays_to_go_back_to(
    call: Callable[..., int], long: Path, whole: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Catches: the state that a phase begins with pruned while that phase may yet have to begin once more."""
    run = folder(long)
    failing_once(monkeypatch, "b-21", lambda: (run / "STOP").touch())
    assert call(long) == 75
    for checkpoint in (run / "checkpoints").glob("b-*"):
        flip(next(checkpoint.glob("shard-*")))
    capsys.readouterr()
    assert call(long) == 0
    said = capsys.readouterr().err
    assert "is skipped" in said
    assert "without the optimizer" not in said
    expect_same_run(run, whole)


def test_a_start_that_was_cut_off_at_once(call: Callable[..., int], config: Path) -> None:
    """Catches: a folder that is no run's for ever, because its config never came to be."""
    folder(config).mkdir(parents=True)
    (folder(config) / ".lock").write_text("{}")
    (folder(config) / ".config.yaml.partial").write_text("run:")
    assert call(config) == 0
    assert not list(folder(config).parent.glob("tiny.*"))


@pytest.mark.parametrize("arguments", [(), ("--fresh",)])
def test_a_folder_that_another_job_has_made_meanwhile(
    arguments: tuple[str, ...], call: Callable[..., int], config: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Catches: a run that begins in, or renames, the folder of one that has begun while this one was starting."""
    first_model = run_module._first_model

    def slowly(job: Any) -> Any:
        folder(config).mkdir(parents=True)
        (folder(config) / "config.yaml").write_text("another's")
        return first_model(job)

    monkeypatch.setattr(run_module, "_first_model", slowly)
    assert call(config, *arguments) == 2
    assert "another job has begun a run" in capsys.readouterr().err
    assert (folder(config) / "config.yaml").read_text() == "another's"


def test_two_at_once(call: Callable[..., int], config: Path, capsys: Any) -> None:
    """Catches: two jobs that write into one run."""
    assert call(config, "--phase", "a") == 0
    code = "import sys\nfrom pathlib import Path\nfrom hybrid_dist.checkpoint import RunLock\n"
    code += f"RunLock(Path({str(folder(config))!r}), print).take()\nprint('held', flush=True)\nsys.stdin.read()\n"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, env=environment(), cwd=ROOT) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == b"held\n"
        before = {path: path.stat().st_mtime_ns for path in folder(config).rglob("*")}
        for arguments in ((), ("--fresh",)):
            assert call(config, *arguments) == 2
            assert f"is in use by process {other.pid} on " in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in folder(config).rglob("*")} == before
        other.stdin.close()
    assert call(config) == 0


def test_a_disk_that_is_full_for_a_while(
    call: Callable[..., int], config: Path, small_disk: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Catches: a full disk that ends the training between two checkpoints, or passes for a phase's good end; steps
    that are lost or doubled in metrics.jsonl and trace.jsonl once there is room again."""
    assert call(config, f"run.dir={config.parent / 'whole'}") == 0
    run, arguments = small_disk / "tiny", (f"run.dir={small_disk}",)  # and nothing is pruned: that would make room
    make_step, steps = phase_module.train_step, 0

    def step_with_neighbours(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps in (5, 12):
            fill(small_disk)
        elif steps == 7:
            (small_disk / "filler").unlink()
        return make_step(*arguments)

    monkeypatch.setattr(phase_module, "train_step", step_with_neighbours)
    capsys.readouterr()
    assert call(config, *arguments) == 2
    said = capsys.readouterr().err
    # Whatever becomes of the save that was under way: one that fails leaves less room than the next one needs.
    assert "warning: checkpoint b-5 can't be written: " in said
    assert "checkpoint b-7 can't" not in said
    assert "train.py: checkpoint c-12 can't be written: " in said
    assert "No space left" in said
    assert steps == 12
    assert not list(run.rglob("*.partial"))
    (small_disk / "filler").unlink()
    assert call(config, *arguments) == 0
    assert steps in (13, 14), "it went on from the step before, or the one before that, whose save was still under way"
    expect_same_run(run, folder(config, "whole"))


def moments(checkpoint: Path, part: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in checkpoint.glob("shard-*"):
        found |= {key: value for key, value in load_file(shard).items() if f"/{part}." in key}
    return found


@pytest.mark.parametrize("start", ["best", "last"])
def test_optimizer_state_goes_along(call: Callable[..., int], config: Path, start: str) -> None:
    """Catches: a phase that forgets its predecessor's moments, takes them of another step than its weights, or loses
    them to pruning; and update counts of old and new parameters mixed."""
    options = [f"phases.1.start={start}", "phases.1.carry_optimizer=true", "phases.0.steps=9", "checkpoint.keep=1"]
    # The best is not the last: a rate that does harm.
    options += ["phases.0.lr=0.05", "phases.0.warmup=0.0"]
    assert call(config, *options, "--phase", "a") == 0
    run = folder(config)
    best = json.loads((run / "phase_a/best.json").read_text())["step"]
    assert best < 9
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {"a-9", f"a-{best}"}
    before = moments(run / "checkpoints" / (f"a-{best}" if start == "best" else "a-9"), "heads")
    assert call(config, *options, "--phase", "b", "train.clip_norm=1e-9") == 2, "another config is another run"
    assert call(config, *options, "--phase", "b", "checkpoint.keep=50") == 0
    first = run / "checkpoints" / "b-10"
    after = moments(first, "heads")
    for key, value in before.items():
        if key.startswith("exp_avg_sq/"):
            # v' = β₂·v + (1 − β₂)·g², g being at most 1, the clipped norm
            assert (after[key] >= 0.999 * value * (1 - 1e-6)).all(), key
            assert (after[key] <= 0.999 * value * (1 + 1e-6) + 0.001 + 1e-9).all(), key
    with safe_open(first / SHARD, framework="pt") as file:
        steps = json.loads(file.metadata()["steps"])
    assert {steps[name] for name in steps if name.startswith("heads.")} == {(best if start == "best" else 9) + 1}
    assert {steps[name] for name in steps if name.startswith("transformer.")} == {1}


def test_loader_processes_are_older_than_the_model(call: Callable[..., int], config: Path, monkeypatch: Any) -> None:
    """Catches: ones that are forked from a process full of weights and moments, which then has to copy every page that
    it writes to; and new ones in each phase, or each validation."""
    others = set(multiprocessing.active_children())
    seen = []

    def look(original: Any) -> Callable[..., Any]:
        def looked(*arguments: Any, **options: Any) -> Any:
            seen.append({child.pid for child in set(multiprocessing.active_children()) - others})
            return original(*arguments, **options)

        return looked

    monkeypatch.setattr(job_module, "build_model", look(job_module.build_model))
    monkeypatch.setattr(PhaseLoop, "_save", look(PhaseLoop._save))
    assert call(config, "data.workers=1") == 0
    assert len(seen) > 6
    assert all(pids == seen[0] for pids in seen)
    assert len(seen[0]) == 2, "one for training, one for validation"
    assert not set(multiprocessing.active_children()) - others
