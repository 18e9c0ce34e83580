"""Test that every kernel, as the launch code calls it, compiles for sm_90 without a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPS = ROOT / "indexcache" / "ops"
KERNEL = re.compile(r"^@(?:triton|gluon)\.jit(?:\(.*\))?\ndef (\w+)\(", re.MULTILINE)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.mark.parametrize("every_way", [False, pytest.param(True, marks=pytest.mark.long)])
def test_kernels_compile(every_way):
    """No kernel fails to compile, and ptxas says of none that it waits for each wgmma (C75xx)."""
    # The other kernel tests set TRITON_INTERPRET in this process.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_report"]
    command += [] if every_way else ["--quick"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    compiled = set(re.findall(r"(?m)^(\w+) .*\n    ", run.stdout))
    assert compiled == {name.rsplit(".", 1)[1] for name in launched_kernels()}


def test_the_sanitizer_runs_every_kernel():
    """benchmarks/sanitize.py names each kernel that is launched; its run on a GPU checks them."""
    from benchmarks import sanitize

    kernels = set().union(*sanitize.KERNELS.values())
    # The last one is a control.
    assert kernels == launched_kernels() | {"benchmarks.dispatch.start"}
    assert set(sanitize.TASKS) == set(sanitize.KERNELS)


def launched_kernels():
    """Find the kernels that the package launches, as module.name below indexcache.ops."""
    sources = {p: p.read_text(encoding="utf-8") for p in OPS.rglob("*.py")}
    code = "".join(sources.values())
    launched = set()
    for path, source in sources.items():
        module = ".".join(path.relative_to(OPS).with_suffix("").parts)
        for kernel in KERNEL.findall(source):
            if re.search(rf"\b{kernel}\[.*?\]\(", code):
                launched.add(f"{module}.{kernel}")
    assert len(launched) > 20
    return launched
