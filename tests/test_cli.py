"""The `hybrid-dist` command: what it prints, its JSON, its exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid_dist import cli
from tests.conftest import ROOT, environment, launch, tiny_values

COMMAND = str(Path(sys.executable).with_name("hybrid-dist"))


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two phases with every checkpoint kept."""
    from ruamel.yaml import YAML

    folder = tmp_path_factory.mktemp("finished")
    values = tiny_values(tiny_data, folder)
    values["phases"] = [phase | {"steps": 4} for phase in values["phases"][:2]]
    values["checkpoint"] = {"every_steps": 2, "keep": 9}
    YAML().dump(values, folder / "config.yaml")
    launch("--config", str(folder / "config.yaml"))
    return folder / "runs" / "tiny"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(finished, tmp_path / "tiny")
    return tmp_path / "tiny"


def ask(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The installed command, as a script would call it."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)], env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


def test_checkpoints_of_a_good_run(run: Path) -> None:
    """Catches: a listing that loses, reorders or misjudges a checkpoint, or touches one."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = ask("checkpoints", run, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == ["b-8", "b-6", "a-4", "a-2"], "in the order in which a resume tries them"
    assert [row["step"] for row in rows] == [8, 6, 4, 2]
    assert [row["finished"] for row in rows] == [True, False, True, False]
    assert all(row["problem"] is None and row["bytes"] > 10_000 for row in rows)
    best = json.loads((run / "phase_b/best.json").read_text())["step"]
    assert [row["step"] for row in rows if row["best"] and row["phase"] == "b"] == [best]

    done = ask("checkpoints", run)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["checkpoint", "size", "written", "by", "state"]
    assert [line.split()[0] for line in lines[1:]] == ["b-8", "b-6", "a-4", "a-2"]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_checkpoints_of_a_damaged_run(run: Path) -> None:
    """Catches: a flipped bit, a lost file or what a kill left behind passed over in silence."""
    shard = next((run / "checkpoints/b-8").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    (run / "checkpoints/a-4/manifest.json").unlink()
    shutil.copytree(run / "checkpoints/a-2", run / "checkpoints/.b-9.1-2.partial")
    done = ask("checkpoints", run, "--json")
    assert done.returncode == 3
    problems = {row["name"]: row["problem"] for row in json.loads(done.stdout)}
    assert list(problems) == ["b-8", "b-6", "a-4", "a-2"]
    assert problems["a-2"] is None
    assert problems["b-6"] is None
    assert "manifest.json" in problems["a-4"]
    assert shard.name in problems["b-8"]

    done = ask("checkpoints", run)
    assert done.returncode == 3
    assert done.stdout.count("damaged: ") == 2


def test_checkpoints_elsewhere(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a stack trace for a wrong path; an empty table without a word."""
    for folder in (tmp_path / "nowhere", ROOT):
        assert cli.main(["checkpoints", str(folder)]) == 2
        assert "not a run's folder" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    assert cli.main(["checkpoints", str(run)]) == 0
    assert "no checkpoint yet" in capsys.readouterr().out
    assert cli.main(["checkpoints", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_bench_checkpoint(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """Catches: a measurement that does not run under a launch file, or counts what it should not."""
    config = tiny_config()
    file = "launch/accelerate/zero3.yaml"
    done = subprocess.run(
        [COMMAND, "bench", "checkpoint", "--config", str(config), "--launch", file, "--repeats", "2", "--json"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(done.stdout)
    assert row["launch"] == file
    assert row["topology"].startswith("ZeRO 3 × 2")
    assert row["repeats"] == 2
    assert row["bytes"] > 12 * row["parameters"], "weights and both moments, fp32"
    assert 0 < row["blocked_s"] <= row["total_s"]
    assert row["ratio"] == pytest.approx(row["blocked_s"] / row["save_state_s"])

    done = ask("bench", "checkpoint", "--config", tmp_path / "nowhere.yaml")
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr
    assert done.stderr.count("\n") == 1


def test_bench_data(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: figures that scripts can't read; a packed copy that is there and not measured, or stale and measured."""
    from ruamel.yaml import YAML

    shutil.copytree(tiny_data, tmp_path / "data")
    YAML().dump(tiny_values(tmp_path / "data", tmp_path), tmp_path / "config.yaml")
    config = str(tmp_path / "config.yaml")
    command = ["bench", "data", "--config", config, "--pictures", "64", "--repeats", "2"]
    assert cli.main([*command, "--json"]) == 0
    assert [row["path"] for row in json.loads(capsys.readouterr().out)] == ["plain"]
    assert cli.main(["pack", "--config", config]) == 0
    capsys.readouterr()
    assert cli.main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["path"] for row in rows] == ["plain", "packed"]
    assert all(0 < row["lowest"] <= row["images_per_s_per_worker"] <= row["highest"] for row in rows)
    assert cli.main(["bench", "data", "--config", config, "--repeats", "0"]) == 2
    assert cli.main(["check-data", "--config", config, "data.val_images=s3://bucket/val"]) == 2
    assert "s3://bucket/val" in capsys.readouterr().err
    assert cli.main([*command, "data.image_size=64"]) == 0
    said = capsys.readouterr().out
    assert "plain: " in said
    assert "no packed copy that fits" in said


def test_bench_step(
    tiny_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: figures that scripts can't read or that contradict each other; a frozen part that is counted as trained;
    an update within the backward that counts twice; a phase that is not there and measured all the same."""
    from hybrid_dist.bench import step

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    phases = [
        {"name": name, "trainable": [what], "steps": 9, "lr": 1e-3} for name, what in (("a", "heads"), ("c", "all"))
    ]
    config = str(tiny_config(phases=phases))
    command = [
        "bench",
        "step",
        "--config",
        config,
        "--steps",
        "2",
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
    ]
    assert cli.main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["phase"] for row in rows] == ["a", "c"]
    for row in rows:
        assert row["topology"] == "one process on cpu"
        assert row["images_per_s"] * row["seconds"] == pytest.approx(4)
        assert row["tflops"] * 1e12 == pytest.approx(row["flops_per_image"] * row["images_per_s"])
        assert row["lowest"] <= row["seconds"] <= row["highest"]
        assert min(row[f"{part}_s"] for part in step.PARTS) > 0
        assert row["mfu"] is None
    heads, everything = rows
    assert heads["trainable"] < everything["trainable"] == everything["parameters"] == heads["parameters"]
    assert 2.3 * heads["flops_per_image"] < everything["flops_per_image"]

    monkeypatch.setattr(sys, "argv", ["step", *command[2:], "--phase", "a", "--out", str(tmp_path / "rows.json")])
    assert step.main() == 0, "a rank under a launch file"
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["phase"], row["flops_per_image"]) == ("a", heads["flops_per_image"])
    lines = step.describe(rows).splitlines()
    assert len(lines) == 4 and lines[-1].startswith("c ")

    for wrong, said in ((["--phase", "d"], "the phases a, c"), (["--steps", "0"], "1 or more"),
                        (["train.micro_batch_size=3"], "train.micro_batch_size")):  # fmt: skip
        assert cli.main([*command, *wrong]) == 2
        assert said in capsys.readouterr().err

    parsed = cli._parse(
        ["bench", "step", "--config", config, "--launch", "a.yaml", "b.yaml", "train.ema=0.9", "--steps", "2"]
    )
    assert (parsed.launch, parsed.overrides) == (["a.yaml", "b.yaml"], ["train.ema=0.9"])

    now = iter((0.0, 1.0, 3.0, 6.0, 10.0, 15.0))
    monkeypatch.setattr(step.time, "perf_counter", lambda: next(now))
    clock = step.PartClock(lambda: None)
    with clock.span("backward"), clock.span("optimizer"):
        pass
    with clock.span("forward"):
        pass
    assert clock.seconds == {"forward": 5.0, "backward": 1.0 + 3.0, "optimizer": 2.0}
