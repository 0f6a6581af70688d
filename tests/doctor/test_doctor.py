"""doctor: what would fail in the queue is told before it, with what would do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid_dist import cli
from hybrid_dist.config import load_config
from hybrid_dist.doctor import together
from hybrid_dist.doctor.line import Line
from hybrid_dist.doctor.memory import memory_lines
from tests.conftest import ROOT, environment, fill, write_split

COMMAND = [sys.executable, "-c", "import sys; from hybrid_dist.cli import main; sys.exit(main())", "doctor", "--json"]


@pytest.fixture
def no_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the all-reduce, which takes seconds."""
    monkeypatch.setattr("hybrid_dist.doctor.examination.local_line", lambda processes: Line("all-reduce", "ok", ""))


def examine(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    code = cli.main(["doctor", "--json", *arguments])
    return code, {line["check"]: line for line in json.loads(capsys.readouterr().out)}


def test_a_machine_that_is_all_right(tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: an alarm where all is well; processes that do not really meet; a probe that stays on the disk."""
    config = tiny_config()
    code, lines = examine(capsys, "--config", str(config))
    assert code == 0, lines
    assert {line["state"] for line in lines.values()} <= {"ok", "warn"}
    assert lines["all-reduce"]["text"].startswith("2 processes over gloo: ")
    assert "56 pictures" in lines["data, train"]["text"]
    assert "torch " in lines["versions"]["text"]
    assert lines["memory"]["state"] == "ok"
    assert "in main memory" in lines["memory"]["text"]
    assert not list(config.parent.glob(".hybrid-dist*"))
    assert cli.main(["doctor", "run.name=x"]) == 2


@pytest.mark.usefixtures("no_ring")
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be the GPU's affair")
def test_a_cpu_without_bf16(
    tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: ten times the time for nothing, unsaid; an alarm where the CPU has it, or nobody asked for it."""
    config = str(tiny_config())
    for there, precision, warned in ((False, "bf16", True), (True, "bf16", False), (False, "fp32", False)):
        monkeypatch.setattr("hybrid_dist.doctor.host.has_bf16", lambda device, there=there: there)
        code, lines = examine(capsys, "--config", config, f"train.precision={precision}")
        assert code == 0 and ("precision" in lines) == warned
    assert lines["GPUs"]["state"] == "ok"


@pytest.mark.usefixtures("no_ring")
def test_what_would_fail(
    tiny_config: Callable[..., Path], small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Catches: a start that fails in the queue and that the doctor let pass; a check that hides those after it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fill(small_disk)
    changes = (
        f"run.dir={small_disk}", "data.val_csv=none.csv", "model.allow_scratch=false", "data.workers=400",
        "data.image_size=2048", "train.micro_batch_size=4096", "train.global_batch_size=4096",
    )  # fmt: skip
    code, lines = examine(capsys, "--config", str(tiny_config()), *changes)
    assert code == 3
    bad = {check for check, line in lines.items() if line["state"] == "fail"}
    assert {"disk", "data", "weights, cnn", "weights, transformer", "memory"} <= bad
    assert all(lines[check]["remedy"] for check in bad)
    assert "none.csv" in lines["data"]["text"]
    code, lines = examine(capsys, "--config", str(tiny_config()), "data.max_bad=0", f"data.val_images={tmp_path}")
    assert code == 3
    assert lines["data, val"]["state"] == "fail"
    assert lines["data, train"]["state"] == "ok"


def test_memory_of_the_gpus(tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a config that runs out of memory in its last phase only, and a remedy that would too."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    def lines(memory: int, *changes: str) -> list[Line]:
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(total_memory=memory))
        return list(memory_lines(load_config(tiny_config(), changes)))

    (line,) = lines(80_000_000_000)
    assert line.state == "ok"
    assert line.text.startswith("phase c takes about 1.")
    assert line.text.endswith("on each of 2 GPUs, micro batch 8, ddp")
    (line,) = lines(1_540_000_000, "data.image_size=192")
    assert line.state == "fail"
    assert line.remedy.startswith("train.micro_batch_size=")
    assert line.remedy.endswith("with launch/accelerate/ddp.yaml would fit")
    (line,) = lines(1_000_000_000)
    assert line.state == "fail"
    assert "plan" in line.remedy
    (line,) = lines(80_000_000_000, "train.micro_batch_size=5")
    assert line.state == "warn"
    assert "does not divide" in line.text


def test_processes_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a hang, or a traceback, where a process dies at once."""
    monkeypatch.setenv("PYTHONHASHSEED", "no number")  # Python itself refuses to start
    line = together.local_line(2)
    assert line.state == "fail"
    assert line.remedy


def tasks(folder: Path, count: int, *arguments: list[str]) -> list[subprocess.Popen[str]]:
    """`count` of two tasks, each with its arguments, as srun would start them, with a stand-in for scontrol."""
    folder.mkdir(exist_ok=True)
    (folder / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\necho 127.0.0.1\n")
    (folder / "scontrol").chmod(0o755)
    facts = {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_STEP_NODELIST": "n[1-2]", "PATH": f"{folder}:{os.environ['PATH']}",
    }  # fmt: skip
    return [
        subprocess.Popen(
            COMMAND + arguments[rank], cwd=ROOT, env={**environment(), **facts, "SLURM_PROCID": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]  # fmt: skip


def results(started: list[subprocess.Popen[str]]) -> list[tuple[int, Any]]:
    found = []
    for process in started:
        try:
            out, _ = process.communicate(timeout=240)
        finally:
            process.kill()
        found.append((process.returncode, json.loads(out) if out else None))
    return found


def test_under_srun(tmp_path: Path, tiny_config: Callable[..., Path]) -> None:
    """Catches: a node that nobody looks at; lines that each task prints; tasks that do not meet; a table or a config
    that is another one on some node."""
    config = ["--config", str(tiny_config())]
    write_split(tmp_path / "other", "train", 56, seed=4, blank=0.25)
    other = f"data.train_csv={tmp_path / 'other' / 'train.csv'}"
    (code, lines), _ = results(tasks(tmp_path / "bin", 2, config, [*config, other, "train.global_batch_size=32"]))
    assert code == 3
    (line,) = [line for line in lines if line["state"] == "fail"]
    assert line["check"] == "alike"
    assert "rank 1 on" in line["text"]
    assert "train.global_batch_size is 16 on rank 0 and 32 there" in line["text"]
    assert "data.train_csv is " in line["text"]

    (main, lines), rest = results(tasks(tmp_path / "bin", 2, [], []))
    assert (main, rest) == (0, (0, None))
    by_check = {line["check"]: line for line in lines}
    assert by_check["rendezvous"]["text"] == "2 tasks on 1 hosts have met"
    assert by_check["all-reduce"]["text"].startswith("2 processes over gloo")
    assert by_check["clocks"]["state"] == "ok"
    assert by_check["alike"]["state"] == "ok"
    assert by_check["versions"]["host"]


def test_a_node_that_is_not_reached(tmp_path: Path) -> None:
    """Catches: a job that waits half an hour for a node that does not come."""
    ((code, lines),) = results(tasks(tmp_path / "bin", 1, []))
    assert code == 3
    (line,) = [line for line in lines if line["check"] == "rendezvous"]
    assert line["state"] == "fail"
    assert "127.0.0.1" in line["text"]
    assert line["remedy"]
