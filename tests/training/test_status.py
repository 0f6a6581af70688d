"""status.json: what became of a run, whoever writes it."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hybrid_dist.tracking import Status
from tests.conftest import ROOT, environment


def test_the_first_reason_stays(tmp_path: Path) -> None:
    """Catches: what all the others ran into in place of why; a reason of an earlier start kept for this one's."""
    said: list[str] = []
    main, other = (Status(tmp_path, is_main, said.append) for is_main in (True, False))
    main.failed("an earlier start's")
    main.failed("before training")
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == "before training"
    for status in (main, other):
        status("running", "a", 7, "")
    other.failed("rank 1: it")
    main.failed("rank 0: Connection closed by peer")
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["state"], found["phase"], found["step"], found["reason"]) == ("failed", "a", 7, "rank 1: it")
    assert not said
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


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
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
        )

    with ThreadPoolExecutor() as pool:
        for done in pool.map(write, "ab"):
            assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "status.json").read_text())["reason"] in ("a: 299", "b: 299")
