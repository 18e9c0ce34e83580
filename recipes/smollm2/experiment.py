"""The paper's comparison on SmolLM2-DSA: kept 1/2, 1/4, 1/8 of the indexers by five ways, several seeds, held-out text.

    python recipes/smollm2/experiment.py CHECKPOINT --data work/smollm2/data --out work/smollm2/experiment [--stage train search ..]

    train      a seed: all indexers in the warm-up, each on its own layer ("start"); from there, with as many further steps on the
               text packed anew, all of them as before ("full") and the kept ones of the uniform patterns on all layers they serve
               ("multi")
    search     a seed: greedy search over the layers with full's indexers, on training text
    vary       (only if asked for) a seed: multi at 1/4 with 16 times the steps ("longest"), a third and three times the learning rate
               ("slow", "fast"), four times the steps at three times the rate ("longfast"), as many steps on the selection alone
               after it ("sparse"), layers that count as much as sharing them alone cost in the search ("weighted"); and at every
               fraction, full too, with four times the steps ("long")
    evaluate   held-out loss of every document, and the long-range tasks: the dense model; layers that share what an
               oracle selects for them, without indexers ("oracle"); start; full; start's indexers under the
               uniform pattern (untouched), full's (own: in a warm-up each indexer learns apart from the others, so full holds what
               the kept ones learn alone), multi's; full's under the searched pattern, and with R in its other layers, pool 4 k and
               8 k; where they were trained, long's too; seed 0's full in 8 and 4 bits and its multi at 1/4 in 4, as apply_delta.py packs
               them (to compare with seed 0 in of_seeds); the share of attention that selections keep and what layers select in common,
               of the first seed
    table      differences to full in loss, paired by document, with intervals over the documents, seeds averaged first; one row a
               way, fraction and domain, and of some ways to each other ("pairs"). Untouched has `more` steps fewer than the others
               and than full: start against full is what those steps give

Every finished piece is kept in --out; the same command goes on, with more seeds too. Other settings need another --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from apply_delta import PACKED, pack_matrix, unpack_matrix
from check import dense
from tasks import logits_of, score

from indexcache.analysis.overlap import measure_overlap
from indexcache.cli import guarded
from indexcache.data import Batch, Document, load_documents, make_batches
from indexcache.distill import DistillSettings, apply_delta, distill_pattern, measure_kept, oracle_states, pack_rows
from indexcache.distill.rows import Row
from indexcache.evals.statistics import bootstrap_interval
from indexcache.models.family import indexers
from indexcache.models.fast import accelerate
from indexcache.models.lm import hidden_states, token_losses
from indexcache.models.loading import Loaded, fingerprint, load_model
from indexcache.models.seam import use_pattern
from indexcache.pattern import Pattern, full_count
from indexcache.records import Run, open_run
from indexcache.report.heatmap import draw_overlap
from indexcache.search.costs import sharing_costs, weights_of_costs
from indexcache.search.run import SearchSettings, search_pattern
from indexcache.search.select import choose

STAGES = ("train", "search", "vary", "evaluate", "table")
KEPT = (2, 4, 8)
POOLS = (4, 8)
LATER = 1000  # added to the seed of the rows after the start, twice that for those of the sparse stage
SPARSE_LR = 5e-4
VARIED: dict[str, dict[str, Any]] = {  # what the stage vary changes, of multi at 1/4 or at the fractions "kept"
    "long": {"steps": 4, "kept": (4, 8, 1, 2)}, "longest": {"steps": 16}, "slow": {"lr": 1 / 3}, "fast": {"lr": 3.0},
    "longfast": {"steps": 4, "lr": 3.0}, "sparse": {"stage": "sparse"}, "weighted": {"weights": True},
}  # fmt: skip
SAVE = 50  # steps between states
PAIRS = (  # what is compared with what, at each fraction that has both
    ("own", "untouched"), ("multi", "own"), ("searched", "multi"), ("searched+R4", "searched"), ("searched+R8", "searched+R4"),
    ("multi, long", "multi"), ("multi, long", "own, long"), ("searched, long", "multi, long"), ("full, long", "full"),
)  # fmt: skip
BITS = {"full, 8 bits": 8, "full, 4 bits": 4, "multi, 4 bits": 4}


class Experiment:
    def __init__(self, o: argparse.Namespace, tasks: list[dict[str, Any]], run: Run):
        self.o, self.out, self.tasks, self.run = o, o.out, tasks, run
        self.loaded: Loaded = load_model(o.checkpoint, dtype=o.dtype, device=o.device)
        self.model: Any = self.loaded.model
        self.layers = int(self.model.config.num_hidden_layers)
        self.full = Pattern("F" * self.layers)
        self.base = {"base": o.checkpoint.name, "base_digest": fingerprint(o.checkpoint)}
        self.own = [{name: p.detach().clone() for name, p in m.named_parameters()} for m in indexers(self.model)]

    def uniform(self, kept: int) -> Pattern:
        return choose(f"uniform:1/{kept}", self.layers).pattern if kept > 1 else self.full

    def folder(self, seed: int, name: str) -> Path:
        return self.out / f"seed{seed}" / name

    def delta(self, seed: int, name: str) -> Path:
        path = self.folder(seed, name) / "delta.safetensors"
        if not path.is_file():
            raise ValueError(f"{path} is missing: run the stage train first.")
        return path

    def read(self, name: str) -> list[Document]:
        return load_documents(self.o.data / name, self.loaded.encode, int(self.model.config.vocab_size))

    # -- stages

    def train(self) -> None:
        o, documents = self.o, self.read("train")
        for seed in o.seeds:
            first, later = (pack_rows(documents, o.length, n) for n in (seed, seed + LATER))
            self.distill(seed, "start", None, self.full, first, o.steps)
            self.distill(seed, "full", "start", self.full, later, o.more)
            for kept in KEPT:
                self.distill(seed, f"multi-{kept}", "start", self.uniform(kept), later, o.more)

    def vary(self) -> None:
        o, documents = self.o, self.read("train")
        for seed in o.seeds:
            later, last = (pack_rows(documents, o.length, seed + n * LATER) for n in (1, 2))
            for name, v in ((name, VARIED[name]) for name in o.vary):
                start, rows, lr = ("multi-4", last, SPARSE_LR) if "stage" in v else ("start", later, o.lr)
                changes = {"stage": v.get("stage", "warmup"), "lr": lr * v.get("lr", 1)}
                if "weights" in v:
                    changes["layer_weights"] = tuple(weights_of_costs(sharing_costs(self.search_of(seed), self.layers)))
                for kept in v.get("kept", (4,)):
                    self.distill(seed, varied(kept, name), start, self.uniform(kept), rows, o.more * v.get("steps", 1), **changes)

    def distill(self, seed: int, name: str, start: str | None, pattern: Pattern, rows: list[Row], steps: int, **changes: Any) -> None:
        folder = self.folder(seed, name)
        if (folder / "result.json").is_file():
            return
        self.take(seed, start)
        settings = DistillSettings(**{"stage": "warmup", "freeze_backbone": True, "keep_zeros": True, "steps": steps, "rows": self.o.rows,
                                      "lr": self.o.lr, "eval_every": 0, "save_every": SAVE, "seed": seed} | changes)  # fmt: skip
        result = distill_pattern(self.model, pattern, rows, folder, settings, base=self.base)
        print(json.dumps({"seed": seed, "name": name, "kl": round(sum(result["kl"].values()) / len(result["kl"]), 4)}), flush=True)

    @torch.no_grad()
    def take(self, seed: int, name: str | None, bits: int = 16) -> None:
        """The checkpoint's own indexers, then those of a delta, through its packed form where that has fewer bits."""
        for indexer, own in zip(indexers(self.model), self.own, strict=True):
            for key, p in indexer.named_parameters():
                p.copy_(own[key])
        if name is not None:
            apply_delta(self.model, self.delta(seed, name))
        for indexer in indexers(self.model) if bits < 16 else ():
            for key, p in indexer.named_parameters():
                if key in PACKED:
                    p.copy_(unpack_matrix(pack_matrix(p.cpu(), bits), len(p)))

    def search(self) -> None:
        # one domain: a few sequences need not cover all sources
        documents = [dataclasses.replace(d, domain="text") for d in self.read("train")]
        for seed in self.o.seeds:
            if (self.folder(seed, "search") / "result.json").is_file():
                continue
            batches = make_batches(documents, length=self.o.length, sequences=self.o.calibration, seed=seed)
            self.take(seed, "full")
            with accelerate(self.model):
                settings = SearchSettings(keep=1 / KEPT[-1], uniform=False)
                search_pattern(self.model, batches, self.folder(seed, "search"), settings, identity=self.base | {"seed": seed})

    def searched(self, seed: int, kept: int) -> Pattern:
        path, wanted = self.search_of(seed) / "result.json", full_count(self.layers, 1 / kept)
        return next(Pattern(r["pattern"]) for r in json.loads(path.read_text())["frontier"] if r["full"] == wanted)

    def search_of(self, seed: int) -> Path:
        folder = self.folder(seed, "search")
        if not (folder / "result.json").is_file():
            raise ValueError(f"{folder} has no result: run the stage search first.")
        return folder

    def ways(self, seed: int) -> Iterator[tuple[str, int, str, Pattern]]:
        """(method, kept, delta, pattern)"""
        yield "full", 1, "full", self.full
        yield "start", 1, "start", self.full
        if seed == 0:
            yield "full, 8 bits", 1, "full", self.full
            yield "full, 4 bits", 1, "full", self.full
            yield "multi, 4 bits", 4, "multi-4", self.uniform(4)
        for kept, name in ((kept, name) for kept in (1, *KEPT) for name in VARIED):
            if (self.folder(seed, varied(kept, name)) / "result.json").is_file():
                yield f"{'full' if kept == 1 else 'multi'}, {name}", kept, varied(kept, name), self.uniform(kept)
        for kept in KEPT if (self.folder(seed, "full-long") / "result.json").is_file() else ():
            yield "own, long", kept, "full-long", self.uniform(kept)
            yield "searched, long", kept, "full-long", self.searched(seed, kept)
        for kept in KEPT:
            yield "untouched", kept, "start", self.uniform(kept)
            yield "own", kept, "full", self.uniform(kept)
            yield "multi", kept, f"multi-{kept}", self.uniform(kept)
            found = self.searched(seed, kept)
            yield "searched", kept, "full", found
            for pool in POOLS:
                yield f"searched+R{pool}", kept, "full", Pattern(str(found).replace("S", "R") + f"@{pool}")

    def evaluate(self) -> None:
        o = self.o
        held_out = make_batches(self.read("heldout.jsonl"), length=o.length, sequences=o.documents * 5, seed=0)
        done = {(r["seed"], r["method"], r["kept"]) for r in self.run.journal}
        for method, kept in (("dense", 1), *(("oracle", kept) for kept in (1, *KEPT))):
            if (None, method, kept) not in done:
                self.note(None, method, kept, self.uniform(kept), self.measure(held_out, self.tasks, self.uniform(kept), method))
        for seed in o.seeds:
            for method, kept, delta, pattern in self.ways(seed):
                if (seed, method, kept) not in done:
                    first = next((r["seed"] for r in self.run.journal if r["seed"] is not None), seed)
                    self.take(seed, delta, bits=BITS.get(method, 16))
                    facts = self.measure(held_out, self.tasks, pattern, method)
                    if method in ("full", "own", "multi", "multi, long") and seed == first:
                        rows = [Row.whole(b.ids[0].numpy()) for b in held_out[:: max(len(held_out) // 5, 1)]]
                        facts["mass_kept"] = [round(x, 5) for x in measure_kept(self.model, pattern, rows)]
                    if method == "full" and seed == first:
                        with accelerate(self.model):
                            facts["overlap"] = measure_overlap(self.model, held_out[:: max(len(held_out) // 3, 1)])
                    self.note(seed, method, kept, pattern, facts)

    @torch.no_grad()
    def measure(self, batches: list[Batch], tasks: list[dict[str, Any]], pattern: Pattern, method: str) -> dict[str, Any]:
        """Loss of each document, a sum over its tokens, and the tasks' scores."""
        sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])

        def oracle(ids: torch.Tensor) -> torch.Tensor:
            return torch.cat([oracle_states(self.model, pattern, Row.whole(row.numpy())) for row in ids])

        states = oracle if method == "oracle" else partial(hidden_states, self.model)
        with self.under(pattern, method):
            for b in batches:
                losses = token_losses(self.model, states(b.ids), b.ids).double()
                for name, each in zip(b.units, losses, strict=True):
                    sums[b.domain, name][0] += float(each.sum())
                    sums[b.domain, name][1] += each.numel()
            return {"documents": [[*key, *s] for key, s in sums.items()], "tasks": score(tasks, logits_of(self.model, states))}

    @contextmanager
    def under(self, pattern: Pattern, method: str) -> Iterator[None]:
        if method == "oracle":
            yield
        elif method == "dense":
            with dense(self.model):
                yield
        else:
            with accelerate(self.model), use_pattern(self.model, pattern):
                yield

    def note(self, seed: int | None, method: str, kept: int, pattern: Pattern, facts: dict[str, Any]) -> None:
        self.run.append({"seed": seed, "method": method, "kept": kept, "pattern": str(pattern)} | facts)
        mean = sum(d[2] for d in facts["documents"]) / sum(d[3] for d in facts["documents"])
        print(f"seed {seed} {method} 1/{kept}: loss {mean:.4f}, tasks {accuracy([facts]):.3f}", flush=True)

    def table(self) -> None:
        o, lines = self.o, self.run.journal
        first, overlap = next((r["seed"], r["overlap"]) for r in lines if r["method"] == "full" and "overlap" in r)
        mass = {f"{r['method']} 1/{r['kept']}": r["mass_kept"] for r in lines if r["seed"] == first and "mass_kept" in r}
        result = {
            "device": torch.cuda.get_device_name() if o.device.startswith("cuda") else o.device,
            "date": datetime.date.today().isoformat(), "settings": settings_of(o), "rows": rows_of(lines), "pairs": pairs_of(lines),
            "mass_kept": {"seed": first, "of": mass}, "tasks": tasks_of(lines), "overlap": overlap,
        }  # fmt: skip
        self.run.save("result.json", result)
        try:
            draw_overlap(overlap, self.out / "overlap.png", title=f"SmolLM2-DSA, k = {overlap['topk']}: shared part of the selections")
        except ValueError as error:
            print(error, file=sys.stderr)
        for r in result["rows"]:  # type: ignore[union-attr]
            if r["domain"] == "all":
                interval = f"[{r['ci_low']:+.4f}, {r['ci_high']:+.4f}]"
                tasks = f"tasks {r['retrieval']:.3f}, their answers' loss {r['retrieval_loss']:.3f}"
                print(f"{r['method']:13s} 1/{r['kept']}: {r['delta_loss']:+.4f} {interval}, {tasks}")


def varied(kept: int, name: str) -> str:
    """Folder of what the stage vary trains."""
    return f"full-{name}" if kept == 1 else f"multi-{kept}-{name}"


def tasks_for(o: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the long-range tasks that are asked for. Raises ValueError where there is too little to evaluate on."""
    with open(o.data / "tasks.jsonl", encoding="utf-8") as f:
        tasks = [r for r in map(json.loads, f) if r["seed"] < o.tasks and r["length"] <= o.length]
    if not tasks or o.documents < 2:
        raise ValueError(f"An evaluation needs at least two documents of a domain and one task: --documents is {o.documents}, and "
                         f"{o.data / 'tasks.jsonl'} has {len(tasks)} tasks of at most {o.length} tokens.")  # fmt: skip
    return tasks


def settings_of(o: argparse.Namespace) -> dict[str, Any]:
    """What all pieces of an --out share."""
    names = ("length", "steps", "more", "rows", "lr", "calibration", "documents", "tasks", "dtype")
    return {name: getattr(o, name) for name in names} | {"base": fingerprint(o.checkpoint)}


def accuracy(lines: list[dict[str, Any]], what: str = "accuracy") -> float:
    """Mean over tasks and lengths; "loss": of the answers, nats a token."""
    return float(np.mean([t[what] for r in lines for t in r["tasks"]]))


def tasks_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every way, task and length, the seeds averaged; all have the same rows."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for r in lines:
        for t in r["tasks"]:
            found[r["method"], r["kept"], t["task"], t["length"]].append(t)
    names = ("method", "kept", "task", "length")
    return [
        dict(zip(names, key, strict=True))
        | {what: float(np.mean([t[what] for t in each])) for what in ("accuracy", "loss")}
        | {"answers": each[0]["answers"], "seeds": len(each)}
        for key, each in found.items()
    ]


def rows_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each way against full of the same seed, document by document; the seeds are averaged before documents are resampled. The dense
    model, which has no seed, is compared with the mean of all."""
    losses: dict[Any, dict[str, float]] = {r["seed"]: {d[1]: d[2] for d in r["documents"]} for r in lines if r["method"] == "full"}
    losses[None] = {name: float(np.mean([full[name] for full in losses.values()])) for name in next(iter(losses.values()))}
    ways: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for r in lines:
        ways[r["method"], r["kept"]].append(r)
    rows = []
    for (method, kept), found in ways.items():
        found.sort(key=lambda r: -1 if r["seed"] is None else r["seed"])
        documents = {d[1]: d for d in found[0]["documents"]}
        for domain in ["all", *sorted({d[0] for d in documents.values()})]:
            names = [n for n, d in documents.items() if domain in ("all", d[0])]
            tokens = [documents[n][3] for n in names]
            per_seed = [{d[1]: d[2] - losses[r["seed"]][d[1]] for d in r["documents"]} for r in found]
            loss = float(np.mean([sum(d[2] for d in r["documents"] if d[1] in set(names)) for r in found])) / sum(tokens)
            of_seeds = {str(r["seed"]): round(sum(s[n] for n in names) / sum(tokens), 6) for r, s in zip(found, per_seed, strict=True)}
            rows.append({
                "kept": kept, "method": method, "domain": domain, **paired(per_seed, names, tokens),
                "loss": loss, "retrieval": accuracy(found), "retrieval_loss": accuracy(found, "loss"), "of_seeds": of_seeds,
            })  # fmt: skip
    return rows


def paired(per_seed: list[dict[str, float]], names: list[str], tokens: list[int]) -> dict[str, Any]:
    """Of differences by document (sums over its tokens), one dict a seed: their mean in nats a token, and its interval."""
    sums = [float(np.mean([s[n] for s in per_seed])) for n in names]
    low, high = bootstrap_interval(sums, tokens)
    return {"delta_loss": sum(sums) / sum(tokens), "ci_low": low, "ci_high": high, "seeds": len(per_seed)}


def pairs_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`PAIRS`, each way less the other over the seeds that have both, all domains together."""
    losses = {(r["method"], r["kept"], r["seed"]): {d[1]: d for d in r["documents"]} for r in lines}
    found = []
    for (method, other), kept in ((pair, kept) for pair in PAIRS for kept in (1, *KEPT)):
        both = [(losses[m, k, s], losses[other, k, s]) for m, k, s in losses if (m, k) == (method, kept) and (other, k, s) in losses]
        if both:
            names = list(both[0][0])
            per_seed = [{n: a[n][2] - b[n][2] for n in names} for a, b in both]
            row = paired(per_seed, names, [both[0][0][n][3] for n in names])
            found.append({"kept": kept, "method": method, "against": other, **row})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="what rewrite.py wrote")
    parser.add_argument("--data", type=Path, required=True, help="what data.py wrote, unpacked")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", nargs="*", choices=STAGES, default=[s for s in STAGES if s != "vary"])
    parser.add_argument("--vary", nargs="*", choices=VARIED, default=list(VARIED), help="what the stage vary trains")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=200, help="of the warm-up of all indexers")
    parser.add_argument("--more", type=int, default=100, help="steps after it")
    parser.add_argument("--rows", type=int, default=2, help="rows of a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--calibration", type=int, default=2, help="sequences of the search")
    parser.add_argument("--documents", type=int, default=8, help="held-out documents of a domain, at least 2")
    parser.add_argument("--tasks", type=int, default=10, help="rows of each task and length")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    o = parser.parse_args()
    tasks = tasks_for(o)
    with open_run(o.out, settings_of(o)) as run:
        experiment = Experiment(o, tasks, run)
        for stage in STAGES:
            if stage in o.stage:
                print(f"-- {stage}", file=sys.stderr, flush=True)
                getattr(experiment, stage)()


if __name__ == "__main__":
    sys.exit(guarded(main))
