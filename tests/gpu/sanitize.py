"""What compute-sanitizer says of the CUDA kernels: ``make gpu-sanitize``, not among the other tests, as it takes minutes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
ROOT = Path(__file__).parents[2]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
PLANS = [("", 0), ("ampere", 1)]
if HOPPER:
    PLANS += [("192x96", 2), ("64x64", 2)]  # through each other's shared memory
# What is not of these kernels, torch launches. Until CUDA 12.3 the option was called --kernel-regex.
OURS = ["--kernel-name", "kns=gemm_kernel"]
# initcheck heeds what the copy engine reads and writes from here on, CUDA 13.1; 2026.1 reports less that is none.
COPY_ENGINE = (2025, 4)


def version():
    done = subprocess.run([SANITIZER, "--version"], capture_output=True, text=True, check=True)
    return tuple(map(int, re.search(r"(20\d\d)\.(\d+)", done.stdout + done.stderr).groups()))


@pytest.mark.skipif(SANITIZER is None or not torch.cuda.is_available(), reason="needs an NVIDIA GPU and compute-sanitizer")
@pytest.mark.parametrize(("tile", "splits"), PLANS)
@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "synccheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool, tile, splits):
    """Forward and backward of small cases. Nothing is allowed: a first finding wants an explanation, not a list."""
    if tool == "initcheck" and HOPPER and tile != "ampere" and version() < COPY_ENGINE:
        pytest.skip("initcheck takes what these kernels store for unwritten, before compute-sanitizer 2025.4 (CUDA 13.1)")
    # Nor is what a kernel writes that initcheck does not watch: there it watches torch's, too.
    watched = ["--report-api-errors", "no", *(OURS if tool != "initcheck" else [])]
    program = [sys.executable, "-m", "tests.gpu.small_cases", tile, str(splits)]
    # Each tensor in an allocation of its own, so that what lies beside it is not another's.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", *watched, *program]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert re.search("(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)", said), said[-4000:]
    assert re.search(r"^[1-9]\d* cases done$", said, re.MULTILINE), said[-4000:]
    assert splits < 2 or re.search(r"^[1-9]\d* depths shared$", said, re.MULTILINE), said[-4000:]
