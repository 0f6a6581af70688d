"""What a request to stop does to the process that hears it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hybrid_dist.training.stop import SIGNALS, Stop
from tests.conftest import ROOT, environment

LISTEN = """
import ctypes, signal, sys, time
from hybrid_dist.training.stop import Stop
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # the tests themselves may run in the background
stop = Stop()
stop.listen()
if sys.argv[1] == "training":
    stop.wait_for_the_loop()
print("listening", flush=True)
if sys.argv[1] == "training":
    while not stop.requested():
        time.sleep(0.01)
    print(stop.reason, flush=True)
# In C for good, where no handler in Python ever runs: as in a collective whose other ranks don't come.
system, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
for _ in range(2):
    system.pthread_mutex_lock(mutex)
"""


@contextmanager
def listening(moment: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", LISTEN, moment]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listening\n"
            yield process
        finally:
            process.kill()


def test_interrupted_twice_stops_at_once() -> None:
    """Catches: a second Ctrl-C that waits for what the first has begun, or for code that is not Python's."""
    with listening("training") as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"signal SIGINT\n"
        process.send_signal(signal.SIGTERM)  # a scheduler adds one: no reason to lose what is being saved
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


@pytest.mark.parametrize("number", SIGNALS)
def test_before_training_there_is_nothing_to_wait_for(number: signal.Signals) -> None:
    """Catches: a job that its scheduler wants back while the ranks meet, killed for not listening, or with a code that
    says that it crashed."""
    with listening("start-up") as process:
        time.sleep(0.5)  # by then it is in C
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 75
        assert said.decode().startswith(f"train.py: {number.name} before training began")


def test_a_file_from_before(tmp_path: Path) -> None:
    """Catches: a request meant for an earlier start that ends this one; one made since then that is thrown away."""
    file, said = tmp_path / "STOP", []
    file.touch()
    os.utime(file, (time.time() - 60, time.time() - 60))
    stop = Stop()
    stop.look_for(file)
    stop.clear_stale(said.append)
    assert not file.exists()
    assert len(said) == 1
    file.touch()
    os.utime(file, (time.time() + 1, time.time() + 1))
    stop.clear_stale(said.append)
    assert stop.requested()
    assert len(said) == 1


def test_a_file_from_before_memory_ran_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a request that falls into the moment in which a process begins anew, and is lost."""
    monkeypatch.setattr("hybrid_dist.again.times", lambda: 1)
    file = tmp_path / "STOP"
    file.touch()
    os.utime(file, (time.time() - 2, time.time() - 2))
    stop = Stop()
    stop.look_for(file)
    stop.clear_stale(pytest.fail)
    assert stop.requested()


def test_a_dead_parent_is_a_request_only_where_it_was_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: processes that a dead launcher leaves behind; a run under nohup that ends when its shell is left."""
    parent = 4242
    for launched in (False, True):
        if launched:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        else:
            monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
            monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
        monkeypatch.setattr(os, "getppid", lambda: parent)
        stop = Stop()
        assert not stop.requested()
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.requested() is launched
