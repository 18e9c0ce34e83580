"""Time the streaming of layers of DeepSeek-V3.2's true shape: disk, copies, compute, memory.

    python -m benchmarks.stream [--folder DIR] [--layers 4] [--candidates 20] [--tiny]

It writes a checkpoint of one dense layer and three with experts, random FP8 weights in blocks of
128 x 128, drops them from the page cache, and streams 8 x 16K tokens of every candidate through
them: 20 states are what lives in the middle of the network in a middle round of 61 layers. The
states of the candidates are inputs of their own. A first pass warms kernels and memory up.

Rows go to benchmarks/results/stream_h200.json: a layer's seconds, its rate by the operations of
`forecast.layer_operations`, and `wait_share`, the share of its time in which the compute waited
for its weights to be read, copied and dequantised. The hours of whole searches follow from these.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_fp8 import write_checkpoint
from indexcache import accelerate, load
from indexcache.data import Batch
from indexcache.models.loading import describe, open_weights
from indexcache.models.stream.forecast import Round, forecast, layer_operations, measured_product
from indexcache.models.stream.loading import stream_of
from indexcache.models.stream.reader import Reader
from indexcache.models.stream.run import LayerDone, Variant
from indexcache.models.stream.settings import StreamSettings
from indexcache.pattern import Pattern
from indexcache.shapes import SHAPES, Shape

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "stream_h200.json"
SEARCHES = (("deepseek-v3.2", 61, 15), ("glm-5", 78, 20))
TINY = {
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "index_n_heads": 16,
    "index_topk": 64,
    "vocab_size": 512,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on the CPU in a minute")
    o = parser.parse_args()
    config = SHAPES["deepseek-v3.2"] | {"num_hidden_layers": o.layers, "first_k_dense_replace": 1}
    if o.tiny:
        config |= TINY
        o.device, o.sequences, o.length, o.candidates = "cpu", 2, 256, 3
    folder = Path(tempfile.mkdtemp(prefix="stream-", dir=o.folder))
    began = time.perf_counter()
    try:
        result = measure(folder, config, o)
    finally:
        shutil.rmtree(folder)
    result["benchmark_seconds"] = round(time.perf_counter() - began, 1)
    o.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def measure(folder: Path, config: dict[str, Any], o: argparse.Namespace) -> dict[str, Any]:
    dtype = torch.bfloat16
    began = time.perf_counter()
    written = write_checkpoint(folder, config, o.device)
    say(began, f"wrote {written / 1e9:.1f} GB")
    facts = describe(folder)
    disk = cold_rate(folder, config["num_hidden_layers"])
    say(began, f"the disk reads {disk / 1e9:.2f} GB/s")
    product = measured_product(o.device, dtype)
    say(began, f"a matrix product reaches {product / 1e12:.0f} TFLOP/s")

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config["vocab_size"], (o.sequences, o.length), generator=generator)
    batches = [Batch(row[None], "random", (str(i),), ()) for i, row in enumerate(ids)]
    pattern = Pattern("".join("FS"[i % 2] for i in range(config["num_hidden_layers"])))
    said = forecast(
        facts,
        [Round(o.candidates, o.candidates * len(pattern), 0.5)],
        batches,
        dtype="bfloat16",
        device=o.device,
        read_rate=disk,
        compute_rate=product / 2,
    )
    model = load(folder, dtype="bfloat16", device=o.device, stream=StreamSettings())
    accelerate(model)
    stream = stream_of(model)
    assert stream is not None
    say(began, "made the model")
    inputs = [b.ids for b in batches] * o.candidates
    rows: list[LayerDone] = []
    for warm in (False, True):
        drop_cache(folder)
        rows.clear()
        if warm and o.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        before = time.perf_counter()
        stream.run([Variant(pattern)], inputs, lambda finals: None, report=rows.append)
        say(began, f"a pass of {time.perf_counter() - before:.1f} s")
    whole = time.perf_counter() - before
    stream.close()

    shape = Shape.of(config)
    found = []
    for done in rows:
        role = pattern[done.layer]
        kind = "dense" if done.layer < shape.dense_layers else "experts"
        work = layer_operations(shape, done.layer, role == "F", batches) * o.candidates
        found.append(
            {
                "layer": done.layer,
                "kind": f"{kind}, {role}",
                "candidates": o.candidates,
                "seconds": round(done.seconds, 3),
                "tflops": significant(work / done.seconds / 1e12),
                "compute_tflops": significant(work / (done.seconds - done.waited) / 1e12),
                "read_gb": round(done.read / 1e9, 3),
                "read_gb_s": round(done.rate, 2),
                "waited": round(done.waited, 3),
                "wait_share": round(done.waited / done.seconds, 4),
            }
        )
    experts = [done for done in rows if done.layer >= shape.dense_layers]
    worked = [layer_operations(shape, r.layer, pattern[r.layer] == "F", batches) for r in experts]
    rate = sum(worked) * o.candidates / sum(r.seconds for r in experts)
    build = sum(r.waited for r in experts) / len(experts)
    gpu = o.device != "cpu"
    slabs = 2 * max(plan.size for plan in stream.layers.reader.plans)
    return {
        "command": "python -m benchmarks.stream" + (" --tiny" if o.tiny else ""),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "torch": torch.__version__,
        "shape": "deepseek-v3.2" if not o.tiny else "tiny",
        "layers_timed": len(found),
        "tokens": ids.numel(),
        "sequences": o.sequences,
        "length": o.length,
        "rows": found,
        "disk_gb_s": round(disk / 1e9, 2),
        "product_tflops": significant(product / 1e12),
        "peak_device_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if gpu else None,
        "peak_host_gb": round((stream.peak + slabs) / 1e9, 1),
        "rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
        "pass_seconds": round(whole, 2),
        "forecast": {
            "seconds": round(said.seconds, 2),
            "device_gb": round(said.device_bytes / 1e9, 1),
            "host_gb": round(said.host_bytes / 1e9, 1),
            "compute_tflops": significant(product / 2e12),
        },
        "projected_hours": {
            f"{layers} to {full}": round(hours(name, full, o, rate, disk, build), 2)
            for name, layers, full in SEARCHES
        },
        "forecast_hours": {
            f"{layers} to {full}": round(hours(name, full, o, product / 2, disk, 0.0), 2)
            for name, layers, full in SEARCHES
        },
    }


def hours(
    name: str, full: int, o: argparse.Namespace, rate: float, disk: float, build: float
) -> float:
    """Return the hours of a search of a whole model, whose candidates are born evenly.

    Args:
        rate: operations a second, waiting included.
        disk: bytes a second.
        build: seconds that a layer waits for at least.
    """
    shape = Shape.of(SHAPES[name])
    text = torch.zeros(1, o.length, dtype=torch.long)
    batches = [Batch(text, "random", ("0",), ())] * o.sequences
    seconds = 0.0
    for flips in range(shape.layers - full):
        share = 1 - flips / shape.layers
        for layer in range(shape.layers):
            mlp = shape.dense_weights
            if layer >= shape.dense_layers:
                mlp = (shape.experts + shape.shared_experts) * shape.expert_weights
            stored = shape.attention_weights + shape.indexer_weights + mlp
            states = 1 + (shape.layers - 1 - flips) * layer / shape.layers
            work = states * layer_operations(shape, layer, share, batches) / rate
            seconds += max(work, stored / disk, build)
    return seconds / 3600


def cold_rate(folder: Path, layers: int) -> float:
    """Return the bytes a second at which the reader reads one layer past the page cache."""
    drop_cache(folder)
    weights = open_weights(describe(folder))
    reader = Reader(weights, [weights.layer(layers - 1)])
    began = time.perf_counter()
    reader.take(0)
    seconds = time.perf_counter() - began
    reader.close()
    return reader.read / seconds


def drop_cache(folder: Path) -> None:
    """Drop a checkpoint's files from the page cache, and all else where that is allowed."""
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1\n", encoding="ascii")
    except OSError:
        return  # Only root may; the files are dropped above.


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def say(began: float, text: str) -> None:
    print(f"{time.perf_counter() - began:7.1f} s  {text}", flush=True)


if __name__ == "__main__":
    main()
