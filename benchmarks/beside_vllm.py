r"""Compare prefill and decoding of this package with vLLM on one card, the same shape, one request.

Three steps, back to back on one machine; the first runs where vLLM can be imported:

    python -m benchmarks.beside_vllm engine --freq 4 --out vllm.jsonl     # and --freq 1
    indexcache bench glm-4.7-flash-dsa \
        --selections benchmarks/data/tiny_selections.safetensors:topk.10 \
        --contexts 200K,60K,120K,10K --patterns all,1/2,1/4 --out runs/bench
    python -m benchmarks.beside_vllm join --bench runs/bench/bench.json --engine vllm.jsonl \
        --out benchmarks/results/beside_vllm_h200.json --plot docs/beside_vllm.png
    python -m benchmarks.beside_vllm serving      # the same rows, one system a row

`join` refuses rows whose correctness check failed and rows of different cards. The check of the
engine is that after a prompt of 20,000 tokens its top-k buffer has k different positions of the
prompt. The weights are random in both, so the tokens mean nothing; only times count.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from indexcache.pattern import Pattern

RESULTS = Path(__file__).parent / "results"

# This is GLM-4.7-Flash with a lightning indexer, `glm-4.7-flash-dsa` of bench.
SHAPE: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "dtype": "bfloat16",
    "vocab_size": 154880,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "n_shared_experts": 1,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 768,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.8,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "max_position_embeddings": 202752,
    "num_nextn_predict_layers": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "rope_interleave": True,
    "indexer_rope_interleave": True,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
CONTEXTS = (10_000, 60_000, 120_000, 200_000)
NEW_TOKENS = 129
CHUNK = 8192
NAMES = {1: "all", 4: "1/4"}  # the name of each index_topk_freq of the engine


def start(freq: int, heads: int = 20, **options: Any) -> tuple[Any, Any]:
    """Return a vLLM of the 30B shape in this process, and its model with weights drawn anew.

    Args:
        freq: index_topk_freq.
        heads: attention heads.
        options: further arguments of `vllm.LLM`.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm

    shape = SHAPE | {"num_attention_heads": heads, "num_key_value_heads": heads}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(shape))
        llm = vllm.LLM(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=SHAPE["max_position_embeddings"],
            enable_prefix_caching=False,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=4,
            kv_cache_memory_bytes=16_000_000_000,
            hf_overrides={"index_topk_freq": freq},
            seed=0,
            disable_log_stats=True,
            compilation_config={"cudagraph_capture_sizes": [1, 2]},
            **options,
        )
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    model = runner.model.unwrap() if hasattr(runner.model, "unwrap") else runner.model
    _draw_weights(model)
    return llm, model


def indexers_of(model: Any) -> int:
    """Count the layers of vLLM's model that have an indexer."""
    return sum(layer.self_attn.indexer is not None for layer in model.model.layers)


