"""The paper's comparison on SmolLM2-DSA: kept 1/2, 1/4, 1/8 of the indexers by six ways, several seeds, held-out text.

    python recipes/smollm2/experiment.py CHECKPOINT --data work/smollm2/data --out work/smollm2/experiment [--stage train search ..]

    train      a seed: all indexers in the warm-up, each on its own layer ("start"); from there, with as many further steps on the
               text packed anew, all of them as before ("full") and the kept ones of the uniform patterns on all layers they serve
               ("multi")
    search     a seed: greedy search over the layers with full's indexers, on training text
    vary       (only if asked for) a seed: multi at 1/4 with a fifth of the steps ("short", full too) and four times as many ("long", full
               too), a third and three times the learning rate ("slow", "fast"), as many steps on the selection alone after it
               ("sparse"), layers that count as much as sharing them alone cost in the search ("weighted"); with layer 1 full as
               well, as the engines' own rule has it ("offset2"); under the pattern that the search found ("found")
    reference  the dense model; layers that share what an oracle selects for them, without indexers ("oracle")
    evaluate   a seed: held-out loss of every document, and the long-range tasks: start; full; start's indexers under the
               uniform pattern (untouched), full's (own: in a warm-up each indexer learns apart from the others, so full holds what
               the kept ones learn alone), multi's; full's under the searched pattern, and with R in its other layers, pool 4 k and
               8 k; what vary has trained so far; seed 0's full in 8 and 4 bits and its multi at 1/4 in both, as apply_delta.py packs
               them (to compare with seed 0 in of_seeds); the share of attention that selections keep and what layers select in common
    groups     (only if asked for) a seed: held-out loss where one group of uniform 1/4 alone shares a selection, the others being
               full: own and multi, document by document
    table      differences to full in loss, paired by document, with intervals over the documents, seeds averaged first; one row a
               way, fraction and domain, and of some ways to each other ("pairs"); see compare.py. Untouched has `more` steps fewer
               than the others and than full: start against full is what those steps give

Every finished piece is kept in --out; the same command goes on, with more seeds too. Other settings need another --out. Several processes
may work in one --out, each on its GPU (--device cuda:1): a training, a search, the evaluations of a seed are each one process's, and
another that comes to the same piece meanwhile is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from apply_delta import PACKED, pack_matrix, unpack_matrix
from check import dense
from compare import accuracy, closed_of, groups_of, pairs_of, rows_of, tasks_of
from tasks import logits_of, score

from indexcache.cli import guarded
from indexcache.data import Batch, Document, load_documents, make_batches
from indexcache.distilling import (
    DistillSettings,
    apply_delta,
    distill,
    measure_kept,
    oracle_states,
    pack_rows,
)
from indexcache.distilling.forward import served_layers
from indexcache.distilling.layer_weights import sharing_costs, weights_of_costs
from indexcache.distilling.rows import Row
from indexcache.evals.overlap import overlap
from indexcache.models.family import indexers
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.lm import hidden_states, token_losses
from indexcache.models.loading import Model, fingerprint, load
from indexcache.models.seam import use_pattern
from indexcache.pattern import Pattern, full_count
from indexcache.records import Run, claim, open_run, read_journal, write_json
from indexcache.report.plots import draw_overlap
from indexcache.searching.run import SearchSettings, search
from indexcache.spec import parse_pattern

STAGES = ("train", "search", "vary", "reference", "evaluate", "groups", "table")
ASKED = ("vary", "groups")  # done only where they are named
KEPT = (2, 4, 8)
POOLS = (4, 8)
LATER = (
    1000  # added to the seed of the rows after the start, twice that for those of the sparse stage
)
SPARSE_LR = 5e-4
VARIED: dict[
    str, dict[str, Any]
] = {  # what the stage vary changes, of multi at 1/4 or at the fractions "kept"
    "short": {"steps": 0.2, "kept": (4, 1)},
    "offset2": {"pattern": "uniform:1/4:2"},
    "found": {"pattern": "searched"},
    "sparse": {"stage": "sparse"},
    "fast": {"lr": 3.0},
    "weighted": {"weights": True},
    "slow": {"lr": 1 / 3},
    "long": {"steps": 4, "kept": (4, 1)},
}
SAVE = 100  # steps between states
BITS = {f"{way}, {bits} bits": bits for way in ("full", "multi") for bits in (8, 4)}


class Experiment:
    def __init__(self, o: argparse.Namespace, tasks: list[dict[str, Any]]):
        self.o, self.out, self.tasks = o, o.out, tasks
        self.base = {"base": o.checkpoint.name, "base_digest": fingerprint(o.checkpoint)}

    @cached_property
    def loaded(self) -> Model:
        return load(self.o.checkpoint, dtype=self.o.dtype, device=self.o.device)

    @property
    def model(self) -> Any:
        return self.loaded.module

    @cached_property
    def own(self) -> list[dict[str, torch.Tensor]]:
        """The checkpoint's own indexers."""
        return [
            {name: p.detach().clone() for name, p in m.named_parameters()}
            for m in indexers(self.model)
        ]

    @cached_property
    def layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def full(self) -> Pattern:
        return Pattern.full(self.layers)

    def uniform(self, kept: int) -> Pattern:
        return parse_pattern(f"uniform:1/{kept}", self.layers).pattern if kept > 1 else self.full

    def folder(self, seed: int, name: str) -> Path:
        return self.out / f"seed{seed}" / name

    def delta(self, seed: int, name: str) -> Path:
        path = self.folder(seed, name) / "delta.safetensors"
        if not path.is_file():
            raise ValueError(f"{path} is missing: run the stage train first.")
        return path

    def read(self, name: str) -> list[Document]:
        return load_documents(
            self.o.data / name, self.loaded.encode, int(self.model.config.vocab_size)
        )

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
                start, rows, lr = (
                    ("multi-4", last, SPARSE_LR) if "stage" in v else ("start", later, o.lr)
                )
                changes = {"stage": v.get("stage", "warmup"), "lr": lr * v.get("lr", 1)}
                if "weights" in v:
                    changes["layer_weights"] = tuple(
                        weights_of_costs(self.costs(seed, self.layers))
                    )
                for kept in v.get("kept", (4,)):
                    steps = max(round(o.more * v.get("steps", 1)), 1)
                    self.distill(
                        seed,
                        varied(kept, name),
                        start,
                        self.varied_pattern(seed, kept, name),
                        rows,
                        steps,
                        **changes,
                    )

    def varied_pattern(self, seed: int, kept: int, name: str) -> Pattern:
        spec = VARIED[name].get("pattern")
        if spec is None:
            return self.uniform(kept)
        return (
            self.searched(seed, kept)
            if spec == "searched"
            else parse_pattern(spec, self.layers).pattern
        )

    def distill(
        self,
        seed: int,
        name: str,
        start: str | None,
        pattern: Pattern,
        rows: list[Row],
        steps: int,
        **changes: Any,
    ) -> None:
        folder = self.folder(seed, name)
        if (folder / "result.json").is_file():
            return
        self.take(seed, start)
        settings = DistillSettings(
            **{
                "stage": "warmup",
                "freeze_backbone": True,
                "keep_zeros": True,
                "steps": steps,
                "rows": self.o.rows,
                "lr": self.o.lr,
                "eval_every": 0,
                "save_every": SAVE,
                "seed": seed,
            }
            | changes
        )
        result = distill(self.model, pattern, rows, folder, settings, base=self.base)
        kl = list(result.kl.values())
        said(f"seed {seed} {name}: KL {sum(kl) / len(kl):.4f}")

    @torch.no_grad()
    def take_one(self, seed: int, layer: int, name: str) -> None:
        """Full's indexers, but that of one layer, which is another delta's."""
        self.take(seed, name)
        other = {key: p.clone() for key, p in indexers(self.model)[layer].named_parameters()}
        self.take(seed, "full")
        for key, p in indexers(self.model)[layer].named_parameters():
            p.copy_(other[key])

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
            batches = make_batches(
                documents, length=self.o.length, sequences=self.o.calibration, seed=seed
            )
            self.take(seed, "full")
            with accelerate(self.model):
                settings = SearchSettings(keep=1 / KEPT[-1], uniform=False)
                search(
                    self.model,
                    batches,
                    self.folder(seed, "search"),
                    settings,
                    identity=self.base | {"seed": seed},
                )

    def searched(self, seed: int, kept: int) -> Pattern:
        path, wanted = self.search_of(seed) / "result.json", full_count(self.layers, 1 / kept)
        return next(
            Pattern(r["pattern"])
            for r in json.loads(path.read_text())["frontier"]
            if r["full"] == wanted
        )

    def costs(self, seed: int, layers: int) -> list[float | None]:
        return sharing_costs(self.search_of(seed), layers)

    def search_of(self, seed: int) -> Path:
        folder = self.folder(seed, "search")
        if not (folder / "result.json").is_file():
            raise ValueError(f"{folder} has no result: run the stage search first.")
        return folder

    def ways(self, seed: int) -> Iterator[tuple[str, int, str, Pattern]]:
        """(method, kept, delta, pattern)"""
        yield "full", 1, "full", self.full
        yield "start", 1, "start", self.full
        for kept in KEPT:
            yield "untouched", kept, "start", self.uniform(kept)
            yield "own", kept, "full", self.uniform(kept)
            yield "multi", kept, f"multi-{kept}", self.uniform(kept)
            found = self.searched(seed, kept)
            yield "searched", kept, "full", found
            for pool in POOLS:
                yield (
                    f"searched+R{pool}",
                    kept,
                    "full",
                    Pattern(str(found).replace("S", "R") + f"@{pool}"),
                )
        for method in BITS if seed == 0 else ():
            yield (
                method,
                *(
                    (1, "full", self.full)
                    if method.startswith("full")
                    else (4, "multi-4", self.uniform(4))
                ),
            )
        for kept, name in ((kept, name) for name in VARIED for kept in (4, 1)):
            if (self.folder(seed, varied(kept, name)) / "result.json").is_file():
                pattern = self.varied_pattern(seed, kept, name)
                yield (
                    f"{'full' if kept == 1 else 'multi'}, {name}",
                    kept,
                    varied(kept, name),
                    pattern,
                )
                if name == "offset2":
                    yield f"untouched, {name}", kept, "start", pattern
                    yield f"own, {name}", kept, "full", pattern

    def held_out(self) -> list[Batch]:
        return make_batches(
            self.read("heldout.jsonl"), length=self.o.length, sequences=self.o.documents * 5, seed=0
        )

    def reference(self) -> None:
        held_out = self.held_out()
        with open_run(self.out / "reference", settings_of(self.o)) as run:
            for method, kept in (("dense", 1), *(("oracle", kept) for kept in (1, *KEPT))):
                if (method, kept) not in {(r["method"], r["kept"]) for r in run.journal}:
                    self.note(
                        run,
                        None,
                        method,
                        kept,
                        self.uniform(kept),
                        self.measure(held_out, self.tasks, self.uniform(kept), method),
                    )

    def evaluate(self) -> None:
        held_out = self.held_out()
        for seed in self.o.seeds:
            with open_run(self.folder(seed, "evaluated"), settings_of(self.o)) as run:
                done = {(r["method"], r["kept"]) for r in run.journal}
                for method, kept, delta, pattern in self.ways(seed):
                    if (method, kept) in done:
                        continue
                    self.take(seed, delta, bits=BITS.get(method, 16))
                    facts = self.measure(held_out, self.tasks, pattern, method)
                    if method in ("full", "own", "multi"):
                        rows = [
                            Row.one_document(b.ids[0].numpy())
                            for b in held_out[:: max(len(held_out) // 5, 1)]
                        ]
                        facts["mass_kept"] = [
                            round(x, 5) for x in measure_kept(self.model, pattern, rows)
                        ]
                    if method == "full":
                        with accelerate(self.model):
                            facts["overlap"] = overlap(
                                self.model, held_out[:: max(len(held_out) // 3, 1)]
                            ).to_json()
                    self.note(run, seed, method, kept, pattern, facts)

    def groups(self) -> None:
        held_out, groups = self.held_out(), served_layers(self.uniform(4))
        for seed in self.o.seeds:
            with open_run(self.folder(seed, "groups"), settings_of(self.o)) as run:
                done = {(r["method"], *r["layers"]) for r in run.journal}
                for source, group in groups.items():
                    pattern = Pattern(
                        "".join(
                            "S" if i in group and i != source else "F" for i in range(self.layers)
                        )
                    )
                    for method, delta in (("own", "full"), ("multi", "multi-4")):
                        if len(group) > 1 and (method, *group) not in done:
                            self.take_one(seed, source, delta)
                            facts = self.measure(held_out, [], pattern, method)
                            run.append(
                                {
                                    "seed": seed,
                                    "method": method,
                                    "layers": list(group),
                                    "documents": facts["documents"],
                                }
                            )
                            said(f"seed {seed} {method}, layers {group} alone")

    @torch.no_grad()
    def measure(
        self, batches: list[Batch], tasks: list[dict[str, Any]], pattern: Pattern, method: str
    ) -> dict[str, Any]:
        """Loss of each document, a sum over its tokens, and the tasks' scores."""
        documents: list[
            list[Any]
        ] = []  # named by their place among the held-out ones, whose text is part of the settings

        def oracle(ids: torch.Tensor) -> torch.Tensor:
            return torch.cat(
                [oracle_states(self.model, pattern, Row.one_document(row.numpy())) for row in ids]
            )

        states = oracle if method == "oracle" else partial(hidden_states, self.model)
        with self.under(pattern, method):
            for b in batches:
                losses = token_losses(self.model, states(b.ids), b.ids).double()
                documents += [
                    [b.domain, f"{len(documents) + i}", float(each.sum()), each.numel()]
                    for i, each in enumerate(losses)
                ]
            return {"documents": documents, "tasks": score(tasks, logits_of(self.model, states))}

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

    def note(
        self,
        run: Run,
        seed: int | None,
        method: str,
        kept: int,
        pattern: Pattern,
        facts: dict[str, Any],
    ) -> None:
        run.append({"seed": seed, "method": method, "kept": kept, "pattern": str(pattern)} | facts)
        mean = sum(d[2] for d in facts["documents"]) / sum(d[3] for d in facts["documents"])
        said(f"seed {seed} {method} 1/{kept}: loss {mean:.4f}, tasks {accuracy([facts]):.3f}")

    def table(self) -> None:
        lines = self.lines("evaluated")
        fulls = [r for r in lines if r["method"] == "full"]
        references = self.lines("reference", "")
        if not fulls or not {("dense", 1), ("oracle", 1)} <= {
            (r["method"], r["kept"]) for r in references
        }:
            raise ValueError(
                f"{self.out} lacks evaluations of all indexers, the dense model or the oracle: run the stages reference and "
                "evaluate first."
            )
        lines, first = references + lines, fulls[0]["seed"]
        mass = {
            f"{r['method']} 1/{r['kept']}": r["mass_kept"]
            for r in lines
            if r["seed"] == first and "mass_kept" in r
        }
        result = {
            "device": torch.cuda.get_device_name()
            if self.o.device.startswith("cuda")
            else self.o.device,
            "date": datetime.date.today().isoformat(),
            "settings": settings_of(self.o),
            "rows": rows_of(lines),
            "pairs": pairs_of(lines),
            "closed": closed_of(lines),
            "patterns": {
                f"{r['method']} 1/{r['kept']}, seed {r['seed']}": r["pattern"]
                for r in lines
                if r["method"] == "searched"
            },
            "groups": groups_of(self.lines("groups"), lines),
            "mass_kept": {"seed": first, "of": mass},
            "tasks": tasks_of(lines),
            "overlap": fulls[0]["overlap"],
            "sharing_costs": {
                str(r["seed"]): self.costs(r["seed"], len(r["pattern"])) for r in fulls
            },
        }
        write_json(self.out / "result.json", result)
        try:
            title = f"SmolLM2-DSA, k = {fulls[0]['overlap']['topk']}: shared part of the selections"
            draw_overlap(fulls[0]["overlap"], self.out / "overlap.png", title=title)
        except ValueError as error:
            print(error, file=sys.stderr)
        for r in result["rows"]:
            if r["domain"] == "all":
                interval = f"[{r['ci_low']:+.4f}, {r['ci_high']:+.4f}]"
                tasks = f"tasks {r['retrieval']:.3f}, their answers' loss {r['retrieval_loss']:.3f}"
                print(
                    f"{r['method']:17s} 1/{r['kept']}: {r['delta_loss']:+.4f} {interval}, {tasks}"
                )

    def lines(self, name: str, seeds: str = "seed*/") -> list[dict[str, Any]]:
        """What is in the journals of these runs, the seeds in their order."""
        found = [path.parent for path in self.out.glob(f"{seeds}{name}/journal.jsonl")]
        folders = sorted(
            found, key=lambda f: int(f.parent.name.removeprefix("seed")) if seeds else 0
        )
        return [line for folder in folders for line in read_journal(folder)]


def said(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def varied(kept: int, name: str) -> str:
    """Folder of what the stage vary trains."""
    return f"full-{name}" if kept == 1 else f"multi-{kept}-{name}"


def tasks_for(o: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the long-range tasks that are asked for. Raises ValueError where there is too little to evaluate on."""
    with open(o.data / "tasks.jsonl", encoding="utf-8") as f:
        tasks = [r for r in map(json.loads, f) if r["seed"] < o.tasks and r["length"] <= o.length]
    if not tasks or o.documents < 2:
        raise ValueError(
            f"An evaluation needs at least two documents of a domain and one task: --documents is {o.documents}, and "
            f"{o.data / 'tasks.jsonl'} has {len(tasks)} tasks of at most {o.length} tokens."
        )
    return tasks


def settings_of(o: argparse.Namespace) -> dict[str, Any]:
    """What all pieces of an --out share."""
    names = ("length", "steps", "more", "rows", "lr", "calibration", "documents", "tasks", "dtype")
    text = {
        name: hashlib.sha256((o.data / name).read_bytes()).hexdigest()
        for name in ("heldout.jsonl", "tasks.jsonl")
    }
    return {name: getattr(o, name) for name in names} | {"base": fingerprint(o.checkpoint), **text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="what rewrite.py wrote")
    parser.add_argument("--data", type=Path, required=True, help="what data.py wrote, unpacked")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--stage", nargs="*", choices=STAGES, default=[s for s in STAGES if s not in ASKED]
    )
    parser.add_argument(
        "--vary", nargs="*", choices=VARIED, default=list(VARIED), help="what the stage vary trains"
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=200, help="of the warm-up of all indexers")
    parser.add_argument("--more", type=int, default=400, help="steps after it")
    parser.add_argument("--rows", type=int, default=1, help="rows of a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--calibration", type=int, default=2, help="sequences of the search")
    parser.add_argument(
        "--documents", type=int, default=10, help="held-out documents of a domain, at least 2"
    )
    parser.add_argument("--tasks", type=int, default=20, help="rows of each task and length")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    o = parser.parse_args()
    tasks = tasks_for(o)
    claim(o.out, settings_of(o))
    experiment = Experiment(o, tasks)
    for stage in STAGES:
        if stage in o.stage:
            print(f"-- {stage}", file=sys.stderr, flush=True)
            getattr(experiment, stage)()


if __name__ == "__main__":
    sys.exit(guarded(main))
