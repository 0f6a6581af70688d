"""Nothing that is loaded can run code."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.conftest import ROOT, environment, launch, tiny_values

# Python says when a pickle asks for anything by name; without a name it can only make plain values.
WATCHED = """
import sys
asked = []
sys.addaudithook(lambda event, facts: asked.append(facts) if event == "pickle.find_class" else None)
import pathlib, pickle
pickle.loads(pickle.dumps(pathlib.PurePath()))
assert asked, "the watch itself works"
import torch, timm, accelerate  # what they load on import is theirs
del asked[:]
import train
sys.argv[0] = "train.py"
code = train.main()
print("asked for", asked)
sys.exit(code)
"""


class Malicious:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def as_torch_file(path: Path, mark: Path) -> None:
    torch.save({"state_dict": {"stem.0.weight": Malicious(mark)}}, path)


def as_bare_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious(mark)))


@pytest.mark.parametrize("write", [as_torch_file, as_bare_pickle])
@pytest.mark.parametrize("name", ["weights.pth", "weights.bin", "weights.safetensors"])
def test_malicious_weights(
    name: str, write: Callable[[Path, Path], None], tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    """Catches: any way from `weights:` to an unpickler, whatever the file calls itself."""
    mark = tmp_path / "ran"
    write(tmp_path / name, mark)
    done = launch("--config", str(tiny_config()), f"model.cnn.weights={tmp_path / name}", check=False)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1
    assert name in said[0]
    assert not mark.exists()
    assert not (tmp_path / "runs").exists()


def test_a_run_and_its_resume_unpickle_nothing(
    tiny_config: Callable[..., Path], tiny_data: Path, tmp_path: Path
) -> None:
    """Catches: an unpickler anywhere between a `.pth` of weights, checkpoints, bests and what is read of them."""
    cnn = tiny_values(tiny_data, tmp_path)["model"]["cnn"]
    torch.save(timm.create_model(cnn["name"], num_classes=0, **cnn["kwargs"]).state_dict(), tmp_path / "cnn.pth")
    model = tiny_values(tiny_data, tmp_path)["model"] | {"cnn": cnn | {"weights": str(tmp_path / "cnn.pth")}}
    phases = [{"name": name, "trainable": ["all"], "steps": 3, "lr": 1e-3} for name in "ab"]
    config = tiny_config(model=model, phases=phases, checkpoint={"every_steps": 1, "keep": 9})
    for again in (False, True):
        if again:
            shutil.rmtree(tmp_path / "runs/tiny/checkpoints/b-6")
            shutil.rmtree(tmp_path / "runs/tiny/model")
        done = subprocess.run(
            [sys.executable, "-c", WATCHED, "--config", str(config)],
            cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines()[-1] == "asked for []"
