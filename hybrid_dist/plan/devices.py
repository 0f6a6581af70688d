"""Devices that a plan's time can be told for, by their vendors' data sheets."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from hybrid_dist.errors import UserError

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """A GPU, or a core of a CPU: what it can do at the most."""

    name: str
    """As `--gpu` takes it."""
    title: str
    memory: float
    """GB of 10⁹ bytes."""
    low: float
    """TFLOP/s of its matrix units in 16 bits, dense, summed in fp32."""
    bf16: bool
    """Whether these 16 bits may be bf16; fp16 they may be on any GPU."""
    fp32: float
    """TFLOP/s in fp32, without TF32."""
    bandwidth: float
    """GB/s of its memory."""
    link: float
    """GB/s, one way, to the others in its node: NVLink where it has one, else PCIe."""
    host: float
    """GB/s, one way, to the host's memory."""
    kind: str = "cuda"
    """`cuda` or `cpu`."""
    called: str | None = None
    """What CUDA calls it, after `NVIDIA`: exactly this, for another ending is another chip or power limit."""

    def flops(self, precision: str) -> tuple[float, float]:
        """FLOP/s of matrix products in autocast's type, and of all else.

        Raises:
            UserError: it can't compute in this precision.
        """
        if precision == "bf16" and not self.bf16:
            raise UserError(f"--gpu {self.name}: {self.title} has no bf16; train.precision=fp16 would do")
        return (self.fp32 if precision == "fp32" else self.low) * TERA, self.fp32 * TERA


# NVIDIA's data sheets; of the GeForce cards, its white papers of Ampere GA102 and Ada. Where a sheet tells a rate with
# sparsity, half of it stands here; where it tells a link both ways, half of that.
# GeForce cards reach each other by way of the host, which halves the rate. Of several with the same memory, `usual`
# takes the first.
DEVICES = (
    Device("t4", "T4", 16, 65, False, 8.1, 300, 16, 16, called="Tesla T4"),
    Device("v100", "V100 SXM2 32 GB", 32, 125, False, 15.7, 900, 150, 16, called="Tesla V100-SXM2-32GB"),
    Device("a10", "A10", 24, 125, True, 31.2, 600, 32, 32, called="A10"),
    Device("l4", "L4", 24, 121, True, 30.3, 300, 32, 32, called="L4"),
    Device("rtx3090", "GeForce RTX 3090", 24, 71, True, 35.6, 936, 16, 32, called="GeForce RTX 3090"),
    Device("rtx4090", "GeForce RTX 4090", 24, 165.2, True, 82.6, 1008, 16, 32, called="GeForce RTX 4090"),
    Device("a100-40", "A100 SXM 40 GB", 40, 312, True, 19.5, 1555, 300, 32, called="A100-SXM4-40GB"),
    Device("l40s", "L40S", 48, 362, True, 91.6, 864, 32, 32, called="L40S"),
    Device("a100-80", "A100 SXM 80 GB", 80, 312, True, 19.5, 2039, 300, 32, called="A100-SXM4-80GB"),
    Device("h100-pcie", "H100 PCIe", 80, 756, True, 51, 2000, 64, 64, called="H100 PCIe"),
    Device("h100", "H100 SXM", 80, 989, True, 67, 3350, 450, 64, called="H100 80GB HBM3"),
    Device("h200", "H200 SXM", 141, 989, True, 67, 4800, 450, 64, called="H200"),
    # No sheet tells this of a core: AVX-512 at 3 GHz, 32 sums and products a cycle, twice that in bf16, and its share
    # of a server's memory channels.
    Device("cpu-core", "a server's CPU core", 4, 0.2, True, 0.1, 10, 5, 10, "cpu"),
)

NETWORK = 100.0
"""Gbit/s out of a node that are taken where nobody says: a card of 100 GbE, or of EDR InfiniBand."""


def named(name: str) -> Device:
    """The device that is called so, in any case.

    Raises:
        UserError: there is none; names those that there are.
    """
    for device in DEVICES:
        if device.name == name.lower():
            return device
    known = [device.name for device in DEVICES]
    near = [one for one in known if one.startswith(name.lower())] or difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    raise UserError(f"--gpu {name}: {hint}")


def reported(name: str) -> Device | None:
    """The device that CUDA calls so; None where it is none of these."""
    return next((device for device in DEVICES if device.called == name.removeprefix("NVIDIA ")), None)


def usual(memory: float, precision: str) -> Device:
    """The one that is taken where only the memory, in GB, is known: the nearest to it that has the precision."""
    able: Iterable[Device] = [d for d in DEVICES if d.kind == "cuda" and (d.bf16 or precision != "bf16")]
    return min(able, key=lambda device: abs(device.memory - memory))
