"""Make the tables of large models: evaluations in vLLM, FP8, streamed layers, and hours."""

from __future__ import annotations

from docs.tables.registry import exists, markdown, read, seconds, table
from indexcache.searching.greedy import evaluations
from indexcache.shapes import Shape, count_pairs, shape_of

LARGE = {"DeepSeek-V3.2": ("deepseek-v3.2", 15), "GLM-5": ("glm-5", 20)}
"""By name: the shape, and the full layers at the end of a search down to 1/4."""
LENGTH, SEQUENCES, GPUS = 16384, 8, 8


def token_operations(shape: Shape, length: int, full: int) -> float:
    """Return the operations of an evaluation for each token, all logits included.

    Sequences have `length` tokens, and `full` layers run their indexer.
    """
    weights = shape.backbone_weights + full * shape.indexer_weights + shape.head_weights
    attention = shape.layers * count_pairs(length, shape.topk) * shape.latent_pair_operations
    scores = full * count_pairs(length, length) * shape.index_pair_operations
    return 2 * weights + (attention + scores) / length


def measured_rates() -> list[tuple[int, float, float, float]]:
    """Return (full layers, seconds, tokens a second, operations a second) of vLLM's evaluations."""
    result = read("vllm_evaluation_h200.json")
    shape, length = shape_of(result["shape"]), result["length"]
    found = []
    for row in result["rows"]:
        rate = result["sequences"] * length / row["seconds"]
        operations = rate * token_operations(shape, length, row["full"])
        found.append((row["full"], row["seconds"], rate, operations))
    return found


@table("large-measured")
def large_measured() -> str:
    result = read("vllm_evaluation_h200.json")
    shape = shape_of(result["shape"])
    rows = [
        [
            f"{full} of {shape.layers}",
            f"{taken:.2f} s",
            f"{rate:,.0f}",
            f"{token_operations(shape, result['length'], full) / 1e9:.1f}",
            f"{operations / 1e12:.0f}",
        ]
        for full, taken, rate, operations in measured_rates()
    ]
    header = ["full layers", "an evaluation", "tokens/s", "GFLOP a token", "TFLOP/s"]
    return markdown(header, rows)


@table("large-hours")
def large_hours() -> str:
    slowest = min(operations for *_, operations in measured_rates())
    columns = []
    for name, full in LARGE.values():
        shape = shape_of(name)
        layers, count = shape.layers, evaluations(shape.layers, full)
        tokens = count * SEQUENCES * LENGTH
        most, least = (token_operations(shape, LENGTH, n) for n in (layers, full))
        rates = [GPUS * slowest * share / ((most + least) / 2) for share in (1, 0.5, 0.25)]
        columns.append(
            [
                f"{layers} to {full} full",
                f"1 + {layers - 1} + {layers - 2} + .. + {full} = {count:,}",
                f"{count:,} x {SEQUENCES} x {LENGTH:,} = {tokens / 1e6:.0f} million",
                f"{most / 1e9:.0f} to {least / 1e9:.0f}",
                *(f"{rate:,.0f} tokens/s: {tokens / rate / 3600:.1f} h" for rate in rates),
            ]
        )
    titles = [
        "search",
        "evaluations",
        "tokens",
        "GFLOP a token",
        f"{GPUS} GPUs at {slowest / 1e12:.0f} TFLOP/s each",
        "**at half of that**",
        "at a quarter",
    ]
    rows = zip(titles, *columns, strict=True)
    return markdown(["", *LARGE], rows)


@table("fp8-ranking")
def fp8_ranking() -> str:
    header = [
        "arithmetic",
        "all full",
        "flips",
        "rank correlation with FP8 weights, fp32",
        "with FP8 weights, bf16",
        "same cheaper half",
        "largest difference of a flip",
    ]
    rows = []
    for name, file in (("tiny", "fp8_ranking_tiny.json"), ("SmolLM2", "fp8_ranking.json")):
        for row in read(file)["rows"]:
            flips = row["flips"]
            rows.append(
                [
                    f"{name}: {row['arithmetic']}",
                    f"{row['full']:.4f}",
                    f"{min(flips):.4f} to {max(flips):.4f}",
                    f"{row['spearman']:.3f}",
                    f"{row['spearman_with_bf16']:.3f}",
                    f"{row['cheaper_half']} of {len(flips) // 2}",
                    f"{row['largest_difference']:.4f}",
                ]
            )
    return markdown(header, rows)


STREAMED = "stream_h200.json"
"""Results of benchmarks/stream.py, which needs a GPU; without them their tables say so."""
NOT_MEASURED = "Nobody has measured this yet; `python -m benchmarks.stream` does, on a GPU.\n"


@table("stream-measured")
def stream_measured() -> str:
    if not exists(STREAMED):
        return NOT_MEASURED
    result = read(STREAMED)
    header = ["layer", "candidates", "seconds", "TFLOP/s", "read, GB/s", "waits for weights"]
    rows = [
        [
            f"{r['layer']}: {r['kind']}",
            str(r["candidates"]),
            seconds(r["seconds"]),
            f"{r['tflops']:.0f}",
            f"{r['read_gb_s']:.2f}",
            f"{r['wait_share']:.1%}",
        ]
        for r in result["rows"]
    ]
    return markdown(header, rows)


@table("stream-hours")
def stream_hours() -> str:
    if not exists(STREAMED):
        return NOT_MEASURED
    result = read(STREAMED)
    said = result.get("forecast_hours", {})
    rows = [
        [f"{name} full, one GPU", f"{hours:.1f} h", f"{said[name]:.1f} h" if name in said else ""]
        for name, hours in result["projected_hours"].items()
    ]
    forecast = result.get("forecast", {})
    for what in ("device", "host"):
        memory, key = result[f"peak_{what}_gb"], f"{what}_gb"
        before = f"{forecast[key]:.0f} GB" if key in forecast else ""
        rows.append([f"peak {what} memory of this run", f"{memory:.0f} GB", before])
    if "disk_gb_s" in result:
        rows.append(["the disk alone, past the page cache", f"{result['disk_gb_s']:.2f} GB/s", ""])
    return markdown(["", "from the measured layers", "the forecast said before"], rows)
