"""A training that runs beside the test: watched, signalled, killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import train
from tests.conftest import ROOT, command_line, environment, read_lines


class Running:
    """`train.py` under a launcher, in a session of its own."""

    def __init__(self, config: Path, run: Path, config_file: str | None, *arguments: str):
        self.run = run
        self.log = run.parent.parent / "log.txt"
        command = command_line("--config", str(config), *arguments, config_file=config_file)
        with self.log.open("ab") as log:
            self.launcher = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
            )
        self.seen: set[psutil.Process] = set()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill_all()

    def tree(self) -> list[psutil.Process]:
        """The launcher and all below it, and those that were once."""
        try:
            parent = psutil.Process(self.launcher.pid)
            self.seen |= {parent, *parent.children(recursive=True)}
        except psutil.NoSuchProcess:
            pass
        return [process for process in self.seen if _lives(process)]

    def ranks(self) -> list[psutil.Process]:
        """The training processes, in no order; without launchers and loader processes."""
        found = []
        for process in self.tree():
            try:
                command, parent = process.cmdline(), process.parent()
                is_worker = parent is not None and parent.cmdline() == command
            except psutil.Error:
                continue
            if "train.py" in command and "accelerate.commands.launch" not in command and not is_worker:
                found.append(process)
        return found

    def wait_for(self, what: str, test: Callable[[], Any], seconds: float = 300, poll: float = 0.01) -> bool:
        """True once `test` holds; False if the launcher ends before; fails after `seconds`."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if test():
                self.tree()  # those that are there: they may outlive the launcher
                return True
            if self.launcher.poll() is not None:
                return False
            time.sleep(poll)
        pytest.fail(f"waited {seconds} s for {what}; {self.tail()}")

    def end(self, seconds: float = 300) -> int:
        """The launcher's exit code, once every process is gone."""
        until = time.monotonic() + seconds
        while self.tree():
            self.launcher.poll()
            if time.monotonic() > until:
                pytest.fail(f"still running after {seconds} s: {self.tree()}; {self.tail()}")
            time.sleep(0.05)
        return self.launcher.wait()

    def kill_all(self) -> None:
        """SIGKILL to each of them, at once."""
        for process in self.tree():
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.launcher.wait()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.run / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def steps(self) -> int:
        """Lines in trace.jsonl."""
        try:
            return (self.run / "trace.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # has ended between the two
        return False


def run_here(config: Path, *overrides: str) -> Path:
    """Train in this process, to the end; the run's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(sys, "argv", ["train.py", "--config", str(config), *overrides])
        assert train.main() == 0
    return config.parent / "runs" / "tiny"


def expect_same_run(run: Path, whole: Path) -> None:
    """Everything that a run leaves is equal, to the bit; times aside."""
    phases = [folder.name for folder in whole.glob("phase_*")]
    assert phases
    for name in [f"{phase}/best" for phase in phases] + ["model/model"]:
        want, have = load_file(whole / f"{name}.safetensors"), load_file(run / f"{name}.safetensors")
        assert want.keys() == have.keys()
        assert all(torch.equal(want[key], have[key]) for key in want), name
    for name in ["trace.jsonl", *(f"{phase}/predictions_val.csv" for phase in phases)]:
        assert (run / name).read_text() == (whole / name).read_text(), name
    assert without_times(run) == without_times(whole)


def without_times(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl but for what a clock says."""
    lines = read_lines(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "time" and "perf/" not in key} for line in lines]


def block_pictures(folder: Path) -> Callable[[], None]:
    """Pictures that can be opened, and never give a byte; returns what gives them back."""
    split, kept = folder / "data" / "train", folder / "data" / "kept"
    kept.mkdir()
    for picture in split.iterdir():
        os.link(picture, kept / picture.name)
        os.mkfifo(kept / "pipe")
        (kept / "pipe").replace(picture)  # never a moment without a file

    def give_back() -> None:
        shutil.rmtree(split)
        kept.rename(split)

    return give_back
