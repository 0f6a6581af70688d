"""Asked to stop, in every way and at every moment, through a launcher; and stuck."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from ruamel.yaml import YAML

from tests.conftest import ROOT, command_line, environment, launch, tiny_values
from tests.distributed.running import Running, block_pictures, expect_same_run

SECONDS = 30
"""From the request to the end of the last process; after that long a launcher kills."""


def make_config(data: Path, folder: Path, steps: int, **train: object) -> Path:
    """A copy of the data, so that pictures can be taken away; a loader process for each rank."""
    shutil.copytree(data, folder / "data")
    values = tiny_values(folder / "data", folder)
    values["data"]["workers"] = 1
    values["train"].update(train)
    values["checkpoint"] = {"every_steps": 7, "keep": 2}
    for phase in values["phases"]:
        phase["steps"] = steps
    YAML().dump(values, folder / "config.yaml")
    return folder / "config.yaml"


def is_writing(run: Path) -> bool:
    return any((run / "checkpoints").glob(".*.partial"))


def test_every_way_to_ask_loses_nothing(tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a request that a launcher, a loader process, a wait for data or a write turns into a loss; orphans; a
    stop at different steps on different ranks, after which the ends would differ."""
    config = make_config(tiny_data, tmp_path, steps=40)
    launch("--config", str(config), f"run.dir={tmp_path / 'whole'}", config_file="ddp")
    run, at = tmp_path / "runs" / "tiny", 0

    def ask(said: str, request: Callable[[Running], None], ready: Callable[[Running], bool] | None = None) -> None:
        nonlocal at
        with Running(config, run, "ddp") as training:
            assert training.wait_for("a step", lambda: training.steps() > at + 2), training.tail()
            if ready is not None:
                assert training.wait_for(said, lambda: ready(training), poll=0.0005), training.tail()
            request(training)
            began = time.monotonic()
            assert training.end(SECONDS + 10) != 0
            assert time.monotonic() - began < SECONDS, said
            status = training.status()
            assert status["state"] == "stopped", (said, training.tail())
            assert said in status["reason"]
            assert status["step"] >= at
            at = status["step"]
            newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
            assert json.loads((newest / "state.json").read_text())["step"] == at

    def to_launcher(number: signal.Signals) -> Callable[[Running], None]:
        return lambda training: os.kill(training.launcher.pid, number)

    ask("SIGTERM", to_launcher(signal.SIGTERM))
    ask("SIGINT", to_launcher(signal.SIGINT), lambda training: is_writing(run))
    ask("launcher is gone", to_launcher(signal.SIGUSR1))
    ask("STOP", lambda training: (run / "STOP").touch())
    # To one rank alone, and in a way that reaches its loader process too.
    ask("SIGUSR2", lambda training: training.ranks()[0].send_signal(signal.SIGUSR2))
    ask("SIGHUP", lambda training: [process.send_signal(signal.SIGHUP) for process in training.tree()] and None)
    given_back = []

    def block_and_terminate(training: Running) -> None:
        given_back.append(block_pictures(tmp_path))
        still = -1
        while training.steps() != still:  # the loop waits for pictures that never come
            still = training.steps()
            time.sleep(2)
        os.kill(training.launcher.pid, signal.SIGTERM)

    try:
        ask("SIGTERM", block_and_terminate)
    finally:
        given_back[0]()
    launch("--config", str(config), config_file="ddp")
    expect_same_run(run, tmp_path / "whole" / "tiny")


def test_the_code_of_a_stop_in_the_middle_of_a_picture(tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a crash at the very end, where a thread comes back from a decoder into a Python that is no more: a
    script would not start it again."""
    config, run = make_config(tiny_data, tmp_path, steps=400), tmp_path / "runs" / "tiny"
    noise = np.random.default_rng(0).integers(0, 255, (1500, 1500, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "large.png"), noise)
    for picture in (tmp_path / "data" / "train").iterdir():
        picture.unlink()
        os.link(tmp_path / "large.png", picture)
    at = 0
    for _ in range(3):  # it is a race that the crash has to win
        with Running(config, run, None, "data.workers=0") as training:
            assert training.wait_for("a step", lambda at=at: training.steps() > at), training.tail()
            training.launcher.terminate()
            assert training.end(SECONDS) == 75, training.tail()
            assert training.status()["state"] == "stopped"
            at = training.steps()


def test_a_terminal_that_is_left(tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a progress bar that ends the run because nobody sees it any more, before the checkpoint is written."""
    config, run = make_config(tiny_data, tmp_path, steps=40), tmp_path / "runs" / "tiny"
    ours, theirs = pty.openpty()

    def as_in_a_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup

    command = command_line("--config", str(config), "data.workers=0")
    training = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=as_in_a_terminal,
    )  # fmt: skip
    try:
        os.close(theirs)
        seen, until = b"", time.monotonic() + 120
        while seen.count(b"phase a") < 5 and time.monotonic() < until:  # its bar is drawn
            seen += os.read(ours, 4096)
        os.close(ours)
        assert training.wait(SECONDS) == 75
    finally:
        training.kill()
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "signal SIGHUP")


