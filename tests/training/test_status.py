"""status.json: what became of a run, whoever writes it."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hybrid_dist.tracking import Status, files
from tests.conftest import ROOT, environment


def test_the_first_reason_stays(tmp_path: Path) -> None:
    """Catches: what all the others ran into in place of why; a reason of an earlier start kept for this one's."""
    said: list[str] = []
    main, other = (Status(tmp_path, is_main, said.append) for is_main in (True, False))
    main.failed("an earlier start's")
    main.failed("before training")
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == "before training"
    for status in (main, other):
        status("running", "a", 6, "")
        status("running", "a", 7, "")
    other.failed("rank 1: it")
    main.failed("rank 0: Connection closed by peer")
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["state"], found["phase"], found["step"], found["reason"]) == ("failed", "a", 7, "rank 1: it")
    assert not said
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_run_that_goes_on_does_not_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a write to a slow disk with every line of metrics; a phase, an end or a later step that is not told."""
    times = iter([100.0, 101.0, 104.9, 105.1, 105.2, 105.3])
    monkeypatch.setattr(files.time, "monotonic", lambda: next(times))
    status = Status(tmp_path, True, print)

    def told(state: str, phase: str, step: int) -> tuple[str, int]:
        status(state, phase, step, "")
        found = json.loads((tmp_path / "status.json").read_text())
        return found["phase"], found["step"]

    assert [told("running", "a", step) for step in (0, 1, 2)] == [("a", 0)] * 3
    assert told("running", "a", 3) == ("a", 3)
    assert told("running", "b", 4) == ("b", 4)
    assert told("stopped", "b", 5) == ("b", 5)


def test_failing_together(tmp_path: Path) -> None:
    """Catches: ranks that write at the same time and take each other's half-written file away."""
    script = """
import sys
from pathlib import Path
from hybrid_dist.tracking import Status
status = Status(Path(sys.argv[1]), False, lambda text: sys.exit(text))
for turn in range(300):
    status.failed(f"{sys.argv[2]}: {turn}")
"""

    def write(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, str(tmp_path), name]
        return subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
        )

    with ThreadPoolExecutor() as pool:
        for done in pool.map(write, "ab"):
            assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "status.json").read_text())["reason"] in ("a: 299", "b: 299")
