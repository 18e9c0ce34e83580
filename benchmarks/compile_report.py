"""Compile every kernel for sm_90 without a GPU and print registers, spills and instructions.

    python -m benchmarks.compile_report [--only NAME] [--sass DIR]

This runs the package's own launch code on CPU tensors and catches each kernel before its launch, so
that it compiles what a GPU would get. Shapes: 32 and 64 index heads of 128, k 2048, 200,000 keys; 9
heads of 256 and 8,192 keys ("short"); 20 and 64 attention heads over latents of 512 + 64. It needs
triton's wheel, which carries ptxas, cuobjdump and nvdisasm.
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
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from indexcache import ops
from indexcache.ops import AttentionTarget, rotary, tuning
from indexcache.ops.groups import group_queries
from indexcache.ops.index import host as index_host
from indexcache.ops.index import topk_host
from indexcache.ops.kl import host as kl_host
from indexcache.ops.linear import host as linear_host
from indexcache.ops.mla import host as mla_host
from indexcache.ops.pages import group_pages
from indexcache.ops.quantize import quantize
from indexcache.ops.step import host as step_host

QUICK = (
    "prefill fp8",
    "pool",
    "pool H=128",
    "short rows",
    "decode",
    "rows of scores",
    "attention 20",
    "attention 64",
    "decode 20",
    "queries turned, interleaved",
    "paged groups of 3",
    "backward deterministic",
    "quantize",
    "step products",
    "step experts",
    "experts quantised",
    "experts of one",
    "distill warm-up",
)
"""Tasks that launch every kernel, not every way in which it is compiled."""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MAX_SHARED = 232448  # bytes of shared memory that a program can have on Hopper
COUNTED = {"HGMMA", "QGMMA", "HMMA", "FMNMX", "FFMA", "FMUL", "F2FP", "MUFU", "LDGSTS", "UTMALDG"}
COUNTED |= {"LDS", "STS", "LDL", "STL", "SHFL", "VOTE", "BAR"}
INSTRUCTION = re.compile(r"^\s+/\*\w+\*/\s+(?:@!?U?P\d\s+)?([A-Z0-9]+)", re.MULTILINE)


@contextmanager
def caught() -> Iterator[dict[str, Any]]:
    """Make launches compile for sm_90 and run nothing.

    Yields a dict that maps a kernel's name, constants and missing pointers to the compiled kernel,
    in the order of the launches.
    """
    kernels: dict[str, Any] = {}
    run = JITFunction.run

    def catch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        constants = {k: v for k, v in options.items() if k.isupper() or v is None}
        words = [f"{k}={v}" for k, v in constants.items() if v is not False]
        kernels.setdefault(" ".join([self.__name__, *words]), kernel)

    registers = topk_host._two_per_processor
    before = triton.runtime.driver._active
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    triton.runtime.driver.set_active(driver)
    try:
        with (
            mock.patch.object(JITFunction, "run", catch),
            mock.patch.object(tuning, "gluon_runs", return_value=True),
            mock.patch.object(topk_host, "_two_per_processor", lambda n, _: registers(n, True)),
        ):
            yield kernels
    finally:
        triton.runtime.driver._active = before


def output_of(command: list[Any], check: bool = True) -> str:
    """Run a command and return its output."""
    done = subprocess.run(command, capture_output=True, text=True, check=check)
    return done.stdout + done.stderr


def resources(kernel: Any, sass_file: Path | None = None) -> dict[str, Any]:
    """Measure a compiled kernel: registers, stack, shared memory, warnings and instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = output_of([TOOLS / "cuobjdump", "--dump-resource-usage", file.name])
        sass = output_of([TOOLS / "nvdisasm", "-c", file.name])
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(kernel.asm["ptx"].encode())
        file.flush()
        command = [TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        messages = output_of(command, check=False)
    if sass_file:
        sass_file.write_text(sass)
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    count = collections.Counter(INSTRUCTION.findall(sass))
    return {
        "regs": int(used["REG"]),
        "stack": int(used["STACK"]),
        "smem": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        # C7512, C7514 and their like say that each wgmma instruction is waited for.
        "warnings": sorted(set(re.findall(r"\((C75\d\d)\)", messages))),
        "instructions": sum(count.values()),
        "mix": {name: count[name] for name in sorted(COUNTED) if count[name]},
    }


def index_inputs(
    heads: int = 32,
    queries: int = 512,
    keys: int = 200_000,
    dtype: torch.dtype = torch.float8_e4m3fn,
    dim: int = 128,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Make queries, keys, weights and scales of an indexer."""
    q = torch.zeros(1, queries, heads, dim, dtype=dtype)
    k = torch.zeros(1, keys, dim, dtype=dtype)
    scale = torch.zeros(1, keys) if dtype == torch.float8_e4m3fn else None
    return q, k, torch.zeros(1, queries, heads), scale


def attention_inputs(heads: int, queries: int, dims: int = 576) -> tuple[Tensor, Tensor, Tensor]:
    """Make queries, latents and ids of attention."""
    latent = torch.zeros(1, 4096, dims, dtype=torch.bfloat16)
    q = torch.zeros(1, queries, heads, dims, dtype=torch.bfloat16)
    return q, latent, torch.zeros(1, queries, 2048, dtype=torch.int32)


def topk(
    inputs: tuple, pool: int | Fraction = 0, candidates: Tensor | None = None
) -> Callable[[], Any]:
    arguments = *inputs, 2048, 199_000, candidates
    return lambda: index_host.run_index_topk(*arguments, pool=pool, groups=None)


def attend(heads: int, queries: int, dims: int = 576) -> Callable[[], Any]:
    inputs = attention_inputs(heads, queries, dims)
    value_dim = 512 if dims == 576 else 256
    options = {"value_dim": value_dim, "groups": None, "deterministic": False}
    return lambda: mla_host.sparse_mla(*inputs, 0.06, **options)


def attend_parts(heads: int) -> Callable[[], Any]:
    q, latent, ids = attention_inputs(heads, 264)
    values = q[0, ..., :512].transpose(0, 1).contiguous().transpose(0, 1)
    groups = ops.group_queries(ids, mla_host.best_group(heads), backend="torch")
    return lambda: mla_host.attend_parts(
        (values, q[0, ..., 512:].contiguous()), latent[0], 0.06, groups
    )


def paged(group: int) -> None:
    ids, requests = torch.zeros(264, 2048, dtype=torch.int32), torch.zeros(264, dtype=torch.int32)
    group_pages(ids, requests, torch.zeros(1, 3136, dtype=torch.int32), group, 64, 64)


def grouped(group: int) -> None:
    with tuning.tuned(index={"bitmaps_from": 1}):
        group_queries(torch.zeros(1, 264, 2048, dtype=torch.int32), group)


def rotated(interleaved: bool) -> None:
    """Turn the queries of 20 heads, and those of an indexer of 32."""
    positions, table = torch.zeros(264, dtype=torch.int64), torch.zeros(264, 64)
    q, index_q = (torch.zeros(264, h, d, dtype=torch.bfloat16) for h, d in ((20, 64), (32, 128)))
    rotary.rotate_queries(q, positions, table, interleaved=interleaved)
    rotary.rotate_pairs(q[None], *(q[None, :, 0],) * 2, interleaved=interleaved)
    rotary.rotate_index_queries(
        index_q, index_q[..., 0], positions, table, (1.0, 1.0), interleaved=interleaved
    )


def backward(deterministic: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    q, latent, ids = attention_inputs(20, 264)
    leaves = [x.to(dtype).requires_grad_() for x in (q, latent)]
    options = {"value_dim": 512, "groups": None, "deterministic": deterministic}
    mla_host.sparse_mla(*leaves, ids, 0.06, **options)[0].sum().backward()


def index_kl(
    index: tuple[int, int],
    heads: int,
    dims: int,
    length: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    index_heads, index_dim = index
    q = torch.zeros(length, index_heads, index_dim, dtype=dtype)
    k = torch.zeros(length, index_dim, dtype=dtype)
    w = torch.zeros(length, index_heads)
    absorb = torch.zeros(heads, dims, dims, dtype=dtype)
    x = torch.zeros(length, heads, dims, dtype=dtype)
    targets = [AttentionTarget(x, torch.zeros(length, dims, dtype=dtype), absorb, 0.1)] * 2
    options: dict[str, Any] = {"kind": "multi", "block_bytes": 1 << 30, "gradients": True}
    kl_host.index_kl(q, k, w, targets, [0.5, 0.5], **options)


def linear(tokens: int, width: int) -> Callable[[], Any]:
    """Multiply by an FP8 weight of 2048 outputs."""
    x = torch.zeros(tokens, width, dtype=torch.bfloat16)
    weight = torch.zeros(2048, width, dtype=torch.float8_e4m3fn)
    return lambda: linear_host.block_linear(x, weight, torch.zeros(16, -(-width // 128)), False)


def experts(tokens: int, quantized: bool = False, plain: bool = False) -> Callable[[], Any]:
    """Run 4 of 8 experts of the 30B shape, in FP8 or bf16."""
    dtype = torch.bfloat16 if plain else torch.float8_e4m3fn
    gate_up = torch.zeros(8, 2, 1536, 2048, dtype=dtype)
    down = torch.zeros(8, 2048, 1536, dtype=dtype)
    scales = (None, None) if plain else (torch.zeros(8, 2, 12, 16), torch.zeros(8, 16, 12))
    x = torch.zeros(tokens, 2048, dtype=torch.bfloat16)
    chosen = torch.zeros(tokens, 4, dtype=torch.int64), torch.zeros(tokens, 4)
    return lambda: linear_host.gated_experts(
        x, gate_up, scales[0], down, scales[1], *chosen, quantized
    )


def described(call: Callable[[], Any]) -> Callable[[], Any]:
    """Let the copy engine bring the weights' tiles."""

    def run() -> None:
        with tuning.tuned(linear={"described": True}):
            call()

    return run


def quantize_rotated() -> None:
    angle = torch.zeros(1, 4096, 32)
    x = torch.zeros(1, 4096, 4, 128, dtype=torch.bfloat16)
    quantize(x, angle, angle, rotate=True, interleaved=True)


def step_products() -> None:
    """Launch the products of attention of a layer that runs its indexer."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16)

    def products(width: int, rows: list[int], norm: bool, **options: Any) -> None:
        weights = [zeros(n, width) for n in rows]
        arguments = {"norm": (zeros(width), 1e-5) if norm else None, "add": None, "normed": norm}
        step_host.products(
            zeros(width), weights, **(arguments | {"dtype": torch.bfloat16} | options)
        )

    products(2048, [768, 576, 128, 32], True)
    products(768, [5120, 4096], True)
    products(5120, [2048], False, add=zeros(2048))
    none: dict[str, Any] = {"norm": None, "add": None, "dtype": torch.bfloat16, "normed": False}
    key_value = zeros(20, 448, 512)
    step_host.products(zeros(20, 512), [key_value[:, 192:]], **none)
    rope, position = (zeros(64), zeros(64)), torch.zeros(1, dtype=torch.int64)
    norm = zeros(512), 1e-5
    latents = zeros(300, 576)
    step_host.absorb(zeros(20, 256), key_value[:, :192], zeros(576), norm, rope, position, latents)
    ids = torch.zeros(2048, dtype=torch.int32)
    step_host.attend(zeros(20, 576), latents, ids, 0.06, key_value[:, 192:])
    keys = torch.zeros(300, 128, dtype=torch.float8_e4m3fn), torch.zeros(300)
    for interleaved in (False, True):
        index = zeros(32, 128), zeros(128), zeros(2048), torch.zeros(32, 2048)
        norms = zeros(128), zeros(128), 1e-6
        step_host.index_rows(*index, norms, rope, 0.1, interleaved, position, *keys)


def step_experts(count: int = 64, topk: int = 4) -> None:
    """Launch the router and the experts."""
    hidden, inner = 2048, 1536
    x = torch.zeros(hidden, dtype=torch.bfloat16)
    router = torch.zeros(count, hidden)
    options: dict[str, Any] = {"norm": (x, 1e-5), "add": None, "normed": True}
    logits, y = step_host.products(x, [router], dtype=torch.float32, **options)
    gate_up = torch.zeros(1, dtype=torch.bfloat16).expand(count, 2 * inner, hidden)
    down = torch.zeros(1, dtype=torch.bfloat16).expand(count, hidden, inner)
    shared = tuple(
        torch.zeros(1, dtype=torch.bfloat16).expand(*s)
        for s in ((inner, hidden), (inner, hidden), (hidden, inner))
    )
    assert y is not None
    step_host.experts(x, y, logits, torch.zeros(count), gate_up, down, shared, topk, True, 1.8)


def tasks() -> dict[str, Callable[[], Any]]:
    """Return label -> a call of the launch code, which launches the kernels of one task."""
    pool = torch.zeros(1, 512, 16384, dtype=torch.int32)
    bf16 = index_inputs(dtype=torch.bfloat16)
    short = index_inputs(9, keys=8192, dtype=torch.bfloat16, dim=256)
    one = index_inputs(queries=1)
    batch = tuple(x.expand(8, *x.shape[1:]) for x in one if x is not None)
    return {
        "prefill fp8": topk(index_inputs()),
        "prefill fp8 H=64": topk(index_inputs(64)),
        "prefill bf16": topk(bf16),
        "prefill with pool": topk(index_inputs(), pool=16384),
        "pool": topk(index_inputs(), candidates=pool),
        "pool H=64": topk(index_inputs(64), candidates=pool),
        "pool H=128": topk(index_inputs(128), candidates=pool),
        "pool bf16": topk(bf16, candidates=pool),
        "pool bf16 H=128": topk(index_inputs(128, dtype=torch.bfloat16), candidates=pool),
        "short rows": topk(short),
        "short rows, a share": topk(short, pool=Fraction(1, 8)),
        "short rows in a pool": topk(short, candidates=pool[..., :1024]),
        "short rows H=32": topk(tuple(x if x is None else x[:, :8192] for x in bf16)),
        "decode": topk(one),
        "decode in a pool": topk(one, candidates=pool[:, :1]),
        "decode, a batch": topk(batch),
        "rows of scores": lambda: topk_host.topk_rows(torch.zeros(40, 131_072), 2048),
        "attention 20": attend(20, 264),
        "attention 64": attend(64, 264),
        "attention of SmolLM2": attend(9, 924, dims=448),
        "attention of queries in two parts": attend_parts(20),
        "decode 20": attend(20, 1),
        "queries turned, interleaved": lambda: rotated(True),
        "queries turned, half-split": lambda: rotated(False),
        "paged groups of 3": lambda: paged(3),
        "paged groups of 8": lambda: paged(8),
        "groups of 8 through bitmaps": lambda: grouped(8),
        "backward": lambda: backward(False),
        "backward deterministic": lambda: backward(True),
        "attention fp32": lambda: backward(False, torch.float32),
        "quantize": quantize_rotated,
        "step products": step_products,
        "step experts": step_experts,
        "linear of partial blocks": linear(2048, 200),
        "experts": experts(2048),
        "experts quantised": experts(2048, True),
        "experts of one": experts(1),
        "experts plain, described": described(experts(2048, plain=True)),
        "distill warm-up": lambda: index_kl((9, 256), 9, 256),
        "distill warm-up fp32": lambda: index_kl((9, 256), 9, 256, 301, torch.float32),
        "distill warm-up GLM": lambda: index_kl((32, 128), 20, 256),
    }


def main() -> int:
    """Compile and print.

    Returns 1 if a kernel does not compile, needs more shared memory than there is, or has its wgmma
    instructions serialised.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="compile the tasks whose label contains this")
    parser.add_argument("--quick", action="store_true", help="compile every kernel in one way")
    parser.add_argument("--sass", type=Path, help="write the disassembly to this folder")
    arguments = parser.parse_args()
    if arguments.sass:
        arguments.sass.mkdir(parents=True, exist_ok=True)
    reported: set[str] = set()
    failed = 0
    for label, call in tasks().items():
        if arguments.only not in label or (arguments.quick and label not in QUICK):
            continue
        print(f"-- {label}", flush=True)
        with caught() as kernels:
            try:
                call()
            except Exception as error:  # One kernel that does not compile must not hide the others.
                failed += 1
                print(f"FAILED: {type(error).__name__}: {str(error).strip()[-600:]}")
        for name, kernel in kernels.items():
            if name in reported:
                continue
            reported.add(name)
            sass = None
            if arguments.sass:
                sass = arguments.sass / f"{len(reported):02}.{name.split()[0]}.sass"
            r = resources(kernel, sass)
            failed += bool(r["warnings"]) or r["smem"] > MAX_SHARED
            sizes = f"{r['warps']:2} warps {r['regs']:3} registers {r['stack']:4} stack"
            sizes += f" {r['smem']:6} shared {r['instructions']:5} instructions"
            mix = " ".join(f"{k}={v}" for k, v in r["mix"].items())
            print(f"{name}\n    {sizes}  {' '.join([*r['warnings'], mix])}", flush=True)
    print(f"{len(reported)} kernels, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
