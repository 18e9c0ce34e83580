"""Compiles every kernel for sm_90 without a GPU and prints registers, spills, shared memory and instruction counts.

    python benchmarks/compile_report.py [--only NAME] [--sass DIR]

Runs the package's own launch code on CPU tensors and catches each kernel before it would be launched, so what is compiled is what a
GPU would get. Shapes: 32 and 64 index heads of 128, k 2048, 200,000 keys; 20 and 64 attention heads over latents of 512 + 64.
Needs triton's wheel, which carries ptxas, cuobjdump and nvdisasm.
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COUNTED = {"HGMMA", "QGMMA", "HMMA", "FMNMX", "FFMA", "FMUL", "F2FP", "MUFU", "LDGSTS", "UTMALDG"}
SHARED = 232448  # bytes of shared memory that a program can have on Hopper
COUNTED |= {"LDS", "STS", "LDL", "STL", "SHFL", "VOTE", "BAR"}


@contextmanager
def caught() -> Iterator[dict[str, Any]]:
    """Within, a launch compiles for sm_90 and runs nothing. Yields name and constants -> compiled kernel, in order of launch."""
    from indexcache.ops import tuning as settings
    from indexcache.ops.index import topk_host as launch_select

    found: dict[str, Any] = {}
    run = JITFunction.run

    def catch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        shown = " ".join(f"{k}={v}" for k, v in options.items() if k.isupper() and v is not False)
        found.setdefault(f"{self.__name__} {shown}", kernel)

    driver, gluon, limited = (
        triton.runtime.driver._active,
        settings.gluon_runs,
        launch_select._limited,
    )
    fake = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    JITFunction.run, settings.gluon_runs = catch, lambda device: True
    launch_select._limited = lambda n, cuda: limited(n, True)
    triton.runtime.driver.set_active(fake)
    try:
        yield found
    finally:
        JITFunction.run, settings.gluon_runs, launch_select._limited = run, gluon, limited
        triton.runtime.driver._active = driver


def resources(kernel: Any, sass_file: Path | None = None) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        sass = subprocess.run(
            [TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(kernel.asm["ptx"].encode())
        file.flush()
        command = [TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    if sass_file:
        sass_file.write_text(sass)
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    count = collections.Counter(
        m.group(1)
        for m in re.finditer(r"^\s+/\*\w+\*/\s+(?:@!?U?P\d\s+)?([A-Z0-9]+)", sass, re.MULTILINE)
    )
    return {
        "regs": int(used["REG"]),
        "stack": int(used["STACK"]),
        "smem": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        # C7512, C7514, ..: wgmma instructions are waited for one by one
        "warnings": sorted(set(re.findall(r"\((C75\d\d)\)", said.stdout + said.stderr))),
        "instructions": sum(count.values()),
        "mix": {name: count[name] for name in sorted(COUNTED) if count[name]},
    }


def index(
    heads: int = 32,
    queries: int = 512,
    keys: int = 200_000,
    kind: torch.dtype = torch.float8_e4m3fn,
) -> tuple:
    q, k = torch.zeros(1, queries, heads, 128, dtype=kind), torch.zeros(1, keys, 128, dtype=kind)
    return (
        q,
        k,
        torch.zeros(1, queries, heads),
        torch.zeros(1, keys) if kind == torch.float8_e4m3fn else None,
    )


def attention(heads: int, queries: int, dims: int = 576) -> tuple:
    latent = torch.zeros(1, 4096, dims, dtype=torch.bfloat16)
    q, ids = (
        torch.zeros(1, queries, heads, dims, dtype=torch.bfloat16),
        torch.zeros(1, queries, 2048, dtype=torch.int32),
    )
    return q, latent, ids


def calls() -> dict[str, Callable[[], Any]]:
    """label -> a call of the launch code, which launches the kernels of one task."""
    from indexcache.ops import AttentionTarget, kl
    from indexcache.ops.index import host as index_host
    from indexcache.ops.mla import host as mla_host
    from indexcache.ops.quantize import quantize

    def topk(inputs: tuple, pool: int = 0, candidates: Any = None) -> Callable[[], Any]:
        rest = 2048, 199_000, candidates
        return lambda: index_host.index_topk(*inputs, *rest, pool=pool, groups=None)

    def mla(heads: int, queries: int, dims: int = 576) -> Callable[[], Any]:
        x = attention(heads, queries, dims)
        options = {"value_dim": 512 if dims == 576 else 256, "groups": None, "deterministic": False}
        return lambda: mla_host.sparse_mla(*x, 0.06, **options)

    def backward(deterministic: bool, kind: torch.dtype = torch.bfloat16) -> Any:
        q, latent, ids = (x.to(kind) if x.is_floating_point() else x for x in attention(20, 264))
        q.requires_grad_(), latent.requires_grad_()
        options = {"value_dim": 512, "groups": None, "deterministic": deterministic}
        mla_host.sparse_mla(q, latent, ids, 0.06, **options)[0].sum().backward()

    def index_kl(
        index: tuple[int, int],
        heads: int,
        dims: int,
        length: int = 4096,
        kind: torch.dtype = torch.bfloat16,
    ) -> None:
        index_heads, dim = index
        q = torch.zeros(length, index_heads, dim, dtype=kind)
        k = torch.zeros(length, dim, dtype=kind)
        w = torch.zeros(length, index_heads)
        absorb = torch.zeros(heads, dims, dims, dtype=kind)
        x = torch.zeros(length, heads, dims, dtype=kind)
        targets = [AttentionTarget(x, torch.zeros(length, dims, dtype=kind), absorb, 0.1)] * 2
        options: dict[str, Any] = {"kind": "multi", "block_bytes": 1 << 30, "gradients": True}
        kl.index_kl(q, k, w, targets, [0.5, 0.5], **options)

    angle = torch.zeros(1, 4096, 32)
    pool = torch.zeros(1, 512, 16384, dtype=torch.int32)
    return {
        "prefill fp8": topk(index()),
        "prefill fp8 H=64": topk(index(64)),
        "prefill bf16": topk(index(kind=torch.bfloat16)),
        "prefill with pool": topk(index(), pool=16384),
        "pool": topk(index(), candidates=pool),
        "pool H=64": topk(index(64), candidates=pool),
        "pool bf16": topk(index(kind=torch.bfloat16), candidates=pool),
        "decode": topk(index(queries=1)),
        "decode in a pool": topk(index(queries=1), candidates=pool[:, :1]),
        "decode, a batch": topk(tuple(t.expand(8, *t.shape[1:]) for t in index(queries=1))),
        "attention 20": mla(20, 264),
        "attention 64": mla(64, 264),
        "attention of SmolLM2": mla(9, 924, dims=448),
        "decode 20": mla(20, 1),
        "backward": lambda: backward(False),
        "backward deterministic": lambda: backward(True),
        "attention fp32": lambda: backward(False, torch.float32),
        "quantize": lambda: quantize(
            torch.zeros(1, 4096, 4, 128, dtype=torch.bfloat16),
            angle,
            angle,
            rotate=True,
            interleaved=True,
        ),
        "distill warm-up": lambda: index_kl((9, 256), 9, 256),
        "distill warm-up fp32": lambda: index_kl((9, 256), 9, 256, 301, torch.float32),
        "distill warm-up GLM": lambda: index_kl((32, 128), 20, 256),
    }


def main() -> int:
    """Exit code 1: a kernel does not compile, needs more shared memory than there is, or has its wgmma instructions serialised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="tasks whose label contains this")
    parser.add_argument("--sass", type=Path, help="write the disassembly there")
    arguments = parser.parse_args()
    if arguments.sass:
        arguments.sass.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    failed = 0
    for label, call in calls().items():
        if arguments.only not in label:
            continue
        print(f"-- {label}", flush=True)
        with caught() as found:
            try:
                call()
            except Exception as error:  # one kernel that does not compile must not hide the others
                failed += 1
                print(f"FAILED: {type(error).__name__}: {str(error).strip()[-600:]}")
        for name, kernel in found.items():
            if name in seen:
                continue
            seen.add(name)
            r = resources(
                kernel,
                arguments.sass / f"{len(seen):02}.{name.split()[0]}.sass"
                if arguments.sass
                else None,
            )
            failed += bool(r["warnings"]) or r["smem"] > SHARED
            mix = " ".join(f"{k}={v}" for k, v in r["mix"].items())
            sizes = f"{r['warps']:2} warps {r['regs']:3} registers {r['stack']:4} stack {r['smem']:6} shared {r['instructions']:5} instructions"
            print(f"{name}\n    {sizes}  {' '.join([*r['warnings'], mix])}", flush=True)
    print(f"{len(seen)} kernels, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
