"""What a request to stop does to the process that hears it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_dist.training.stop import Stop
from tests.conftest import ROOT, environment

LISTEN = """
import sys, time
from pathlib import Path
from hybrid_dist.training.stop import Stop
stop = Stop(Path(sys.argv[1]), True)
stop.listen()
print("listening", flush=True)
while not stop.requested():
    time.sleep(0.01)
print(stop.reason, flush=True)
time.sleep(60)
"""


def test_interrupted_twice_stops_at_once(tmp_path: Path) -> None:
    """Catches: a second Ctrl-C that waits for what the first has begun."""
    command = [sys.executable, "-c", LISTEN, tmp_path]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"signal SIGINT\n"
        process.send_signal(signal.SIGTERM)  # a scheduler adds one: no reason to lose what is being saved
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT


def test_a_dead_parent_is_a_request_only_where_it_was_a_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: processes that a dead launcher leaves behind; a run under nohup that ends when its shell is left."""
    parent = os.getppid()
    for launched in (False, True):
        if launched:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        else:
            monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
            monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
        monkeypatch.setattr(os, "getppid", lambda: parent)
        stop = Stop(tmp_path, True)
        assert not stop.requested()
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.requested() is launched
