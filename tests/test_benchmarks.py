"""The benchmark that runs a training of this project's with code of its own beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.timeout(400)
def test_the_loop_and_a_bare_one_make_all_their_steps() -> None:
    """Catches: a change of the loop, its loaders or its model that the bare loop beside it does not survive."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "benchmarks/loop.py", "--steps", "25", "--json", "train.global_batch_size=8"]
    words.append("train.micro_batch_size=8")
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=380)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["steps"] == 20
    assert 0 < found["low"] <= found["ratio"] <= found["high"]
