r"""Time this package's attention inside vLLM beside vLLM's own: one card, the same selections.

    python -m benchmarks.vllm_backend engine --who vllm --heads 16 --out rows.jsonl
    python -m benchmarks.vllm_backend engine --who vllm+indexcache --heads 16 --out rows.jsonl
    python -m benchmarks.vllm_backend join rows.jsonl

`engine` starts one vLLM 0.33 in the 30B shape with random weights (`benchmarks.beside_vllm`),
index_topk_freq 4 and so many attention heads, as a rank has under tensor parallel. "vllm" is vLLM
with its defaults, FLASH_ATTN_MLA_SPARSE on Hopper, and "vllm+indexcache" the same with
`--attention-backend CUSTOM`. Each appends JSON lines: the time to the first token and tokens/s at
60K, 120K and 200K tokens, one request, and losses of two random texts of 32,768 tokens.

Neighbouring queries of a random indexer have little in common, those of a trained one much, and
grouped attention lives on that. So each is measured twice:

- "recorded": in a prefill attention reads ids recorded from `tiny` (`benchmarks.selections`),
  stretched over the context as `bench --selections` does. The indexer still runs and is timed;
  then the recorded ids are copied over its own. That copy is in both times.
- "indexer": attention reads what the indexer selected.

Decoding reads the indexer's own ids in both.

`join` refuses rows that fail a check: of two cards, of another backend than was asked for, of a
selection with wrong ids, of an engine that repeats itself, or with losses that lie further from
vLLM's than vLLM's own losses of the indexer's ids lie from each other. It writes the better of the
repetitions and the losses to benchmarks/results/vllm_serving.json.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.beside_vllm import (
    CHUNK,
    NEW_TOKENS,
    RESULTS,
    SHAPE,
    indexers_of,
    random_tokens,
    request,
    speeds,
    start,
)
from benchmarks.selections import FILE

VLLM, OURS = "vllm", "vllm+indexcache"
IMPLEMENTATIONS = {VLLM: "FlashAttnMLASparseImpl", OURS: "IndexCacheImpl"}
RECORDED, INDEXER = "recorded", "indexer"
CONTEXTS = (60_000, 120_000, 200_000)
FREQ = 4
RECORDED_LAYER = "topk.10"
CHECKED = 20_000  # tokens of the prompt after which the selection is checked
WARM = (12_000, 40_000)  # tokens of the prompts that compile kernels and fill caches
TEXTS, TEXT_LENGTH = 2, 32_768
LOSSES = {VLLM: {RECORDED: 2, INDEXER: 5}, OURS: {RECORDED: 2, INDEXER: 2}}
"""How often the losses are computed; the indexer's own ids show vLLM's noise."""


class Recorded:
    """Recorded ids, which attention reads in a prefill in place of those of the indexer.

    Attributes:
        table: the ids of the query at each position, int32 [positions, k], on the GPU.
        on: whether they are read; otherwise the indexer's own stay.
        rows: how many rows have been copied, layers counted apart.
    """

    def __init__(self) -> None:
        self.table: Any = None
        self.on = False
        self.rows = 0

    def behind(self, indexer: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap vLLM's `sparse_attn_indexer`, which writes ids into `topk_indices_buffer`.

        Steps of several requests are refused; in a step of decoding nothing changes, so that a
        graph that captured it stays right.
        """
        signature = inspect.signature(indexer)

        @functools.wraps(indexer)
        def select(*args: Any, **kwargs: Any) -> Any:
            result = indexer(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            context = importlib.import_module("vllm.forward_context").get_forward_context()
            step = (context.attn_metadata or {}).get(given["k_cache_prefix"])
            if self.on and step is not None and step.prefill is not None:
                self._copy(step.prefill.chunks, given["topk_indices_buffer"])
            return result

        # `selecting.install` would put itself before whatever does not carry this mark.
        select._indexcache = True  # type: ignore[attr-defined]
        return select

    def _copy(self, chunks: list[Any], buffer: Any) -> None:
        """Copy the rows of one request, which vLLM scores in pieces."""
        lengths = {chunk.total_seq_lens for chunk in chunks}
        if len(lengths) != 1 or any(chunk.num_reqs != 1 for chunk in chunks):
            raise ValueError(f"Recorded ids are for one request at a time, got {len(chunks)}.")
        first, last = chunks[0].token_start, chunks[-1].token_end
        (end,) = lengths
        rows = self.table[end - (last - first) : end]
        buffer[first:last, : rows.shape[1]].copy_(rows)
        self.rows += last - first


def install(recorded: Recorded, who: str) -> None:
    """Put the recorded ids behind the indexer of `who`, before vLLM is started."""
    from indexcache.engines.vllm import plugin, selecting

    module: Any = importlib.import_module(selecting.USER)
    indexer = module.sparse_attn_indexer
    if who == OURS:
        plugin.register()  # vLLM does that itself where the package is installed.
        indexer = selecting.selecting(indexer)
    module.sparse_attn_indexer = recorded.behind(indexer)


def recorded_table(length: int, device: str = "cuda") -> Any:
    """Return the recorded ids stretched over `length` positions, int32 [length, k]."""
    from indexcache.bench.recorded import read_selections, stretch

    (ids,) = read_selections(f"{FILE}:{RECORDED_LAYER}")
    return stretch(ids.to(device), SHAPE["index_topk"], length)


def engine(who: str, heads: int, out: Path, seconds: float) -> None:
    """Measure one vLLM, and append JSON lines; after `seconds` what is missing is left out."""
    began = time.monotonic()
    recorded = Recorded()
    install(recorded, who)
    import torch
    import vllm

    options = {"attention_config": {"backend": "CUSTOM"}} if who == OURS else {}
    llm, model = start(FREQ, heads, **options)
    recorded.table = recorded_table(CONTEXTS[-1] + NEW_TOKENS)
    layers = model.model.layers
    indexers = indexers_of(model)
    prompt = random_tokens(CONTEXTS[-1] + 2000)

    def emit(kind: str, **row: Any) -> None:
        line = json.dumps({"kind": kind, "who": who, "heads": heads} | row)
        print(f"{time.monotonic() - began:.0f} s {line}", flush=True)
        with open(out, "a") as file:
            file.write(line + "\n")

    emit(
        "engine",
        implementation=type(layers[0].self_attn.impl).__name__,
        pattern="".join("S" if layer.self_attn.indexer is None else "F" for layer in layers),
        device=torch.cuda.get_device_name(),
        vllm=vllm.__version__,
        torch=torch.__version__,
    )

    def check(selections: str) -> None:
        recorded.on, recorded.rows = selections == RECORDED, 0
        request(llm, prompt[:CHECKED], 1)
        row = model.model.topk_indices_buffer[CHECKED % CHUNK - 1].cpu()
        ids = row[row >= 0]
        emit(
            "check",
            selections=selections,
            unique=len(ids.unique()),
            max=int(ids.max()),
            copied=recorded.rows / indexers,
            same=bool((row == recorded.table[CHECKED - 1].cpu()).all()),
        )

    def times(selections: str, repetition: int) -> None:
        recorded.on = selections == RECORDED
        for context in CONTEXTS:
            if time.monotonic() - began > seconds:
                return
            first = 100 * repetition
            measured = speeds(*request(llm, prompt[first : first + context], NEW_TOKENS))
            emit("time", selections=selections, context=context, **measured)

    def losses(selections: str) -> None:
        recorded.on = selections == RECORDED
        for _ in range(LOSSES[who][selections]):
            if time.monotonic() - began > seconds:
                return
            emit("loss", selections=selections, loss=loss(llm))

    for selections in (RECORDED, INDEXER):
        recorded.on = selections == RECORDED
        for length in WARM:
            request(llm, prompt[:length], 8)
    for selections in (RECORDED, INDEXER):
        check(selections)
        times(selections, 0)
        losses(selections)
        times(selections, 1)
    emit("done", seconds=round(time.monotonic() - began))


def loss(llm: Any) -> float:
    """Return the mean loss of the tokens of random texts, in nats, one text at a time."""
    from vllm import SamplingParams

    from indexcache.engines.vllm.scores import read_scores

    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1, "detokenize": False}
    params = SamplingParams(prompt_logprobs=0, flat_logprobs=True, **settings)
    total = 0.0
    for seed in range(TEXTS):
        text = random_tokens(TEXT_LENGTH, seed)
        (output,) = llm.generate([{"prompt_token_ids": text}], params, use_tqdm=False)
        total -= float(read_scores(output, text).own.sum())
    return total / (TEXTS * (TEXT_LENGTH - 1))