def test_a_rank_that_crashes_says_why(tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a traceback that is never printed, for its rank waits for the others; a reason that is only what the
    others then ran into."""
    config, run = make_config(tiny_data, tmp_path, steps=40), tmp_path / "runs" / "tiny"
    done = launch("--config", str(config), config_file="zero3", script="tests/distributed/crash.py", check=False)
    assert done.returncode != 0
    assert "RuntimeError: out of cheese" in done.stderr
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["phase"]) == ("failed", "a")
    assert status["reason"] == "rank 1: RuntimeError: out of cheese"


def stacks(run: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (run / "stacks").glob("rank-*.txt")}


def test_stuck_in_the_data(tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a job that waits for a dead file system until its time is up; stacks that don't show where."""
    config = make_config(tiny_data, tmp_path, steps=40, stall_timeout=6.0)
    run = tmp_path / "runs" / "tiny"
    with Running(config, run, "zero2") as training:
        assert training.wait_for("a step", lambda: training.steps() > 2), training.tail()
        give_back = block_pictures(tmp_path)
        try:
            assert training.end(90) != 0
        finally:
            give_back()
        assert training.status()["state"] == "failed"
        # One of them may have had its pictures still.
        where = (
            r"stuck: no progress for 6 s at ranks? (0|1|0, 1)"
            rf" \(waiting for its data: loader process 0 \(\d+\) at {tmp_path}/data/train/\d+\.png, on "
        )
        assert re.match(where, training.status()["reason"]), training.status()["reason"]
        assert training.status()["step"] > 0
    found = stacks(run)
    assert sorted(found) == ["rank-00000.txt", "rank-00001.txt"]
    for text in found.values():
        assert "feed.py" in text
        assert "dataloader.py" in text


def test_a_frozen_rank_is_named(tiny_data: Path, tmp_path: Path) -> None:
    """Catches: ranks that wait for ever for one that does not come."""
    config = make_config(tiny_data, tmp_path, steps=400, stall_timeout=6.0)
    run = tmp_path / "runs" / "tiny"
    with Running(config, run, "ddp") as training:
        assert training.wait_for("a step", lambda: training.steps() > 2), training.tail()
        frozen = next(process for process in training.ranks() if process.environ()["RANK"] == "1")
        frozen.suspend()
        assert training.end(90) != 0
        assert training.status()["state"] == "failed"
        assert "at rank 1 (frozen or gone: it wrote no stack)" in training.status()["reason"]
    assert sorted(stacks(run)) == ["rank-00000.txt"]


def test_suspended_as_a_whole_is_not_stuck(tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a job that a scheduler suspends and resumes, ended for the time in between."""
    config = make_config(tiny_data, tmp_path, steps=40, stall_timeout=4.0)
    run = tmp_path / "runs" / "tiny"
    with Running(config, run, "ddp") as training:
        assert training.wait_for("a step", lambda: training.steps() > 2), training.tail()
        processes = training.tree()
        for process in processes:
            process.suspend()
        time.sleep(8)
        for process in processes:
            process.resume()
        assert training.end() == 0, training.tail()


def test_a_launcher_that_dies_before_the_ranks_have_met(tiny_data: Path, tmp_path: Path) -> None:
    """Catches: ranks that go on waiting for each other, half an hour long, in a store that is no more."""
    config, run = make_config(tiny_data, tmp_path, steps=40), tmp_path / "runs" / "tiny"
    with Running(config, run, "ddp") as training:
        assert training.wait_for("the ranks", lambda: len(training.ranks()) == 2)
        time.sleep(1)  # Python itself has to be up
        training.launcher.kill()
        training.end(SECONDS)
    assert not run.exists()
