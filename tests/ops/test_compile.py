"""Every kernel, as the launch code calls it, compiles for sm_90 without a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = Path(__file__).parents[2] / "benchmarks" / "compile_report.py"
SANITIZE = REPORT.parent / "sanitize.py"
LAUNCHES = "".join(
    f.read_text(encoding="utf-8")
    for f in (REPORT.parent.parent / "indexcache" / "ops").glob("launch*.py")
)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile():
    """Fails where a kernel does not compile or ptxas says that it waits for each wgmma (C75xx)."""
    environment = {
        k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"
    }  # the other kernel tests set it in this process
    run = subprocess.run([sys.executable, REPORT], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    for name in (
        "scores_tiles",
        "scores_pools",
        "pick",
        "attend",
        "backward",
        "quantize",
        "teach",
        "grad_keys",
    ):
        assert f"\n{name} " in run.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_sanitizer_is_given_every_kernel():
    """What the launch code launches, benchmarks/sanitize.py names: there the run on a GPU checks that it launched them."""
    spec = importlib.util.spec_from_file_location("sanitize", SANITIZE)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    launched = set()
    for file in (SANITIZE.parent.parent / "indexcache" / "ops").glob("*.py"):
        for kernel in re.findall(
            r"(?m)^@(?:triton|gluon)\.jit\ndef (\w+)\(", file.read_text(encoding="utf-8")
        ):
            if re.search(rf"\b(?:{file.stem}|kernel)\.{kernel}\[", LAUNCHES):
                launched.add(f"{file.stem}.{kernel}")
    assert len(launched) > 20
    assert set().union(*module.KERNELS.values()) == launched | {
        "dispatch.start"
    }  # a control, no kernel of the package
    assert set(module.TASKS) == set(module.KERNELS)
