"""`train.micro_batch_size: auto`, where memory runs out: an allocator gives each process so much and no more."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from hybrid_dist.files import read_lines, read_object
from tests.conftest import launch, tiny_values
from tests.distributed.running import run_here


def lines(path: Path) -> list[dict[str, Any]]:
    """Of a file that begins with an empty one."""
    return list(read_lines(path))


LITTLE = "tests/distributed/little_memory.py"


def write(data: Path, folder: Path, micro_batch: Any) -> Path:
    """A run whose last phase needs more than 300 MB for its 48 pictures at once, and more than 150 for 24."""
    folder.mkdir()
    values = tiny_values(data, folder)
    values["model"]["dropout"] = values["model"]["transformer"]["kwargs"]["drop_path_rate"] = 0.2
    values["model"]["cnn"]["kwargs"]["dims"] = [24, 32, 48, 64]
    values["data"]["image_size"] = 192
    values["train"] |= {"global_batch_size": 48, "micro_batch_size": micro_batch}
    values["phases"] = [values["phases"][0] | {"steps": 2}, values["phases"][2] | {"steps": 3}]
    values["checkpoint"] = {"every_steps": 1}
    YAML().dump(values, folder / "config.yaml")
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The allocator."""
    library = tmp_path_factory.mktemp("allocator") / "little_memory.so"
    source = Path(__file__).with_name("little_memory.c")
    subprocess.run(["c++", "-x", "c", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=60)
    return library


@pytest.fixture
def give(preload: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Says how many megabytes what is launched from now on gets, by rank."""

    def set_to(megabytes: str) -> None:
        monkeypatch.setenv("LD_PRELOAD", str(preload))
        monkeypatch.setenv("LITTLE_MEMORY", megabytes)

    return set_to


@pytest.fixture(scope="module")
def reference(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with a micro batch of its own, and memory for it."""
    folder = tmp_path_factory.mktemp("memory") / "whole"
    launch("--config", str(write(tiny_data, folder, 48)))
    return folder / "runs" / "tiny"


@pytest.mark.parametrize(
    ("name", "config_file", "megabytes", "sizes"),
    [
        pytest.param("one", None, "300", [48], marks=pytest.mark.slow),  # the other has all that this one has
        ("ZeRO 3, rank 1 alone", "zero3", "0,100", [24, 12]),
    ],
)
def test_halved_until_it_fits(
    name: str, config_file: str | None, megabytes: str, sizes: list[int], reference: Path, tiny_data: Path,
    tmp_path: Path, give: Callable[[str], None],
) -> None:  # fmt: skip
    """Catches: ranks that wait for the one that has run out, a start that finds what the last one has left or obeys an
    old note, another trajectory with another micro batch, one that is tried for ever."""
    config = write(tiny_data, tmp_path / "auto", "auto")
    run = run_here(config, "--phase", "a")
    old = {"start": "another", "begun_anew": 0, "micro_batch": 48, "on": "other GPUs", "rank": 1}
    (run / "out_of_memory.jsonl").write_text(json.dumps(old) + "\n")
    give(megabytes)
    done = launch("--config", str(config), script=LITTLE, config_file=config_file)
    assert read_object(run / "status.json")["state"] == "finished"
    tried = [line for line in lines(run / "out_of_memory.jsonl") if line["start"] != "another"]
    assert len(tried) + 2 == len(lines(run / "starts.jsonl")), "an old note is no news"
    assert [line["micro_batch"] for line in tried] == sizes
    assert [line["begun_anew"] for line in tried] == list(range(len(sizes)))
    assert {line["rank"] for line in tried} == {0 if config_file is None else 1}
    assert f"auto takes {sizes[-1] // 2} (" in done.stderr
    want, have = lines(reference / "trace.jsonl"), lines(run / "trace.jsonl")
    assert [(line["step"], line["digest"]) for line in have] == [(line["step"], line["digest"]) for line in want]
    for line, wanted in zip(have, want, strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-5), line["step"]


def test_what_to_do_is_said(tiny_data: Path, tmp_path: Path, give: Callable[[str], None]) -> None:
    """A micro batch that the config names is nobody else's to change."""
    config = write(tiny_data, tmp_path / "fixed", 48)
    give("300")
    done = launch("--config", str(config), check=False)
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("train.py: rank 0 on ") and "ran out of memory in phase" in said
    assert "with a micro batch of 48" in said and "train.micro_batch_size: auto, or a smaller one, would do" in said
    assert read_object(tmp_path / "fixed" / "runs" / "tiny" / "status.json")["state"] == "failed"
