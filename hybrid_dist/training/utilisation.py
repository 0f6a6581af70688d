"""Model FLOPs utilisation: what the model's arithmetic is of what the devices could do in the same time (Chowdhery et
al., "PaLM", 2022)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import hybrid_dist
from hybrid_dist.config import Config
from hybrid_dist.distributed import Topology


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of a device at the most, by its data sheet; None where it is a CPU, or none of `plan`'s devices."""
    if device.type != "cuda":
        return None
    from hybrid_dist.plan.devices import reported

    found = reported(torch.cuda.get_device_name(device))
    return found.flops(precision)[0] if found is not None and (found.bf16 or precision != "bf16") else None


class Utilisation:
    """What a run makes of its devices; on rank 0, which writes the metrics, and where the device's peak is known.

    How many FLOPs a picture takes is counted by another process: it takes seconds, in which the training would have to
    share Python's lock and torch's states with it.
    """

    def __init__(self, config: Config, classes: Mapping[str, int], topology: Topology, say: Callable[[str], None]):
        """Nothing is counted yet.

        Args:
            classes: How many each classification task has.
            say: Told why it can't be counted.
        """
        self.config, self.classes, self._say = config, dict(classes), say
        self._peak = peak_flops(topology.device, config.train.precision) if topology.is_main else None
        self._devices = topology.world_size
        self._flops: dict[str, float] = {}
        self._counting: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Begin to count; the first step does not wait for it."""
        if self._peak is not None and self._thread is None:
            self._thread = threading.Thread(target=self._count, daemon=True, name="flops")
            self._thread.start()

    def of(self, phase: str, images_per_s: float) -> float | None:
        """By the pictures a second of all processes; None while it is not known."""
        flops = self._flops.get(phase)
        if flops is None or self._peak is None:
            return None
        return flops * images_per_s / (self._peak * self._devices)

    def close(self) -> None:
        """What is not counted by now never will be."""
        counting, self._counting = self._counting, None
        if counting is not None:
            counting.kill()

    def _count(self) -> None:
        package = str(Path(hybrid_dist.__file__).parent.parent)
        more = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        asked = json.dumps({"config": self.config.model_dump(mode="json"), "classes": self.classes})
        try:
            counting = self._counting = subprocess.Popen(
                [sys.executable, "-m", "hybrid_dist.plan.flops"], env={**os.environ, **more, "PYTHONPATH": path},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
        except OSError as error:
            self._say(f"warning: perf/mfu will be missing: {error}")
            return
        assert counting.stdin is not None and counting.stdout is not None and counting.stderr is not None
        with counting, contextlib.suppress(OSError):  # it may be killed at any time
            counting.stdin.write(asked)
            counting.stdin.close()
            for line in counting.stdout:
                phase, flops = json.loads(line)
                self._flops[phase] = flops
            reason = counting.stderr.read().strip().rpartition("\n")[2]
            if counting.wait() != 0 and self._counting is not None:
                self._say(f"warning: perf/mfu will be missing: {reason}")