def random_tokens(count: int, seed: int = 11) -> list[int]:
    """Draw a prompt."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 154_000, (count,), generator=generator).tolist()


def engine(freq: int, out: Path) -> None:
    """Time vLLM, and append a JSON line with the check and one for each context and repetition."""
    import torch
    import vllm

    llm, model = start(freq)
    indexers = indexers_of(model)
    prompt = random_tokens(CONTEXTS[-1] + 2000)

    def emit(row: dict[str, Any]) -> None:
        line = json.dumps({"freq": freq, "indexer_layers": indexers} | row)
        print(line, flush=True)
        with open(out, "a") as file:
            file.write(line + "\n")

    for length in (12_000, 40_000):  # These requests compile kernels and fill caches.
        request(llm, prompt[:length], 8)
    request(llm, prompt[:20_000], 1)
    last = model.model.topk_indices_buffer[20_000 % CHUNK - 1].tolist()
    ids = [i for i in last if i >= 0]
    emit(
        {
            "kind": "check",
            "valid": len(ids),
            "unique": len(set(ids)),
            "max": max(ids),
            "device": torch.cuda.get_device_name(),
            "vllm": vllm.__version__,
            "torch": torch.__version__,
        }
    )
    for repetition in range(2):
        for length in CONTEXTS:
            first = 100 * repetition
            times, tokens = request(llm, prompt[first : first + length], NEW_TOKENS)
            emit({"kind": "time", "context": length, **speeds(times, tokens)})


def _draw_weights(model: Any) -> None:
    """Draw all weights again: a dummy load leaves zeros, whose scores are all equal."""
    import torch

    generator = torch.Generator(device="cuda").manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "e_score_correction_bias" in name:
                weight.zero_()
            elif "norm" in name:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
            elif weight.is_floating_point():
                weight.normal_(0.0, 0.02, generator=generator)
        for module in model.modules():  # vLLM derives these from kv_b_proj while loading.
            for name in ("W_UK_T", "W_UV"):
                derived = getattr(module, name, None)
                if isinstance(derived, torch.Tensor):
                    derived.normal_(0.0, 0.02, generator=generator)
    torch.cuda.synchronize()


_requests = 0


def request(llm: Any, prompt: list[int], new_tokens: int) -> tuple[list[float], list[int]]:
    """Return the time at which each new token came, in seconds, and the tokens."""
    global _requests
    import torch
    from vllm import SamplingParams

    _requests += 1
    settings = SamplingParams(
        temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
    )
    torch.cuda.synchronize()
    began = time.perf_counter()
    llm.llm_engine.add_request(f"r{_requests}", {"prompt_token_ids": prompt}, settings)
    times: list[float] = []
    tokens: list[int] = []
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            tokens = list(output.outputs[0].token_ids)
            times += [time.perf_counter() - began] * (len(tokens) - len(times))
    return times, tokens


def speeds(times: list[float], tokens: list[int]) -> dict[str, Any]:
    """Lay out what `request` returned."""
    return {
        "ttft_s": round(times[0], 4),
        "decode_tok_s": round((len(times) - 1) / (times[-1] - times[0]), 2),
        "different_tokens": len(set(tokens)),
    }


def join(bench: Path, engine_rows: Path, out: Path, plot: Path | None) -> None:
    """Write one result file, and the picture, from a bench.json and the engine's lines."""
    ours = json.loads(bench.read_text())
    lines = [json.loads(line) for line in engine_rows.read_text().splitlines()]
    checks = {line["freq"]: line for line in lines if line["kind"] == "check"}
    k = ours["shape"]["topk"]
    for freq, check in checks.items():
        if not (check["valid"] == check["unique"] == k and check["max"] < 20_000):
            sys.exit(f"The engine's selection failed its check at index_topk_freq {freq}: {check}")
        if check["device"] != ours["device"]:
            sys.exit(f"The rows are of two cards: {check['device']} and {ours['device']}.")
    rows = []
    for row in ours["rows"]:
        peers = [
            line
            for line in lines
            if line["kind"] == "time"
            and line["context"] == row["context"]
            and NAMES[line["freq"]] == row["name"]
        ]
        if any(line["different_tokens"] < 10 for line in peers):
            sys.exit(f"The engine repeats itself at {row['context']} tokens: {peers}")
        if peers:
            rows.append(
                {
                    "context": row["context"],
                    "name": row["name"],
                    "layers": row["layers"],
                    "full": row["full"],
                    "ttft_s": row["ttft_s"],
                    "floor_ttft_s": round(sum(row["floor_ms"].values()) / 1e3, 4),
                    "decode_tok_s": row["decode_tok_s"],
                    "floor_decode_tok_s": round(1e3 / sum(row["decode_floor_ms"].values()), 1),
                    "peer_full": peers[0]["indexer_layers"],
                    "peer_ttft_s": min(line["ttft_s"] for line in peers),
                    "peer_ttft_runs_s": [line["ttft_s"] for line in peers],
                    "peer_decode_tok_s": max(line["decode_tok_s"] for line in peers),
                    "peer_decode_runs_tok_s": [line["decode_tok_s"] for line in peers],
                }
            )
    versions = next(iter(checks.values()))
    result = {
        "device": ours["device"],
        "date": ours["date"],
        "model": ours["model"],
        "peer": f"vLLM {versions['vllm']}, torch {versions['torch']}, index_topk_freq 1 and 4, "
        f"bf16 cache, chunks of {CHUNK}, defaults otherwise, random weights; the better of two "
        "runs",
        "note": "One card, vLLM first and ours after it. Attention of ours reads recorded "
        "selections of a trained model in the prefill, vLLM those of its own random indexers.",
        "rows": sorted(rows, key=lambda r: (r["context"], -r["full"])),
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    if plot is not None:
        draw(result, plot)


def serving(result: dict[str, Any]) -> dict[str, Any]:
    """Lay out the rows of `join` with one system in each, as other engines' results are."""
    layers = SHAPE["num_hidden_layers"]
    rows = []
    for row in result["rows"]:
        freq = next(f for f, name in NAMES.items() if name == row["name"])
        # vLLM's offset is 2 where none is given: layer i is S where max(i - 1, 0) % freq != 0.
        theirs = "".join("F" if max(i - 1, 0) % freq == 0 else "S" for i in range(layers))
        ours = str(Pattern.uniform(layers, freq))
        assert (theirs.count("F"), ours.count("F")) == (row["peer_full"], row["full"])
        for who, pattern, selections, prefix in (
            ("vllm", theirs, "random", "peer_"),
            ("indexcache", ours, "recorded", ""),
        ):
            rows.append(
                {
                    "context": row["context"],
                    "heads": SHAPE["num_attention_heads"],
                    "full": pattern.count("F"),
                    "pattern": pattern,
                    "selections": selections,
                    "who": who,
                    "ttft_s": row[f"{prefix}ttft_s"],
                    "decode_tok_s": row[f"{prefix}decode_tok_s"],
                }
            )
    version = result["peer"].split(",")[0].removeprefix("vLLM ")
    return {"vllm": version, "device": result["device"], "note": result["note"], "rows": rows}


def replaced(row: dict[str, Any]) -> bool:
    """Say whether a row of vllm_serving.json is one that `serving` writes."""
    return row["who"] == "indexcache" or (row["who"] == "vllm" and row["selections"] == "random")


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the time to the first token of both systems, all layers full and one in four."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts = sorted({row["context"] for row in result["rows"]})
    series = (
        ("vLLM 0.33.0, all layers full", "all", "peer_ttft_s", "#b0b7bf"),
        ("vLLM 0.33.0, 1/4 full", "1/4", "peer_ttft_s", "#6b7780"),
        ("indexcache, all layers full", "all", "ttft_s", "#7fb8e6"),
        ("indexcache, 1/4 full", "1/4", "ttft_s", "#1f6fb2"),
    )
    figure, axes = pyplot.subplots(figsize=(8.8, 3.4), layout="constrained")
    for number, (label, name, key, colour) in enumerate(series):
        seconds = {row["context"]: row[key] for row in result["rows"] if row["name"] == name}
        places = [i + (number - 1.5) * 0.2 for i in range(len(contexts))]
        bars = axes.bar(places, [seconds[c] for c in contexts], 0.19, label=label, color=colour)
        axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=1)
    axes.set_xticks(range(len(contexts)), [f"{c // 1000}K" for c in contexts])
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("seconds to the first token")
    axes.set_title(f"30B shape, one request, one {result['device']}: lower is better", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    timing = verbs.add_parser("engine", help="time vLLM; append JSON lines")
    timing.add_argument("--freq", type=int, choices=tuple(NAMES), required=True)
    timing.add_argument("--out", type=Path, required=True)
    joining = verbs.add_parser("join", help="check the rows, write the result and the picture")
    joining.add_argument("--bench", type=Path, required=True)
    joining.add_argument("--engine", type=Path, required=True)
    joining.add_argument("--out", type=Path, required=True)
    joining.add_argument("--plot", type=Path)
    verbs.add_parser("serving", help="write vllm_serving.json from beside_vllm_h200.json")
    arguments = parser.parse_args()
    if arguments.verb == "serving":
        result = serving(json.loads((RESULTS / "beside_vllm_h200.json").read_text()))
        before = json.loads((RESULTS / "vllm_serving.json").read_text())
        # benchmarks/vllm_backend.py adds rows and losses of runs inside vLLM.
        kept = [row for row in before["rows"] if not replaced(row)]
        result = before | result | {"rows": result["rows"] + kept}
        (RESULTS / "vllm_serving.json").write_text(json.dumps(result, indent=1) + "\n")
    elif arguments.verb == "engine":
        engine(arguments.freq, arguments.out)
    else:
        join(arguments.bench, arguments.engine, arguments.out, arguments.plot)


if __name__ == "__main__":
    main()
