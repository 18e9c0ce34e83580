"""Every kernel, as the launch code calls it, compiles for sm_90 without a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = Path(__file__).parent.parent / "benchmarks" / "compile_report.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile():
    """Fails where a kernel does not compile or ptxas says that it waits for each wgmma (C75xx)."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # the other kernel tests set it in this process
    run = subprocess.run([sys.executable, REPORT], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    for name in ("scores_tiles", "scores_pools", "pick", "attend", "backward", "quantize", "teach", "grad_keys"):
        assert f"\n{name} " in run.stdout
