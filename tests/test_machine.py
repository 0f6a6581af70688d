"""What this process does with its machine's memory."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybrid_dist.machine import has_bf16
from tests.conftest import ROOT

STEPS = """
import resource
import torch
from hybrid_dist.machine import give_back_freed_memory, keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def step():
    held = [torch.ones(5 << 20) for _ in range(10)]  # 20 MiB each
    return sum(float(tensor[0]) for tensor in held)

keep_freed_memory()
for _ in range(3):
    step()
before, faults = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
give_back_freed_memory()
print((before - resident()) >> 20)
"""


@pytest.mark.skipif(platform.uname()[::4] != ("Linux", "x86_64"), reason="other CPUs' flags are others")
def test_bf16_of_a_cpu_is_told_by_its_flags() -> None:
    """Catches: a name of torch's own that has gone, so that no CPU has bf16 any more."""
    flags = set(re.findall(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    enough = {"avx512bw", "avx512vl", "avx512dq"} <= flags
    if not enough and "avx_ne_convert" in flags:
        pytest.skip("torch's versions differ in what they make of it")
    assert has_bf16(torch.device("cpu")) == enough


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc knows the settings")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    """Catches: fresh pages in each step (51,200 a step here), memory of one phase that the next one does not get."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", STEPS]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=300)
    faults, given_back = map(int, done.stdout.split())
    assert faults < 5000
    assert given_back > 150


IMPORTS = """
import gc
import weakref
import torch
from hybrid_dist.machine import set_imports_aside

class Circle:
    def __init__(self):
        self.own = self

before = len(gc.get_objects())
set_imports_aside()
print(before - len(gc.get_objects()))
circle = Circle()
held = weakref.ref(circle)
del circle
set_imports_aside()
gc.collect()
print(held() is None)
"""


def test_collections_leave_imports_out() -> None:
    """Catches: collections that go through all of torch; garbage of an earlier run that a later one's call keeps."""
    words = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(
        words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True, timeout=300
    )
    left_out, collected = done.stdout.split()
    assert int(left_out) > 50_000
    assert collected == "True"
