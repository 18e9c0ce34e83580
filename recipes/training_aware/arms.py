"""The arms of the comparison, and the training of one of them by the package's own `distill`."""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from indexcache.distilling import DistillSettings, apply_delta, distill
from indexcache.distilling.layer_weights import layer_weights
from indexcache.distilling.run import write_checkpoint
from indexcache.models.loading import fingerprint, load
from indexcache.pattern import Pattern, full_count
from indexcache.records import write_json
from indexcache.spec import parse_pattern

ADAPT_SEED = 1000


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: its name in the result file.
        kept: one layer in so many keeps its indexer.
        objective: what the indexers learn, see `DistillSettings.objective`.
        offset: offset of a uniform pattern: 1 is FSSS, 2 is FFSSS.
        rest: the role of all other layers.
        searched: the pattern is the one that the search before the training found.
        weighted: layers count as much as sharing each alone cost in that search.
        answers: weight of the queries that must find an answer, see `DistillSettings`.
    """

    name: str
    kept: int
    objective: str = "multi"
    offset: int = 1
    rest: str = "S"
    searched: bool = False
    weighted: bool = False
    answers: float = 0.0

    def pattern(self, layers: int, search: Path | str, pool: int) -> Pattern:
        """Return the pattern that the arm trains under.

        Args:
            search: the folder of the search before the training, or the pattern it found.
            pool: size of the pool of R layers, in units of k.
        """
        if self.kept == 1:
            return Pattern.full(layers)
        if self.searched:
            found = isinstance(search, str)
            spec = search if found else f"{search}:{full_count(layers, 1 / self.kept)}"
            return parse_pattern(spec, layers).pattern
        factor = pool if self.rest == "R" else None
        return Pattern.uniform(layers, self.kept, self.offset, rest=self.rest, pool_factor=factor)


# The order is that of their importance: a session that ends early has the first ones.
ARMS = {
    "full": Arm("full", 1),
    "multi-4": Arm("uniform_multi", 4),
    "own-4": Arm("uniform_own", 4, "own"),
    "lm-4": Arm("uniform_lm", 4, "none"),
    "searched-4": Arm("searched", 4, searched=True),
    "multi-2": Arm("uniform_multi", 2),
    "multi-8": Arm("uniform_multi", 8),
    "r-4": Arm("uniform_r", 4, rest="R"),
    "own-2": Arm("uniform_own", 2, "own"),
    "lm-2": Arm("uniform_lm", 2, "none"),
    "own-8": Arm("uniform_own", 8, "own"),
    "lm-8": Arm("uniform_lm", 8, "none"),
    "multi-4-offset2": Arm("uniform_multi", 4, offset=2),
    "multi-8-offset2": Arm("uniform_multi", 8, offset=2),
    "r-8": Arm("uniform_r", 8, rest="R"),
    "multi-2-offset2": Arm("uniform_multi", 2, offset=2),
}
# Other targets than the mean over layers; --arms names them.
TARGETS = {
    "max-4": Arm("uniform_max", 4, "max"),
    "cover-4": Arm("uniform_cover", 4, "cover"),
    "weighted-4": Arm("uniform_weighted", 4, weighted=True),
    "answers-4": Arm("uniform_answers", 4, answers=1.0),
    "cover-answers-4": Arm("uniform_cover_answers", 4, "cover", answers=1.0),
    "max-searched-4": Arm("searched_max", 4, "max", searched=True),
    "cover-searched-4": Arm("searched_cover", 4, "cover", searched=True),
    "answers-searched-4": Arm("searched_answers", 4, searched=True, answers=1.0),
    "own-searched-4": Arm("searched_own", 4, "own", searched=True),
}
ALL = ARMS | TARGETS


def folder_of(out: Path, seed: int, name: str) -> Path:
    """Return the folder of an arm."""
    return out / f"seed{seed}" / name


def checkpoint_of(folder: Path) -> Path:
    """Return the trained checkpoint of an arm's folder."""
    shared = folder / "checkpoint" / "transformers"
    return shared if shared.is_dir() else folder / "checkpoint"