def checked(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the line of one engine's start, after the checks that need no other engine.

    Raises:
        ValueError: a check failed.
    """
    (begun,) = [line for line in lines if line["kind"] == "engine"]
    who, heads = begun["who"], begun["heads"]
    if begun["implementation"] != IMPLEMENTATIONS[who]:
        raise ValueError(f"{who} ran {begun['implementation']} at {heads} heads.")
    seen = set()
    for line in lines:
        if line["kind"] == "check":
            own = line["selections"] == INDEXER
            whole = line["unique"] == SHAPE["index_topk"] and line["max"] < CHECKED
            copied = line["copied"] == (0 if own else CHECKED) and line["same"] != own
            if not (whole and copied):
                raise ValueError(f"The selection of {who} failed its check: {line}")
            seen.add(line["selections"])
        if line["kind"] == "time" and line["different_tokens"] < 10:
            raise ValueError(f"The engine repeats itself: {line}")
    if missing := {line["selections"] for line in lines if line["kind"] == "time"} - seen:
        raise ValueError(f"{who}, {heads} heads: no check of the selections {missing}.")
    return begun


def compared_losses(lines: Iterable[dict[str, Any]], heads: int) -> list[dict[str, Any]]:
    """Compare the losses at a number of heads, and return a row for each kind of selections.

    Raises:
        ValueError: ours lie further from vLLM's than vLLM's noise, or some are missing.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        if line["kind"] == "loss":
            found.setdefault((line["selections"], line["who"]), []).append(line["loss"])
    if len(found) < 4 or len(found[INDEXER, VLLM]) < 2:
        raise ValueError(f"{heads} heads: there are losses of {sorted(found)} only.")
    noise = max(found[INDEXER, VLLM]) - min(found[INDEXER, VLLM])
    rows = []
    for selections in (RECORDED, INDEXER):
        theirs, ours = found[selections, VLLM], found[selections, OURS]
        apart = max(min(theirs) - min(ours), max(ours) - max(theirs), 0.0)
        row = {"heads": heads, "selections": selections, VLLM: theirs, OURS: ours}
        rows.append(row | {"apart": apart, "noise": noise})
        if apart > noise:
            raise ValueError(f"{heads} heads: losses differ by more than vLLM's noise: {rows[-1]}")
    return rows


def joined(lines: list[dict[str, Any]], before: dict[str, Any]) -> dict[str, Any]:
    """Return the content of vllm_serving.json with the rows and losses of these lines in it.

    Raises:
        ValueError: a check failed, or the file is of another card or another vLLM.
    """
    all_heads = sorted({line["heads"] for line in lines}, reverse=True)
    rows, losses, cards = [], [], set()
    for heads in all_heads:
        own = [line for line in lines if line["heads"] == heads]
        for who in (VLLM, OURS):
            of_one = [line for line in own if line["who"] == who]
            begun = checked(of_one)
            cards.add((begun["device"], begun["vllm"]))
            for selections in (RECORDED, INDEXER):
                for context in CONTEXTS:
                    found = [
                        line
                        for line in of_one
                        if line["kind"] == "time"
                        and (line["selections"], line["context"]) == (selections, context)
                    ]
                    if found:
                        rows.append(row_of(found, begun, selections, context))
        losses += compared_losses(own, heads)
    if cards != {(before["device"], before["vllm"])}:
        raise ValueError(f"The rows are of {cards}, the file is of {before['device']}.")
    new = {(row["heads"], row["who"], row["selections"]) for row in rows}
    kept = [r for r in before["rows"] if (r["heads"], r["who"], r["selections"]) not in new]
    kept_losses = [x for x in before.get("losses", []) if x["heads"] not in all_heads]
    note = (
        "Rows of vllm+indexcache, and of vllm with selections recorded or indexer, are of "
        "benchmarks/vllm_backend.py: index_topk_freq 4, the better of the runs; losses are of two "
        "texts of 32,768 random tokens."
    )
    added = {"rows": kept + rows, "losses": kept_losses + losses, "backend_note": note}
    return before | added


def row_of(
    found: list[dict[str, Any]], begun: dict[str, Any], selections: str, context: int
) -> dict[str, Any]:
    """Make a row of the better of several runs."""
    return {
        "context": context,
        "heads": begun["heads"],
        "full": begun["pattern"].count("F"),
        "pattern": begun["pattern"],
        "selections": selections,
        "who": begun["who"],
        "ttft_s": min(line["ttft_s"] for line in found),
        "decode_tok_s": max(line["decode_tok_s"] for line in found),
        "ttft_runs_s": [line["ttft_s"] for line in found],
        "decode_runs_tok_s": [line["decode_tok_s"] for line in found],
    }


def shares(rows: list[dict[str, Any]]) -> list[str]:
    """Say what share of vLLM's time to the first token each row of ours takes."""
    key = ("heads", "selections", "context")
    theirs = {tuple(r[k] for k in key): r for r in rows if r["who"] == VLLM}
    said = []
    for row in rows:
        peer = theirs.get(tuple(row[k] for k in key))
        if row["who"] == OURS and peer is not None:
            said.append(
                f"{row['heads']} heads, {row['selections']}, {row['context']}: "
                f"{row['ttft_s']:.3f} of {peer['ttft_s']:.3f} s = "
                f"{row['ttft_s'] / peer['ttft_s']:.3f}; "
                f"{row['decode_tok_s']:.1f} and {peer['decode_tok_s']:.1f} tokens/s"
            )
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    timing = verbs.add_parser("engine", help="time one vLLM; append JSON lines")
    timing.add_argument("--who", choices=(VLLM, OURS), required=True)
    timing.add_argument("--heads", type=int, required=True)
    timing.add_argument("--out", type=Path, required=True)
    timing.add_argument("--seconds", type=float, default=3600, help="leave out what comes later")
    joining = verbs.add_parser("join", help="check the lines, and write them to the results")
    joining.add_argument("rows", type=Path, nargs="+")
    joining.add_argument("--results", type=Path, default=RESULTS / "vllm_serving.json")
    arguments = parser.parse_args()
    if arguments.verb == "engine":
        engine(arguments.who, arguments.heads, arguments.out, arguments.seconds)
        return
    lines = [json.loads(line) for file in arguments.rows for line in file.read_text().splitlines()]
    try:
        result = joined(lines, json.loads(arguments.results.read_text()))
    except ValueError as error:
        sys.exit(str(error))
    arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(shares(result["rows"])))


if __name__ == "__main__":
    main()
