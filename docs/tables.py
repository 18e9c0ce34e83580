"""Write the tables of README and docs from the result files they quote.

A page holds a table between `<!-- table NAME -->` and `<!-- end -->`. Run

    python -m docs.tables

after a result file has changed; the tests fail where a page and its result files disagree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from indexcache.distilling.flops import flops_per_token
from indexcache.distilling.settings import DistillSettings
from indexcache.pattern import Pattern
from indexcache.searching.greedy import evaluations
from indexcache.shapes import DEVICES, Shape, count_pairs, shape_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.S)
TABLES: dict[str, Callable[[], str]] = {}


def table(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a function that returns the markdown of the table `name`."""

    def register(make: Callable[[], str]) -> Callable[[], str]:
        TABLES[name] = make
        return make

    return register


def pages() -> list[Path]:
    """Return README and every page of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """Return a page with every table made anew from its result files."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def read(name: str) -> Any:
    """Return the content of one result file."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a markdown table."""
    titles = list(header)
    lines = [titles, ["---"] * len(titles), *map(list, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def kilo(tokens: int) -> str:
    return f"{tokens // 1000}K"


def seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


# -- beside vLLM, one H200 ---------------------------------------------------------------


def _beside(contexts: Iterable[int] | None = None) -> str:
    rows = []
    wanted = None if contexts is None else set(contexts)
    for r in read("beside_vllm_h200.json")["rows"]:
        if wanted is None or r["context"] in wanted:
            first = r["peer_ttft_s"] / r["ttft_s"]
            rate = r["decode_tok_s"] / r["peer_decode_tok_s"]
            layers = "all" if r["name"] == "all" else "one in four"
            rows.append(
                [
                    kilo(r["context"]),
                    layers,
                    f"{seconds(r['ttft_s'])} s",
                    f"{seconds(r['peer_ttft_s'])} s",
                    f"{first:.2f} x",
                    f"{r['decode_tok_s']:.0f}",
                    f"{r['peer_decode_tok_s']:.0f}",
                    f"{rate:.2f} x",
                ]
            )
    header = ["prompt", "full layers", "first token", "vLLM 0.33.0", "", "tokens/s", "vLLM", ""]
    return markdown(header, rows)


@table("beside-vllm-short")
def beside_vllm_short() -> str:
    return _beside((60_000, 200_000))


@table("beside-vllm")
def beside_vllm() -> str:
    return _beside()


# -- the 30B shape -----------------------------------------------------------------------

PARTS = ("linears", "indexer", "index_topk", "plan", "attention", "mlp", "head", "rest")


@table("published")
def published() -> str:
    result = read("glm-4.7-flash-dsa_h100.json")
    paper = result["published"]
    rows = []
    chosen = [r for r in result["rows"] if r["name"] in ("all", "1/2", "1/4")]
    for r in sorted(chosen, key=lambda r: (r["context"], -r["full"])):
        at = paper["contexts"].index(r["context"])
        rows.append(
            [
                kilo(r["context"]),
                f"{r['name']} ({r['full']}/{r['layers']})",
                f"{r['ttft_s']:.3g} ({paper['ttft_s'][r['name']][at]})",
                f"{r['speedup']['ttft']:.2f}",
                f"{r['decode_tok_s']:.0f} ({paper['decode_tok_s'][r['name']][at]})",
                f"{r['speedup']['decode']:.2f}",
                f"{r['added_gb']:.2f}",
            ]
        )
    header = ["context", "full layers", "TTFT s (published)", "gain", "tokens/s (published)"]
    return markdown([*header, "gain", "prefill adds GB"], rows)


@table("parts")
def parts() -> str:
    rows = []
    for r in read("glm-4.7-flash-dsa_h200_one_request.json")["rows"]:
        if r["context"] == 200_000 and r["name"] in ("all", "1/4"):
            for what, key, floor in (
                ("prefill, s", "parts_ms", "floor_ms"),
                ("decoding step, ms", "decode_parts_ms", "decode_floor_ms"),
            ):
                scale = 1e3 if what.startswith("prefill") else 1.0
                cells = [
                    f"{r[key][p] / scale:.2f} ({r[floor].get(p, 0.0) / scale:.2f})"
                    if p in r[key]
                    else ""
                    for p in PARTS
                ]
                rows.append([f"{what}, {r['name']}", *cells])
    return markdown(["", *PARTS], rows)


@table("batch")
def batch() -> str:
    rows = []
    for r in read("glm-4.7-flash-dsa_h200.json")["rows"]:
        if r["batch"] > 1:
            rows.append(
                [
                    f"{r['batch']} x {kilo(r['context'])}",
                    f"{r['name']} ({r['full']}/{r['layers']})",
                    f"{r['decode_total_tok_s']:.0f} ({r['published']['decode_total_tok_s']})",
                    f"{r['speedup']['decode']:.2f}",
                    f"{r['cache_gb']:.0f} GB",
                    f"{r['peak_gb']:.0f} GB",
                ]
            )
    header = ["requests", "full layers", "tokens/s of all (published)", "gain", "cache", "peak"]
    return markdown(header, rows)


@table("kernels")
def kernels() -> str:
    rows = []
    for r in read("ops_h100.json")["rows"]:
        if ("fp8" in r["op"] and "decode" in r["op"]) or "triton" in r["op"]:
            continue  # fp8 latents are gone; the plain kernel of the scores is the slower one
        if "backward" in r["op"] or r["shape"].startswith("8192 k=2048"):
            continue
        peer = ""
        if r.get("peer_ms"):
            peer = f"{r['peer']} {r['peer_ms']:.4g} ms, {r['peer_ms'] / r['ms']:.2f} x"
        share = r["floor_ms"] / r["ms"]
        rows.append([r["op"], r["shape"], f"{r['ms']:.4g}", f"{share:.2f}", peer])
    header = ["operation", "shape", "ms", "floor / ms", "peer"]
    return markdown(header, rows)


# -- tiny --------------------------------------------------------------------------------


@table("tiny")
def tiny() -> str:
    rows = []
    for r in read("demo_tiny.json")["rows"]:
        if r["domain"] == "all":
            rows.append(
                [
                    f"{r['name']}: `{r['pattern']}`",
                    f"{r['full']} of {r['layers']}",
                    f"{r['loss']:.4f}",
                    f"{r['delta_loss']:+.4f}",
                    f"[{r['ci_low']:+.4f}, {r['ci_high']:+.4f}]",
                    f"{r['kl']:.4f}",
                    f"{100 * r['agreement']:.1f}%",
                    f"{100 * r['pool_share']:.3g}%" if r.get("pool_share") else "",
                ]
            )
    header = ["pattern", "full layers", "loss", "vs full", "95 % interval", "KL", "same top-1"]
    return markdown([*header, "pool of the context"], rows)


@table("tiny-pool")
def tiny_pool() -> str:
    rows: dict[tuple[int, int], dict[str, str]] = {}
    for r in read("tiny_pool_share.json")["rows"]:
        cells = rows.setdefault((r["full"], r["length"]), {})
        share = "S" if r["pool"] is None else f"R, pool 1/{round(1 / r['pool_share'])}"
        cells[share] = f"{r['delta_loss']:+.3f} [{r['ci_low']:+.3f}, {r['ci_high']:+.3f}]"
    shares = next(iter(rows.values()))
    return markdown(
        ["full layers", "length", *shares],
        [
            [f"{full} of 12", f"{n:,}", *(cells.get(share, "") for share in shares)]
            for (full, n), cells in sorted(rows.items(), key=lambda row: (-row[0][0], row[0][1]))
        ],
    )


@table("search-cost")
def search_cost() -> str:
    rows = read("search_cost.json")["rows"]
    exact = {(r["model"], r["seed"]): r for r in rows if r["method"] == "exact"}
    lines = []
    for model, seed, method in dict.fromkeys((r["model"], r["seed"], r["method"]) for r in rows):
        own = [r for r in rows if (r["model"], r["seed"], r["method"]) == (model, seed, method)]
        work = own[0]["layer_tokens"] / exact[model, seed]["layer_tokens"]
        cells = [
            f"{r['above_exact']:+.4f} [{r['ci_low']:+.4f}, {r['ci_high']:+.4f}]"
            for r in sorted(own, key=lambda r: -r["full"])
        ]
        if method == "exact":
            cells = [f"{r['held_out_loss']:.4f}" for r in sorted(own, key=lambda r: -r["full"])]
        first = own[0]
        lines.append([f"{model}, {seed}", method, str(first["evaluations"]), f"{work:.2f}", *cells])
    return markdown(["model, seed", "search", "evaluations", "work", "1/2", "1/4", "1/8"], lines)


@table("search-starts")
def search_starts() -> str:
    return markdown(
        ["model, seed", "gradients", "flips on the smallest part", "similarity of selections"],
        [
            [
                f"{r['model']}, {r['seed']}",
                *(f"{r[key]:.2f}" for key in ("gradients", "smallest_part", "similarity")),
            ]
            for r in read("search_cost.json").get("starts", [])
        ],
    )


@table("tiny-third-layer")
def tiny_third_layer() -> str:
    rows = read("tiny_third_layer.json")["rows"]
    return markdown(
        ["third full layer", "loss above the searched pattern's", "95 % interval"],
        [
            [
                f"`{r['pattern']}`",
                f"{r['delta_loss']:+.3f}",
                f"[{r['ci_low']:+.3f}, {r['ci_high']:+.3f}]",
            ]
            for r in sorted(rows, key=lambda r: r["delta_loss"])
        ],
    )


@table("tiny-cpu")
def tiny_cpu() -> str:
    rows = []
    for r in read("tiny_cpu.json")["rows"]:
        formula = f"{r['stock_formula_mb']:,} MB" if r["path"] == "stock" else ""
        rows.append(
            [
                f"{r['context']:,}",
                r["path"],
                "" if r["seconds"] is None else f"{r['seconds']:.1f}",
                "" if r["peak_mb"] is None else f"{r['peak_mb']:,} MB",
                formula,
            ]
        )
    header = ["context", "path", "seconds", "peak of the process", "stock's scores by formula"]
    return markdown(header, rows)


# -- intervals ---------------------------------------------------------------------------


@table("coverage")
def coverage() -> str:
    rows = {(r["differences"], r["documents"]): r for r in read("coverage.json")["rows"]}

    def cell(name: str, documents: int) -> str:
        r = rows[name, documents]
        rates = (r["covered"], r["false_safe"], r["aa_different"])
        return ", ".join(f"{100 * rate:.1f}" for rate in rates)

    return markdown(
        [
            "differences of documents",
            "percentile bootstrap covers at 3, 8, 24, 50",
            "false safe",
            "this at 36: covers, false safe, A/A",
            "at 50",
            "at 108",
            "width over t",
        ],
        [
            [
                f"{name.split()[0]} `{name.split()[1]}`" if name.startswith("tiny") else name,
                *(
                    ", ".join(f"{100 * rows[name, n][key]:.0f}" for n in (3, 8, 24, 50))
                    for key in ("percentile_covered", "percentile_false_safe")
                ),
                *(cell(name, n) for n in (36, 50, 108)),
                ", ".join(f"{rows[name, n]['width_over_t']:.1f}" for n in (36, 50, 108)),
            ]
            for name in dict.fromkeys(name for name, _ in rows)
        ],
    )


# -- SmolLM2 -----------------------------------------------------------------------------


@table("smollm2-short")
def smollm2_short() -> str:
    rows = {
        (r["method"], r["kept"]): r
        for r in read("smollm2_training_aware.json")["rows"]
        if r["domain"] == "all"
    }
    named = (
        ("uniform pattern, nothing trained for it", "untouched"),
        ("uniform pattern, trained with L_multi", "multi"),
        ("searched pattern, nothing trained for it", "searched"),
    )
    return markdown(
        ["loss above all full; answers found", "1/2 (15 of 30)", "1/4 (8)", "1/8 (4)"],
        [
            [
                name,
                *(
                    f"{rows[way, k]['delta_loss']:+.3f}; {100 * rows[way, k]['retrieval']:.0f} %"
                    for k in (2, 4, 8)
                ),
            ]
            for name, way in named
        ],
    )


@table("smollm2-changes")
def smollm2_changes() -> str:
    rows = {
        r["method"]: r
        for r in read("smollm2_training_aware.json")["rows"]
        if r["domain"] == "all" and r["kept"] == 4
    }
    named = (
        ("a fifth of the steps", "multi, short"),
        ("four times the steps", "multi, long"),
        ("a third of the learning rate", "multi, slow"),
        ("three times the learning rate", "multi, fast"),
        ("400 steps of the sparse stage behind it", "multi, sparse"),
        ("layers weighted by what sharing them alone costs (`--layer-weights`)", "multi, weighted"),
        ("the engines' own rule: offset 2, nine full layers", "multi, offset2"),
        ("an oracle that selects by the mean attention of each group", "oracle"),
    )
    return markdown(
        ["change", "loss above all indexers"],
        [[title, f"{rows[way]['delta_loss']:.3f}"] for title, way in named],
    )


@table("smollm2-early")
def smollm2_early() -> str:
    loss = {
        (r["way"], len(r["served"])): f"{r['delta_loss']:.3f}"
        for r in read("smollm2_reasons_cpu.json")["rows"]
    }
    named = (
        ("layer 16's, as it is", "layer 16's own"),
        ("layer 16's, 240 steps of L_multi", "16, L_multi"),
        ("the same with 27 heads instead of nine", "16, 27 heads, L_multi"),
        ("layer 16's, trained on layer 17 alone", "16, layer 17 alone"),
        ("layer 17's, as it is", "layer 17's own"),
        ("layer 17's, with L_multi", "17, L_multi"),
    )
    alone = {"layer 17's own": "layer 17's own, for itself"}
    return markdown(
        ["indexer", "layers 17 to 19", "layer 17 alone"],
        [
            [title, loss.get((way, 3), ""), loss.get((alone.get(way, way), 1), "")]
            for title, way in named
        ],
    )


@table("smollm2-pool")
def smollm2_pool() -> str:
    result = read("smollm2_pool_share.json")
    shares = (None, "1/32", "1/16", "1/8", "1/4")
    rows = []
    for full in (8, 4):
        of = {r["pool_share"]: r for r in result["rows"] if r["full"] == full}
        rows.append([f"{full} of {result['layers']}", *(_loss_and_kl(of[s]) for s in shares)])
    header = ["full layers", "S", *(f"R, pool {s} of the context" for s in shares[1:])]
    return markdown(header, rows)


def _loss_and_kl(r: dict[str, Any]) -> str:
    return f"{r['delta_loss']:+.3f}, KL {r['kl']:.3f}"


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
    if not (RESULTS / STREAMED).exists():
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
    if not (RESULTS / STREAMED).exists():
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


ARMS = {
    "full": "all full",
    "uniform_multi": "uniform, L_multi",
    "uniform_own": "uniform, own targets",
    "uniform_lm": "uniform, language-modelling loss alone",
    "searched": "searched before, L_multi",
    "uniform_r": "uniform F, R elsewhere",
    "uniform_max": "uniform, maximum over layers",
    "uniform_cover": "uniform, coverage",
    "uniform_weighted": "uniform, layers weighted by a search",
    "uniform_answers": "uniform, L_multi and the term on answers",
    "uniform_cover_answers": "uniform, coverage and the term on answers",
    "searched_cover": "searched before, coverage",
    "searched_answers": "searched before, L_multi and the term on answers",
    "searched_max": "searched before, maximum over layers",
    "searched_own": "searched before, own targets",
}


@table("training-aware")
def training_aware() -> str:
    """Compare the arms with the full one; nothing where the comparison has no result yet."""
    if not (RESULTS / "training_aware.json").exists():
        return ""
    rows = [
        [
            r["model"],
            ARMS[r["arm"]] + (f", offset {r['offset']}" if r["offset"] > 1 else ""),
            r["kept"],
            str(r["seeds"]),
            f"{r['delta_loss']:+.4f} [{r['ci_low']:+.4f}, {r['ci_high']:+.4f}]",
            f"{r['share_of_loss']:+.2%}",
            f"{r['recall']:.1%} ({100 * r['delta_recall']:+.1f})",
        ]
        for r in read("training_aware.json")["summary"]
    ]
    against = "loss against all full, nats a token"
    header = ["model", "arm", "kept", "seeds", against, "of its loss", "answers found"]
    return markdown(header, rows)


TRAINED = {"30B": "glm-4.7-flash-dsa", "DeepSeek-V3.2, 671B": "deepseek-v3.2"}


@table("training-cost")
def training_cost() -> str:
    tokens, peak, length = 1e9, DEVICES["H100"].peak, 131072
    rates = {"13 % MFU": 0.13, "30 %": 0.3}
    if (RESULTS / "training_aware.json").exists():  # Arms of SmolLM2 have a GPU to themselves.
        found = [r.get("mfu") for r in read("training_aware.json")["rows"] if r["model"] != "tiny"]
        if measured := [mfu for mfu in found if mfu]:
            rates[f"{max(measured):.1%}, measured on SmolLM2"] = max(measured)
    rows = []
    for name, source in TRAINED.items():
        shape = shape_of(source)
        for full, pattern in (("all", "F" * shape.layers), ("1/4", None)):
            roles = Pattern(pattern) if pattern else Pattern.uniform(shape.layers, 4)
            operations = flops_per_token(shape, roles, DistillSettings(stage="sparse"), length)
            hours = [tokens * operations / (peak * mfu) / 3600 for mfu in rates.values()]
            cells = [f"{h:,.0f}" for h in hours]
            rows.append([name, full, f"{operations / 1e9:,.0f}", *cells])
    hours = [f"{'at' if i else 'GPU hours at'} {name}" for i, name in enumerate(rates)]
    return markdown(["model", "full", "GFLOP a token", *hours], rows)


def main() -> None:
    """Write every page's tables in place."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: tables written")


if __name__ == "__main__":
    main()
