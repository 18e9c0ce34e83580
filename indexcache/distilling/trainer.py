"""The training loop: warm-up and sparse stage, indexers alone or the whole model.

It runs in one process or in as many as torchrun starts. A run is a folder: settings.json,
journal.jsonl (one line a step, one a held-out evaluation), `state-STEP` to go on from, `best-STEP`
of the best held-out loss, result.json. The same command again goes on after a kill, with the same
losses; on a CPU the final weights are bitwise those of a run that was not interrupted. Nothing is
drawn while training: the data of a step is a function of (seed, step).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from indexcache.data import Batch
from indexcache.delta import ADAPTERS
from indexcache.distilling.adapters import (
    FOLDER,
    add_adapters,
    merged,
    remove_adapters,
    save_adapters,
)
from indexcache.distilling.delta import save_delta
from indexcache.distilling.evaluation import mean_loss, recall, rows_by_kind, sum_and_count
from indexcache.distilling.flops import flops_of_rows, peak
from indexcache.distilling.forward import DistillForward, attention_replaced, served_layers
from indexcache.distilling.gradients import (
    clip,
    local_shard,
    make_optimizer,
    matrices_with_zero_rows,
)
from indexcache.distilling.indexers import trainable_indexers, write_back
from indexcache.distilling.parallel import (
    RowLoss,
    World,
    gather_weights,
    place_model,
    replicate_indexers,
)
from indexcache.distilling.result import DistillResult, HeldOutLosses
from indexcache.distilling.rows import Row, rows_of_step
from indexcache.distilling.settings import DistillSettings
from indexcache.distilling.state import list_states, load_state, save_state
from indexcache.models.family import DsaModule
from indexcache.models.family import indexers as indexers_of
from indexcache.models.loading import DTYPES
from indexcache.models.soundness import blind_loss
from indexcache.pattern import Pattern
from indexcache.progress import progress as progress_bar
from indexcache.records import Run
from indexcache.seen import Seen
from indexcache.shapes import Shape
from indexcache.vacuity import pools_of, share_of

DELTA = "delta.safetensors"
INDEXERS = "indexers.safetensors"
"""The indexers that were trained beside adapters, a delta in the folder of these."""


class Trainer:
    """One process of a run; see `training.distill`."""

    def __init__(
        self,
        model: DsaModule,
        pattern: Pattern,
        rows: Sequence[Row],
        out: Path,
        settings: DistillSettings,
        held_out: Sequence[Batch],
        world: World,
        run: Run | None,
        from_first: bool = False,
    ):
        self.model = model
        self.pattern = pattern
        self.rows = rows
        self.out = out
        self.settings = settings
        self.world = world
        self.run = run
        plain = [b for b in held_out if not b.answers]
        self.held_out = [Row.one_document(ids.numpy()) for b in plain for ids in b.ids]
        self.retrieval = rows_by_kind(held_out)
        sizes = (int(model.config.index_topk), *pools_of([pattern], int(model.config.index_topk)))
        self.sparsity = tuple(share_of(plain, size) for size in sizes) if plain else ()
        self.shape = Shape.of(model.config)

        self.done = 0  # steps
        self.saved = 0  # step of the last checkpoint
        self.best = math.inf
        self.best_step = -1
        self.found: float | None = None  # share of the answers at the last evaluation

        dtype = DTYPES[settings.compute_dtype]
        if settings.frozen:
            dtype = model.get_input_embeddings().weight.dtype
        self.owners = list(served_layers(pattern))
        self.indexers = trainable_indexers(model, pattern, dtype).to(world.device)
        replicate_indexers(self.indexers, world)
        learns = settings.objective != "none"
        self.indexers.requires_grad_(learns)
        masked = settings.keep_zeros and learns
        self.zero_row_masks = matrices_with_zero_rows(self.indexers) if masked else []
        model.requires_grad_(not settings.frozen)
        if settings.lora:
            add_adapters(model, settings.lora, settings.seed)
        self.row_loss = RowLoss(model, adapted=settings.lora > 0)
        self.trained: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
        decay = settings.weight_decay
        if learns:
            optimizer = make_optimizer(self.indexers, settings.lr, decay, world.device)
            self.trained["indexers"] = (self.indexers, optimizer)
        if not settings.frozen:
            for indexer in indexers_of(model):
                if indexer is not None:
                    indexer.requires_grad_(False)
            place_model(self.row_loss, world, dtype, settings.recompute, from_first)
            optimizer = make_optimizer(self.row_loss, settings.backbone_lr, decay, world.device)
            self.trained["backbone"] = (self.row_loss, optimizer)
        self.training_forward = DistillForward(
            model,
            pattern,
            self.indexers,
            sparse=settings.sparse,
            objective=settings.objective,
            weights=settings.layer_weights,
            answer_weight=settings.answer_weight,
        )
        self.evaluation_forward = DistillForward(model, pattern, self.indexers, sparse=True)

    # -- resuming ----------------------------------------------------------------------------------

    def resume(self) -> None:
        """Go on from the newest complete checkpoint, or else from the start.

        The journal keeps the lines it has.

        Raises:
            ValueError: the checkpoint cannot be read, or the journal is not the one it was written
                beside.
        """
        loaded = []
        if bests := list_states(self.out, "best"):
            loaded.append(load_state(bests[-1], {}, self._facts(), self.world))
        if states := list_states(self.out, "state"):
            loaded.append(load_state(states[-1], self.trained, self._facts(), self.world))
            self.done = self.saved = int(loaded[-1]["step"])
        if loaded:  # The facts of `best` may be newer than those of `state`.
            facts = max(loaded, key=lambda facts: facts["best_step"])
            self.best = float(facts["best"])
            self.best_step = int(facts["best_step"])
        self.world.agree(self._check_journal())

    def _check_journal(self) -> ValueError | None:
        """Return the refusal of a journal that lacks lines up to the checkpoint, if it does.

        Processes without a journal refuse nothing.
        """
        if self.run is None:
            return None
        lines = self.run.journal
        steps = {e.get("step") for e in lines if "loss" in e}
        evaluations = {e.get("step") for e in lines if "held_out" in e}
        due = {n for n in range(self.done + 1) if self.done and self._evaluation_due(n)}
        complete = set(range(1, self.done + 1)) <= steps and due <= evaluations
        if complete and all("step" in e for e in lines):
            return None
        return ValueError(
            f"{self.out}: journal.jsonl does not have all steps up to the {self.done} of the "
            "checkpoint, so it was changed by hand; choose another --out."
        )

    def _facts(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step}

    def _save(self) -> None:
        """Save a checkpoint to go on from.

        It must be called after the next step's gradients turned out finite, because an update that
        ruins the weights shows there.
        """
        if self.saved != self.done:
            self._save_state("state", optimizers=True)
            self.saved = self.done

    def _save_state(self, kind: str, optimizers: bool) -> None:
        save_state(
            self.out,
            kind,
            self.done,
            self.trained,
            self._facts(),
            self.world,
            optimizers=optimizers,
        )

    def _log(self, entry: dict[str, Any], kind: str) -> None:
        """Append a line to the journal, unless a run that was killed wrote that line already."""
        if self.run is None:
            return
        journal = reversed(self.run.journal)
        if not any(e["step"] == entry["step"] and kind in e for e in journal):
            self.run.append(entry)

    # -- training ----------------------------------------------------------------------------------

    def fit(self, progress: bool = False) -> None:
        """Train to the last step, with evaluations and checkpoints at their intervals."""
        s = self.settings
        show = progress and self.world.rank == 0
        with progress_bar(s.steps, "step", self.done) if show else nullcontext() as bar:
            if s.eval_every and self.done == 0:
                self._evaluate()
            while self.done < s.steps:
                entry = self._step()
                self._log(entry, "loss")
                if bar is not None:
                    bar.set_postfix_str(self._summary(entry), refresh=False)
                    bar.update()
                if self._evaluation_due(self.done):
                    self._evaluate()
            if self.saved != self.done:
                self.compute_gradients()
                self._save()

    def _evaluation_due(self, step: int) -> bool:
        s = self.settings
        return bool(s.eval_every) and (step % s.eval_every == 0 or step == s.steps)

    def _step(self) -> dict[str, Any]:
        """Run one step and return its line of the journal."""
        s = self.settings
        scale = s.lr_scale(self.done)
        start = time.perf_counter()
        facts = self.compute_gradients()
        seconds = time.perf_counter() - start
        if self.done % s.save_every == 0:
            self._save()
        start = time.perf_counter()
        self.update(scale)
        seconds += time.perf_counter() - start
        self.done += 1
        tokens = s.rows * len(self.rows[0].ids)
        return {
            "step": self.done,
            **facts,
            "lr": s.lr * scale,
            "tokens": self.done * tokens,
            "tokens_s": round(tokens / seconds, 1),
            "mfu": self._mfu(self.done - 1, seconds),
        }

    def _mfu(self, step: int, seconds: float) -> float | None:
        """Return the step's share of the devices' peak rate; None where that is not known."""
        rate = peak(self.world.device)
        if rate is None:
            return None
        rows = rows_of_step(self.rows, step, self.settings.rows, self.settings.seed)
        flops = flops_of_rows(self.shape, self.pattern, self.settings, rows)
        return round(flops / seconds / (rate * self.world.size), 4)

    def _summary(self, entry: dict[str, Any]) -> str:
        """Format the text beside the progress bar."""
        text = f"KL {entry['loss']:.4f}"
        if entry["lm_loss"] is not None:
            text += f", lm {entry['lm_loss']:.4f}"
        if self.best < math.inf:
            text += f", best held-out {self.best:.4f}"
        if self.found is not None:
            text += f", answers {self.found:.0%}"
        text += f", {entry['tokens_s']:,.0f} tokens/s"
        return text if entry["mfu"] is None else f"{text}, MFU {entry['mfu']:.1%}"

    def compute_gradients(self) -> dict[str, Any]:
        """Compute the gradients of one step, clipped.

        Returns:
            "loss", the mean of the indexers' losses; "kl", the loss of each; "lm_loss"; "norm" and
            "backbone_norm", those of the gradients before clipping.
        """
        s = self.settings
        w = self.world
        rows = rows_of_step(self.rows, self.done, s.rows, s.seed)[w.rank :: w.size]
        # The indexers' losses, the sum of the language-modelling losses and their number.
        sums = torch.zeros(len(self.owners) + 2, dtype=torch.float64, device=w.device)
        forward = self.training_forward
        with attention_replaced(self.model, forward):
            for row in rows:
                with (
                    forward.row(row, collect=True, gradient_scale=1 / len(rows)),
                    torch.set_grad_enabled(not s.frozen),
                ):
                    lm, count = self.row_loss(row, w.device, not s.frozen)
                if not s.frozen:
                    (lm / (len(row.ids) * len(rows))).backward()
                losses = [forward.losses[layer].double() for layer in self.owners]
                sums += torch.stack([*losses, *sum_and_count(lm, count)])
        sums = w.mean(sums)
        for p, mask in self.zero_row_masks:
            assert p.grad is not None
            local_shard(p.grad).mul_(mask)
        norms = self._clip()
        kl = (sums[:-2] / len(rows)).tolist()
        facts = {
            "loss": sum(kl) / len(kl),
            "kl": kl,
            "lm_loss": None if s.frozen else float(sums[-2] / sums[-1]),
            "norm": norms["indexers"],
            "backbone_norm": norms.get("backbone"),
        }
        if not all(math.isfinite(v) for v in [*kl, *norms.values(), facts["lm_loss"] or 0.0]):
            raise self._not_finite()
        return facts

    def _not_finite(self) -> ValueError:
        when = f"at step {self.done + 1}"
        if self.done == self.settings.steps:
            when = "after the last step"
        checkpoint = f"{self.out} has no checkpoint yet"
        if states := list_states(self.out, "state"):
            checkpoint = f"the last good checkpoint, {states[-1].name}, is kept in {self.out}"
        return ValueError(
            f"The loss is not finite {when}; {checkpoint}. Take a smaller --lr and a new --out."
        )

    def update(self, scale: float) -> None:
        """Take one optimizer step with the gradients of `compute_gradients`.

        Args:
            scale: the learning rates as a fraction of their peaks.
        """
        peaks = {"indexers": self.settings.lr, "backbone": self.settings.backbone_lr}
        for name, (_, optimizer) in self.trained.items():
            for group in optimizer.param_groups:
                group["lr"] = scale * peaks[name]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _clip(self) -> dict[str, float]:
        """Clip the gradients of each indexer by itself, because each is a problem of its own.

        Returns:
            The norms before, of all indexers together and of the backbone.
        """
        max_norm = self.settings.clip
        by_indexer = [clip(indexer.parameters(), max_norm) for indexer in self.indexers.values()]
        norms = {"indexers": math.hypot(*torch.stack(by_indexer).tolist())}
        if "backbone" in self.trained:
            params = [p for p in self.row_loss.parameters() if p.requires_grad]
            norms["backbone"] = float(clip(params, max_norm))
        return norms

    # -- evaluation --------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Log the held-out loss and the answers found, and save the weights of the lowest loss."""
        loss = self.held_out_loss()
        entry: dict[str, Any] = {"step": self.done, "held_out": loss}
        if self.retrieval:
            forward = self.evaluation_forward
            entry["recall"] = recall(self.row_loss, forward, self.retrieval, self.world)
            self.found = entry["recall"]["all"]
        self._log(entry, "held_out")
        if loss < self.best:
            self.best = loss
            self.best_step = self.done
            self._save_state("best", optimizers=False)

    def held_out_loss(self) -> float:
        """Return the mean next-token loss over the held-out sequences; see `mean_loss`."""
        loss = mean_loss(self.row_loss, self.evaluation_forward, self.held_out, self.world)
        if not math.isfinite(loss):
            raise ValueError(
                f"The held-out loss is not finite after step {self.done}: the model gives no "
                "finite logits on this text."
            )
        return loss

    # -- the end -----------------------------------------------------------------------------------

    def finish(self, base: dict[str, str], beyond: float, seen: Seen) -> DistillResult:
        """Put the best indexers into the model, write the delta and the result, and return it."""
        s = self.settings
        if s.eval_every:
            best = self.out / f"best-{self.best_step:08d}"
            if not best.is_dir():
                raise ValueError(
                    f"{best}: this checkpoint of the best held-out loss is missing; choose another "
                    "--out to begin again."
                )
            load_state(best, self.trained, self._facts(), self.world, optimizers=False)
        write_back(self.model, self.indexers)
        weights = None if s.frozen else gather_weights(self.row_loss)
        if s.lora:
            remove_adapters(self.model)
            weights, adapters = merged(weights or {})
            if self.run is not None:
                save_adapters(adapters, s.lora, self.out / FOLDER)
                about = base | {ADAPTERS: FOLDER} | seen.to_metadata()
                save_delta(self.model, self.pattern, self.out / FOLDER / INDEXERS, about)
        result = None
        if self.run is not None:
            if s.frozen:
                carried = base | seen.to_metadata()
                save_delta(self.model, self.pattern, self.out / DELTA, carried)
            result = self._result(self.run, beyond)
            result = replace(result, pattern=result.pattern.chosen_on(seen))
            self.run.save("result.json", result.to_json())
        self.world.wait()
        return replace(self.world.first(result), weights=weights)

    def _result(self, run: Run, beyond: float) -> DistillResult:
        """Make the result from the journal, whose lines a run before may have written."""
        s = self.settings
        steps = {e["step"]: e for e in run.journal if "loss" in e}
        evaluations = {e["step"]: e["held_out"] for e in run.journal if "held_out" in e}
        found = {e["step"]: e["recall"] for e in run.journal if "recall" in e}
        held_out = None
        if evaluations:
            losses = (evaluations[0], self.best, self.best_step, evaluations[s.steps])
            held_out = HeldOutLosses(*losses, self.sparsity, blind_loss(self.model))
        if found:
            kept = {"first": 0, "best": self.best_step, "last": s.steps}
            found = {name: found[step] for name, step in kept.items()}
        last = steps[s.steps]
        return DistillResult(
            pattern=self.pattern,
            stage=s.stage,
            objective=s.objective,
            frozen=s.frozen,
            steps=s.steps,
            tokens=last["tokens"],
            kl=dict(zip(self.owners, last["kl"], strict=True)),
            lm_loss=last["lm_loss"],
            held_out=held_out,
            queries_beyond_k=beyond,
            delta=DELTA if s.frozen else None,
            layer_weights=s.layer_weights,
            recall=found,
        )
