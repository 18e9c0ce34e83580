"""Compare ways to keep 1/2, 1/4 and 1/8 of SmolLM2's indexers, with several seeds.

    python -m recipes.smollm2.experiment CHECKPOINT --data work/smollm2/data
        --out work/smollm2/experiment [--stage train search ..]

The stages run in this order. `vary` and `groups` run only if --stage names them.

  train      For each seed, trains all indexers in the warm-up, each on its own layer ("start").
             From there the text is packed anew, and `--more` steps train all indexers as before
             ("full"), or the indexers that a uniform pattern keeps, on all layers that they serve
             ("multi").
  search     For each seed, searches greedily over the layers with full's indexers, on training
             text.
  vary       For each seed, trains multi at 1/4 with one change; see VARIED.
  reference  Measures the dense model, and layers that share what an oracle selects for them without
             indexers ("oracle").
  evaluate   For each seed, measures the held-out loss of every document and the long-range tasks of
             start, full and multi; of start's and full's indexers under the uniform pattern
             ("untouched", "own"); of full's indexers under the searched pattern, and with R in its
             other layers and a pool of 4 k and 8 k; and of what `vary` has trained so far. In the
             warm-up each indexer learns apart from the others, so full holds what the kept ones
             would learn alone. For seed 0 it also measures full and multi at 1/4 in 8 and 4 bits,
             as apply_delta.py packs them. It measures how much attention the selections keep and
             what layers select in common.
  groups     For each seed, measures own and multi where one group of uniform 1/4 alone shares a
             selection and all other layers are full, document by document.
  table      Computes the differences to full in loss, paired by document, with intervals over the
             documents; see compare.py. The seeds are averaged first. Untouched indexers have
             `--more` steps fewer than the others and than full; start against full shows what those
             steps give.

Every finished piece is kept in --out, and the same command continues, also with more seeds. Other
settings need another --out. Several processes may work in one --out, each on its own GPU
(--device cuda:1). One process alone does a training, a search or the evaluations of a seed; another
that comes to the same piece meanwhile is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from indexcache.cli import guarded
from indexcache.data import Batch, Document, load_documents, make_batches
from indexcache.distilling import DistillSettings, apply_delta, distill, measure_kept, pack_rows
from indexcache.distilling.forward import served_layers
from indexcache.distilling.layer_weights import sharing_costs, weights_of_costs
from indexcache.distilling.rows import Row
from indexcache.evals.overlap import overlap
from indexcache.models.family import indexers
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.loading import Model, fingerprint, load
from indexcache.pattern import Pattern, full_count
from indexcache.records import Run, claim, open_run
from indexcache.searching.run import SearchSettings, search
from indexcache.spec import parse_pattern
from recipes.smollm2.apply_delta import PACKED, pack_matrix, unpack_matrix
from recipes.smollm2.compare import accuracy
from recipes.smollm2.measure import measure
from recipes.smollm2.result import search_of, summary, write_result

STAGES = ("train", "search", "vary", "reference", "evaluate", "groups", "table")
ON_REQUEST = ("vary", "groups")
KEPT = (2, 4, 8)
POOLS = (4, 8)
# Rows are packed with the seed, after the start with this added, and in the sparse stage with twice
# this added.
LATER = 1000
SPARSE_LR = 5e-4
SAVE_EVERY = 100  # steps
BITS = {f"{method}, {bits} bits": bits for method in ("full", "multi") for bits in (8, 4)}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A change of multi's training at 1/4.

    Attributes:
        steps: factor of the number of steps.
        lr: factor of the learning rate.
        kept: 4, and 1 where full is trained with the same change too.
        pattern: a specification, "searched", or None for the uniform pattern.
        stage: "sparse" trains on the selection alone, from what multi has trained.
        weighted: layers count as much as sharing them alone cost in the search.
    """

    steps: float = 1.0
    lr: float = 1.0
    kept: tuple[int, ...] = (4,)
    pattern: str | None = None
    stage: str = "warmup"
    weighted: bool = False


VARIED = {
    "short": Variant(steps=0.2, kept=(4, 1)),
    "offset2": Variant(pattern="uniform:1/4:2"),  # Layer 1 is full as well, as engines have it.
    "found": Variant(pattern="searched"),
    "sparse": Variant(stage="sparse"),
    "fast": Variant(lr=3.0),
    "weighted": Variant(weighted=True),
    "slow": Variant(lr=1 / 3),
    "long": Variant(steps=4.0, kept=(4, 1)),
}


