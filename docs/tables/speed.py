"""Make the tables of speed: beside vLLM on one H200, the 30B shape, and the kernels."""

from __future__ import annotations

from collections.abc import Iterable

from docs.tables.registry import kilo, markdown, read, seconds, table


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
