"""Compiles every kernel for sm_90 without a GPU and prints registers, spills, shared memory and instruction counts.

    python benchmarks/compile_report.py [--only NAME] [--sass DIR]

Needs triton's wheel, which carries ptxas, cuobjdump and nvdisasm. Shapes: 32 index heads of 128, k 2048, 20 (or 64)
attention heads over latents of 512 + 64.
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGET = GPUTarget("cuda", 90, 32)
COUNTED = (
    "HGMMA",
    "QGMMA",
    "HMMA",
    "FMNMX",
    "FFMA",
    "FMUL",
    "F2FP",
    "MUFU",
    "LDGSTS",
    "UTMALDG",
    "LDS",
    "STS",
    "LDL",
    "STL",
    "SHFL",
    "BAR",
)
TYPES = {"bf16": "*bf16", "f16": "*fp16", "fp8": "*fp8e4nv", "f32": "*fp32", "i32": "*i32", "i64": "*i64", "u8": "*u8"}


def compile_kernel(fn: Any, pointers: dict[str, str], constants: dict[str, Any], scalars: dict[str, str], **options: int) -> Any:
    """`pointers`: argument -> key of TYPES. Arguments in none of the dicts are int32 divisible by 16; scalars are not specialised."""
    signature, attributes = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = TYPES[pointers[name]]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in scalars:
            signature[name] = scalars[name]
        else:
            signature[name] = "i32"
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if fn.is_gluon() else ASTSource)(fn=fn, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGET, options=options)


def resources(kernel: Any, sass_file: Path | None) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(kernel.asm["ptx"].encode())
        file.flush()
        command = [TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    if sass_file:
        sass_file.write_text(sass)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    count = collections.Counter(m.group(1) for m in re.finditer(r"^\s+/\*\w+\*/\s+(?:@!?U?P\d\s+)?([A-Z0-9]+)", sass, re.MULTILINE))
    return {
        "regs": int(found["REG"]),
        "stack": int(found["STACK"]),
        "smem": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        # C7512, C7514, ..: wgmma instructions are waited for one by one
        "warnings": sorted(set(re.findall(r"\((C75\d\d)\)", said.stdout + said.stderr))),
        "instructions": sum(count.values()),
        "mix": {name: count[name] for name in COUNTED if count[name]},
    }


def kernels() -> dict[str, tuple]:
    """label -> (kernel, pointers, constants, scalars, options)."""
    from indexcache.ops import scores, scores_hopper, select

    table: dict[str, tuple] = {}
    tiles = {"H": 32, "D": 128, "BM": 64, "BN": 128, "STAGES": 3}
    base = {
        "p_w": "f32",
        "p_scale": "f32",
        "p_offset": "i64",
        "p_thr": "i32",
        "p_score": "i32",
        "p_key": "i32",
        "p_id": "i32",
        "p_count": "i32",
    }
    for kind in ("bf16", "fp8"):
        pointers = base | {"p_q": kind, "p_k": kind}
        scaled = kind == "fp8"
        for label, extra in (
            ("sample", {"STRIDE": 32, "CAP": 1, "APPEND": False}),
            ("append", {"STRIDE": 1, "CAP": 8192, "APPEND": True}),
        ):
            table[f"scores_tiles.{kind}.{label}"] = (
                scores.scores_tiles,
                pointers,
                tiles | extra | {"SCALED": scaled},
                {},
                {"num_warps": 4, "num_stages": 3},
            )
        wide = tiles | {"BN": 256, "STAGES": 8 if scaled else 4, "SCALED": scaled, "UNROLL": 8}
        table[f"hopper.{kind}.rows"] = (
            scores_hopper.scores_tiles,
            pointers,
            wide | {"STRIDE": 1, "CAP": 1, "APPEND": False},
            {},
            {"num_warps": 8},
        )
        table[f"hopper.{kind}.append"] = (
            scores_hopper.scores_tiles,
            pointers,
            wide | {"STRIDE": 1, "CAP": 8192, "APPEND": True},
            {},
            {"num_warps": 8},
        )
        types = pointers | {"p_flag": "i32", "p_work": "i32", "p_out": "i32", "p_pool": "i32"}
        constants = {"H": 32, "HP": 32, "D": 128, "BN": 128, "SCALED": scaled, "TOPK": 2048, "POOL": 0, "BLOCK": 4096}
        table[f"rescue_fused.{kind}"] = (scores.rescue_fused, types, constants, {}, {"num_warps": 8})
        rows = {"H": 32, "HP": 32, "D": 128, "BN": 128, "SCALED": scaled}
        for gather in (False, True):
            pointers_rows = pointers | {"p_ids": "i32"}
            table[f"scores_rows.{kind}.{'pool' if gather else 'decode'}"] = (
                scores.scores_rows,
                pointers_rows,
                rows | {"GATHER": gather, "QUERIES": 8 if gather else 1},
                {"n_queries": "i32", "n_rows": "i32"},
                {"num_warps": 4},
            )
    sample = {"STRIDE": 32, "SAMPLE": 8192, "CAUSAL": True}
    lists = {"p_score": "i32", "p_offset": "i64", "p_thr": "i32", "p_key": "i32", "p_id": "i32", "p_count": "i32"}
    floats = lists | {"p_score": "f32"}
    table["threshold"] = (select.threshold, lists, sample | {"FLOAT": False}, {"wanted": "i32", "slack": "i32"}, {"num_warps": 8})
    table["compact.f32"] = (select.compact, floats, {"CAP": 8192, "BLOCK": 2048, "FLOAT": True, "CAUSAL": True}, {}, {"num_warps": 4})
    pointers = lists | {"p_map": "i32", "p_out": "i32", "p_pool": "i32", "p_flag": "i32"}
    constants = {"TOPK": 2048, "POOL": 0, "SEGMENTS": 4, "CAP": 8192, "ALL": 8192, "MAPPED": False}
    table["pick"] = (select.pick, pointers, constants | {"FILL": 2048, "LOG": 2}, {}, {"num_warps": 8})
    table["pick_long"] = (select.pick_long, pointers, constants | {"POOL": 16384, "ALL": 32768, "BLOCK": 4096}, {}, {"num_warps": 8})
    pointers = lists | {"p_flag": "i32", "p_map": "i32", "p_out": "i32", "p_pool": "i32"}
    constants = {"TOPK": 2048, "POOL": 0, "BLOCK": 4096, "FLOAT": False, "CAUSAL": True, "MAPPED": False}
    table["rescue"] = (select.rescue, pointers, constants, {}, {"num_warps": 8})
    return table | attention_kernels()


def attention_kernels() -> dict[str, tuple]:
    from indexcache.ops import mla, mla_backward, plan, quantize

    table: dict[str, tuple] = {}
    pointers = {"p_q": "bf16", "p_value": "bf16", "p_vscale": "bf16", "p_rope": "bf16", "p_ids": "i32", "p_bits": "u8", "p_count": "i32"}
    pointers |= {"p_out": "bf16", "p_lse": "f32"}
    shape = {
        "H": 20,
        "GROUP": 3,
        "M": 64,
        "N": 64,
        "V": 512,
        "R": 64,
        "RP": 64,
        "C": 4,
        "FP8": False,
        "PLANNED": True,
        "SPLIT": False,
        "STAGES": 1,
    }
    real = {"scale2": "fp32", "scale": "fp32"}
    for label, change, options in (
        ("prefill.20", {}, {}),
        ("prefill.20.stages2", {"STAGES": 2}, {}),
        ("prefill.20.n32", {"STAGES": 2, "N": 32}, {}),
        ("prefill.20.fp8", {"FP8": True}, {}),
        ("prefill.64", {"H": 64, "GROUP": 1, "PLANNED": False, "STAGES": 2}, {}),
        ("decode.20", {"GROUP": 1, "M": 32, "PLANNED": False, "SPLIT": True}, {}),
        ("decode.20.4warps", {"GROUP": 1, "M": 32, "PLANNED": False, "SPLIT": True, "N": 32}, {"num_warps": 4}),
        ("decode.20.fp8", {"GROUP": 1, "M": 32, "PLANNED": False, "SPLIT": True, "FP8": True}, {}),
    ):
        types = (
            pointers
            | ({"p_value": "fp8", "p_vscale": "f32"} if change.get("FP8") else {})
            | ({"p_out": "f32"} if change.get("SPLIT") else {})
        )
        table[f"attend.{label}"] = (mla.attend, types, shape | change, real, {"num_warps": 8} | options)
    types = {"p_part": "f32", "p_plse": "f32", "p_out": "bf16", "p_lse": "f32"}
    table["combine"] = (mla.combine, types, {"SPLITS": 32, "SP": 32, "V": 512, "BLOCK": 128}, {}, {"num_warps": 1})
    types = {
        "p_q": "bf16",
        "p_latent": "bf16",
        "p_ids": "i32",
        "p_bits": "u8",
        "p_count": "i32",
        "p_out": "bf16",
        "p_lse": "f32",
        "p_grad": "bf16",
    }
    types |= {"p_dq": "bf16", "p_dlatent": "f32"}
    shape = {"H": 20, "GROUP": 3, "M": 64, "N": 32, "V": 512, "R": 64, "RP": 64, "PLANNED": True, "ATOMIC": True}
    for keys in (16, 32, 64):
        for part in (128, 64):
            table[f"backward.20.n{keys}.p{part}"] = (
                mla_backward.backward,
                types,
                shape | {"N": keys, "PART": part},
                real,
                {"num_warps": 8},
            )
    types = {"p_ids": "i32", "p_owned": "i32", "p_mask": "u8", "p_union": "i32", "p_bits": "u8", "p_count": "i32"}
    for name, fn in (("own", plan.own), ("place", plan.place)):
        table[f"plan.{name}"] = (fn, types, {"GROUP": 3, "K": 2048, "BLOCK": 1024, "STEPS": 12}, {}, {"num_warps": 4})
    types = {"p_x": "bf16", "p_cos": "f32", "p_sin": "f32", "p_signs": "f16", "p_out": "fp8", "p_scale": "f32"}
    shape = {"D": 128, "r": 32, "INTERLEAVED": True, "ROTATE": True, "NORM": 128**-0.5, "BLOCK": 32}
    table["quantize"] = (quantize.quantize, types, shape, {}, {"num_warps": 4})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="kernels whose label contains this")
    parser.add_argument("--sass", type=Path, help="write the disassembly there")
    arguments = parser.parse_args()
    if arguments.sass:
        arguments.sass.mkdir(parents=True, exist_ok=True)
    print(f"{'kernel':28} {'warps':>5} {'regs':>4} {'stack':>6} {'smem':>7} {'instr':>6}  mix")
    for label, (fn, pointers, constants, scalars, options) in kernels().items():
        if arguments.only in label:
            try:
                kernel = compile_kernel(fn, pointers, constants, scalars, **options)
            except Exception as error:  # one kernel that does not compile must not hide the others
                print(f"{label:28} FAILED: {type(error).__name__}: {str(error).strip()[-600:]}")
                continue
            r = resources(kernel, arguments.sass / f"{label}.sass" if arguments.sass else None)
            mix = " ".join(f"{k}={v}" for k, v in r["mix"].items())
            sizes = f"{r['warps']:5} {r['regs']:4} {r['stack']:6} {r['smem']:7} {r['instructions']:6}"
            print(f"{label:28} {sizes}  {' '.join([*r['warnings'], mix])}", flush=True)


if __name__ == "__main__":
    main()