class Experiment:
    """One --out: a method for each stage, and the checkpoint whose indexers they replace."""

    def __init__(self, o: argparse.Namespace, tasks: list[dict[str, Any]]):
        self.o = o
        self.out: Path = o.out
        self.tasks = tasks
        self.base = {"base": o.checkpoint.name, "base_digest": fingerprint(o.checkpoint)}

    @cached_property
    def handle(self) -> Model:
        return load(self.o.checkpoint, dtype=self.o.dtype, device=self.o.device)

    @property
    def model(self) -> Any:
        return self.handle.module

    @cached_property
    def stored_indexers(self) -> list[dict[str, torch.Tensor]]:
        """The weights of the checkpoint's own indexers, layer by layer."""
        return [
            {name: p.detach().clone() for name, p in indexer.named_parameters()}
            for indexer in indexers(self.model)
        ]

    @cached_property
    def layers(self) -> int:
        return self.handle.layers

    @property
    def full(self) -> Pattern:
        return Pattern.full(self.layers)

    def uniform(self, kept: int) -> Pattern:
        return parse_pattern(f"1/{kept}", self.layers).pattern if kept > 1 else self.full

    def folder(self, seed: int, name: str) -> Path:
        return self.out / f"seed{seed}" / name

    def delta(self, seed: int, name: str) -> Path:
        path = self.folder(seed, name) / "delta.safetensors"
        if not path.is_file():
            raise ValueError(f"{path} is missing: run the stage train first.")
        return path

    def read(self, name: str) -> list[Document]:
        return load_documents(
            self.o.data / name, self.handle.encode, int(self.model.config.vocab_size)
        )

    # -- training

    def train(self) -> None:
        o = self.o
        documents = self.read("train")
        for seed in o.seeds:
            first = pack_rows(documents, o.length, seed)
            later = pack_rows(documents, o.length, seed + LATER)
            self.distill(seed, "start", None, self.full, first, o.steps)
            self.distill(seed, "full", "start", self.full, later, o.more)
            for kept in KEPT:
                self.distill(seed, f"multi-{kept}", "start", self.uniform(kept), later, o.more)

    def vary(self) -> None:
        o = self.o
        documents = self.read("train")
        for seed in o.seeds:
            later = pack_rows(documents, o.length, seed + LATER)
            last = pack_rows(documents, o.length, seed + 2 * LATER)
            for name in o.vary:
                variant = VARIED[name]
                sparse = variant.stage == "sparse"
                changes: dict[str, Any] = {
                    "stage": variant.stage,
                    "lr": (SPARSE_LR if sparse else o.lr) * variant.lr,
                }
                if variant.weighted:
                    costs = sharing_costs(search_of(self.out, seed), self.layers)
                    changes["layer_weights"] = tuple(weights_of_costs(costs))
                for kept in variant.kept:
                    self.distill(
                        seed,
                        varied(kept, name),
                        "multi-4" if sparse else "start",
                        self.varied_pattern(seed, kept, variant),
                        last if sparse else later,
                        max(round(o.more * variant.steps), 1),
                        **changes,
                    )

    def varied_pattern(self, seed: int, kept: int, variant: Variant) -> Pattern:
        if variant.pattern is None:
            return self.uniform(kept)
        if variant.pattern == "searched":
            return self.searched(seed, kept)
        return parse_pattern(variant.pattern, self.layers).pattern

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
        """Train the indexers of a pattern into the folder `name`, unless it has a result.

        Args:
            start: the delta to start from; None starts from the checkpoint's own indexers.
            changes: settings that differ from the warm-up's.
        """
        folder = self.folder(seed, name)
        if (folder / "result.json").is_file():
            return
        self.put_indexers(seed, start)
        settings = DistillSettings(
            **{
                "stage": "warmup",
                "freeze_backbone": True,
                "keep_zeros": True,
                "steps": steps,
                "rows": self.o.rows,
                "lr": self.o.lr,
                "eval_every": 0,
                "save_every": SAVE_EVERY,
                "seed": seed,
            }
            | changes
        )
        result = distill(self.model, pattern, rows, folder, settings, base=self.base)
        kl = list(result.kl.values())
        log(f"seed {seed} {name}: KL {sum(kl) / len(kl):.4f}")

    # -- the model's indexers

    @torch.no_grad()
    def put_indexers(self, seed: int, delta: str | None, bits: int = 16) -> None:
        """Give the model the checkpoint's own indexers, then those of a delta.

        Args:
            delta: the name of the delta; None leaves the checkpoint's own.
            bits: packs the indexers to 8 or 4 bits, and unpacks them.
        """
        for indexer, stored in zip(indexers(self.model), self.stored_indexers, strict=True):
            for key, p in indexer.named_parameters():
                p.copy_(stored[key])
        if delta is not None:
            apply_delta(self.model, self.delta(seed, delta))
        if bits < 16:
            for indexer in indexers(self.model):
                for key, p in indexer.named_parameters():
                    if key in PACKED:
                        p.copy_(unpack_matrix(pack_matrix(p.cpu(), bits), len(p)))

    @torch.no_grad()
    def put_full_but(self, seed: int, layer: int, delta: str) -> None:
        """Give the model full's indexers, and in one layer the indexer of another delta."""
        self.put_indexers(seed, delta)
        other = {key: p.clone() for key, p in indexers(self.model)[layer].named_parameters()}
        self.put_indexers(seed, "full")
        for key, p in indexers(self.model)[layer].named_parameters():
            p.copy_(other[key])

    # -- searching

    def search(self) -> None:
        # There is one domain, because a few sequences need not cover all sources.
        documents = [dataclasses.replace(d, domain="text") for d in self.read("train")]
        settings = SearchSettings(keep=1 / KEPT[-1], uniform=False)
        for seed in self.o.seeds:
            folder = self.folder(seed, "search")
            if (folder / "result.json").is_file():
                continue
            batches = make_batches(
                documents, length=self.o.length, sequences=self.o.calibration, seed=seed
            )
            self.put_indexers(seed, "full")
            with accelerate(self.model):
                identity = self.base | {"seed": seed}
                search(self.model, batches, folder, settings, identity=identity)

    def searched(self, seed: int, kept: int) -> Pattern:
        """Return the pattern that the search found for the same number of full layers."""
        full = full_count(self.layers, 1 / kept)
        spec = f"searched={search_of(self.out, seed)}:{full}"
        return parse_pattern(spec, self.layers).pattern

    # -- measuring

    def methods(self, seed: int) -> Iterator[tuple[str, int, str, Pattern]]:
        """Yield what is evaluated for a seed: method, fraction, delta and pattern."""
        yield "full", 1, "full", self.full
        yield "start", 1, "start", self.full
        for kept in KEPT:
            yield "untouched", kept, "start", self.uniform(kept)
            yield "own", kept, "full", self.uniform(kept)
            yield "multi", kept, f"multi-{kept}", self.uniform(kept)
            pattern = self.searched(seed, kept)
            yield "searched", kept, "full", pattern
            for pool in POOLS:
                yield f"searched+R{pool}", kept, "full", pattern.with_rest("R", pool)
        if seed == 0:
            for method in BITS:
                if method.startswith("full"):
                    yield method, 1, "full", self.full
                else:
                    yield method, 4, "multi-4", self.uniform(4)
        for kept, name in ((kept, name) for name in VARIED for kept in (4, 1)):
            delta = varied(kept, name)
            if (self.folder(seed, delta) / "result.json").is_file():
                pattern = self.varied_pattern(seed, kept, VARIED[name])
                yield f"{'full' if kept == 1 else 'multi'}, {name}", kept, delta, pattern
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
            done = {(line["method"], line["kept"]) for line in run.journal}
            for method, kept in (("dense", 1), *(("oracle", kept) for kept in (1, *KEPT))):
                if (method, kept) not in done:
                    pattern = self.uniform(kept)
                    facts = measure(self.model, held_out, self.tasks, pattern, method)
                    record(run, None, method, kept, pattern, facts)

    def evaluate(self) -> None:
        held_out = self.held_out()
        five = held_out[:: max(len(held_out) // 5, 1)]
        three = held_out[:: max(len(held_out) // 3, 1)]
        for seed in self.o.seeds:
            with open_run(self.folder(seed, "evaluated"), settings_of(self.o)) as run:
                done = {(line["method"], line["kept"]) for line in run.journal}
                for method, kept, delta, pattern in self.methods(seed):
                    if (method, kept) in done:
                        continue
                    self.put_indexers(seed, delta, bits=BITS.get(method, 16))
                    facts = measure(self.model, held_out, self.tasks, pattern, method)
                    if method in ("full", "own", "multi"):
                        rows = [Row.one_document(batch.ids[0].numpy()) for batch in five]
                        mass = measure_kept(self.model, pattern, rows)
                        facts["mass_kept"] = [round(x, 5) for x in mass]
                    if method == "full":
                        with accelerate(self.model):
                            facts["overlap"] = overlap(self.model, three).to_json()
                    record(run, seed, method, kept, pattern, facts)

    def groups(self) -> None:
        held_out = self.held_out()
        groups = served_layers(self.uniform(4))
        for seed in self.o.seeds:
            with open_run(self.folder(seed, "groups"), settings_of(self.o)) as run:
                done = {(line["method"], *line["layers"]) for line in run.journal}
                for source, group in groups.items():
                    shared = {i for i in group if i != source}
                    pattern = Pattern(
                        "".join("S" if i in shared else "F" for i in range(self.layers))
                    )
                    for method, delta in (("own", "full"), ("multi", "multi-4")):
                        if not shared or (method, *group) in done:
                            continue
                        self.put_full_but(seed, source, delta)
                        facts = measure(self.model, held_out, [], pattern, method)
                        line = {"seed": seed, "method": method, "layers": list(group)}
                        run.append(line | {"documents": facts["documents"]})
                        log(f"seed {seed} {method}, layers {group} alone")

    def table(self) -> None:
        print(summary(write_result(self.out, settings_of(self.o), self.o.device)))


def record(
    run: Run, seed: int | None, method: str, kept: int, pattern: Pattern, facts: dict[str, Any]
) -> None:
    """Append one evaluation to the journal."""
    run.append({"seed": seed, "method": method, "kept": kept, "pattern": str(pattern)} | facts)
    mean = sum(d[2] for d in facts["documents"]) / sum(d[3] for d in facts["documents"])
    log(f"seed {seed} {method} 1/{kept}: loss {mean:.4f}, tasks {accuracy([facts]):.3f}")


def log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def varied(kept: int, name: str) -> str:
    """Return the folder of what the stage vary trains."""
    return f"full-{name}" if kept == 1 else f"multi-{kept}-{name}"


def tasks_for(o: argparse.Namespace) -> list[dict[str, Any]]:
    """Read the rows of the long-range tasks that the options ask for.

    Raises:
        ValueError: there is too little to evaluate on.
    """
    with open(o.data / "tasks.jsonl", encoding="utf-8") as f:
        tasks = [r for r in map(json.loads, f) if r["seed"] < o.tasks and r["length"] <= o.length]
    if not tasks or o.documents < 2:
        raise ValueError(
            "An evaluation needs at least two documents of a domain and one task: --documents is "
            f"{o.documents}, and {o.data / 'tasks.jsonl'} has {len(tasks)} tasks of at most "
            f"{o.length} tokens."
        )
    return tasks


def settings_of(o: argparse.Namespace) -> dict[str, Any]:
    """Return what all pieces of an --out share."""
    names = ("length", "steps", "more", "rows", "lr", "calibration", "documents", "tasks", "dtype")
    text = {
        name: hashlib.sha256((o.data / name).read_bytes()).hexdigest()
        for name in ("heldout.jsonl", "tasks.jsonl")
    }
    return {name: getattr(o, name) for name in names} | {"base": fingerprint(o.checkpoint), **text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="The folder that rewrite.py wrote.")
    parser.add_argument(
        "--data", type=Path, required=True, help="The folder that data.py wrote and unpacked."
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--stage", nargs="*", choices=STAGES, default=[s for s in STAGES if s not in ON_REQUEST]
    )
    parser.add_argument(
        "--vary",
        nargs="*",
        choices=VARIED,
        default=list(VARIED),
        help="The stage vary trains these changes.",
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument(
        "--steps", type=int, default=200, help="Number of steps that train all indexers first."
    )
    parser.add_argument("--more", type=int, default=400, help="Number of steps after them.")
    parser.add_argument("--rows", type=int, default=1, help="Number of rows in a step.")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--calibration", type=int, default=2, help="Number of sequences of the search."
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=10,
        help="Number of held-out documents in each domain, at least 2.",
    )
    parser.add_argument(
        "--tasks", type=int, default=20, help="Number of rows of each task and length."
    )
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