def search_of(o: argparse.Namespace) -> Path | str:
    """Return the pattern that was given as searched, or the folder of the search before."""
    return o.searched or o.out / "search"


def settings_of(o: argparse.Namespace, arm: Arm, steps: int, seed: int) -> DistillSettings:
    """Return the settings of an arm, which differ in what the indexers learn alone."""
    return DistillSettings(
        stage="sparse",
        objective=arm.objective,  # type: ignore[arg-type]
        answer_weight=arm.answers,
        steps=steps,
        rows=o.rows // o.together,
        lr=o.lr,
        backbone_lr=o.backbone_lr,
        weight_decay=o.weight_decay,
        lora=o.lora,
        recompute=o.recompute,
        compute_dtype=o.dtype,
        eval_every=0,
        save_every=o.save_every,
        seed=seed,
    )


def train_arm(o: argparse.Namespace, name: str, seed: int, steps: int, windows: Any) -> None:
    """Train one arm for a seed, resumable, and write its checkpoint."""
    arm, base = ALL[name], o.out / "base"
    folder = folder_of(o.out, seed, name)
    if checkpoint_of(folder).is_dir():
        return
    # Frozen, a model computes in the dtype it was loaded in; with all weights it has fp32 masters.
    adapts = o.adapt_steps and arm.objective != "none"
    loaded = load(base, dtype=o.dtype if adapts else "float32", device=o.device)
    pattern = arm.pattern(loaded.layers, search_of(o), o.pool)
    settings = settings_of(o, arm, steps, seed)
    if arm.weighted:
        weights = layer_weights(str(o.out / "search"), loaded.layers)
        settings = replace(settings, layer_weights=tuple(weights))
    if adapts:
        # As in the paper, the kept indexers first learn their targets from dense attention. In the
        # sparse stage they learn about the keys they select alone.
        adapting = replace(settings, stage="warmup", steps=o.adapt_steps, rows=o.rows)
        adapting = replace(adapting, recompute=True, lora=0)
        rows = windows.rows(ADAPT_SEED + seed, o.adapt_steps * o.rows, 1, o.length)
        distill(loaded.module, pattern, rows, folder / "adapt", adapting, device=o.device)
        if o.dtype != "float32":
            loaded = load(base, dtype="float32", device=o.device)
            apply_delta(loaded.module, folder / "adapt" / "delta.safetensors")
    result = distill(
        loaded.module,
        pattern,
        windows.rows(seed, steps * (o.rows // o.together), o.together, o.length),
        folder,
        settings,
        base={"base": "base", "base_digest": fingerprint(base)},
        device=o.device,
    )
    write_checkpoint(folder / "checkpoint", loaded, pattern, result.weights, "bfloat16")


def measure_rate(o: argparse.Namespace, number: int, windows: Any, steps: int) -> None:
    """Train a few steps of the arm "full", and write what a second trains, for `--minutes-per-arm`.

    Several processes do this at the same time, as the arms will.
    """
    folder = o.out / "rate" / str(number)
    loaded = load(o.out / "base", dtype="float32", device=o.device)
    pattern = Pattern.full(loaded.layers)
    settings = settings_of(o, ALL["full"], steps, 0)
    rows = windows.rows(0, steps * (o.rows // o.together), o.together, o.length)
    distill(loaded.module, pattern, rows, folder, settings, device=o.device)
    rate = speed_of(folder)["tokens_s"]
    write_json(folder / "rate.json", {"tokens_s": rate})


def speed_of(folder: Path) -> dict[str, float | None]:
    """Return the median rates of the second half of a run's steps: "tokens_s" and "mfu".

    The MFU is None where the device's peak rate is not known.
    """
    lines = [json.loads(x) for x in (folder / "journal.jsonl").read_text().splitlines()]
    half = lines[len(lines) // 2 :]
    mfu = [e["mfu"] for e in half if e.get("mfu") is not None]
    return {
        "tokens_s": statistics.median(e["tokens_s"] for e in half),
        "mfu": statistics.median(mfu) if mfu else None,
    }
