"""The training loop: warm-up and sparse stage, indexers alone or the whole model, on one process or as many as torchrun starts.

A run is a folder: settings.json, journal.jsonl (one line a step, one a held-out evaluation), `state-STEP` to go on from,
`best-STEP` of the best held-out loss, result.json. The same command again goes on after a kill, with the same losses; on a CPU
the final weights are bitwise those of a run that was not interrupted. Nothing is drawn while training: the data of a step is a function of
(seed, step).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from indexcache.data import Batch
from indexcache.distilling.delta import save_delta
from indexcache.distilling.flops import flops_per_token, peak
from indexcache.distilling.forward import Lesson, served_layers, teaching
from indexcache.distilling.indexers import make_students, write_back
from indexcache.distilling.parallel import (
    Causal,
    World,
    open_world,
    shard_model,
    shard_students,
    world_size,
)
from indexcache.distilling.rows import Row, check_beyond, digest_of_rows, rows_of_step
from indexcache.distilling.settings import DistillSettings, check_model, check_trainable
from indexcache.distilling.state import found_states, load_state, save_state
from indexcache.models.family import indexers
from indexcache.models.loading import DTYPES, library_versions, weights_digest
from indexcache.pattern import Pattern
from indexcache.progress import progress
from indexcache.records import Run, open_run
from indexcache.shapes import Shape


def distill_pattern(
    model: nn.Module,
    pattern: Pattern | str,
    rows: Sequence[Row],
    out: str | Path,
    settings: DistillSettings = DistillSettings(),
    *,
    held_out: Sequence[Batch] = (),
    base: dict[str, str] | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Train the indexers of `pattern` on the model's own attention (method.md sections 1 and 4), resumable in `out`.

    Every F and R layer's indexer learns the attention of itself and of the S layers that read its selection; S layers get none. In the
    sparse stage without `freeze_backbone` the language-modelling loss trains everything else at the same time.

    Args:
        model: a loaded transformers model of a known family. Frozen, it has the trained (best) indexers afterwards and no other
            tensor is touched; in full mode it has been sharded: go on with the written weights.
        rows: training text, `indexcache.distilling.rows.pack_rows`; all of one length.
        out: run folder. Frozen, it gets `delta.safetensors` (`indexcache.distilling.apply_delta`).
        held_out: batches for the evaluation at intervals: mean next-token loss, nats, under the pattern with sparse attention. The
            indexers that did best there are what is given out; without them the last ones.
        base: {"base", "base_digest"}: which checkpoint a delta belongs to; part of what a resumed run must share.
        device: where full mode runs, its shards alone go there (default: the model's device).

    Returns:
        The content of `out/result.json`: {"pattern", "stage", "loss", "frozen", "steps", "tokens", "kl": {layer: nats a token, of the last
        step}, "lm_loss", "held_out": {"first", "best", "best_step", "last"} or None, "delta": file name or None}; in full mode also
        "weights", on the first process the full state dict on the CPU (not in the file).

    Raises:
        ValueError: whatever `check_model`, `check_beyond` and the settings refuse; a folder of another run; rows that the processes cannot
            share evenly; a loss that is not finite (the last good checkpoint stays).
    """
    pattern = Pattern.of(pattern)
    settings.check()
    length = len(rows[0].ids) if rows else 0
    if not rows or any(len(row.ids) != length for row in rows):
        raise ValueError("The training rows are all of one length, and there is at least one.")
    check_model(model, pattern, length, settings.layer_weights)
    beyond = check_beyond(rows, int(model.config.index_topk))  # type: ignore[union-attr, arg-type]
    if settings.eval_every and not held_out:
        raise ValueError(
            "There is no held-out text to evaluate on; give some, or set eval_every to 0."
        )
    if settings.rows % world_size():
        raise ValueError(
            f"A step has {settings.rows} rows, which {world_size()} processes cannot share evenly; change --batch-tokens."
        )
    if not settings.frozen:
        check_trainable(model)
    weight = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    identity = {
        "pattern": str(pattern),
        **asdict(settings),
        "data": digest_of_rows(rows),
        "weights": weights_digest(model),
        "held_out": [b.digests for b in held_out],
        "dtype": str(weight.dtype),
        **(base or {}),
        **library_versions(),
    }
    target = torch.device(device) if device else weight.device
    with open_world(target, sharded=not settings.frozen) as world, ExitStack() as stack:
        run, refusal = None, None
        if world.rank == 0:
            try:
                run = stack.enter_context(open_run(Path(out), identity))
            except (ValueError, OSError) as error:
                refusal = error
        world.agree(refusal)
        trainer = Trainer(model, pattern, rows, Path(out), settings, held_out, world, run)
        trainer.resume()
        trainer.fit()
        return trainer.finish(base or {}, beyond)


class Trainer:
    """One process of a run; see `distill_pattern`."""

    def __init__(
        self,
        model: nn.Module,
        pattern: Pattern,
        rows: Sequence[Row],
        out: Path,
        settings: DistillSettings,
        held_out: Sequence[Batch],
        world: World,
        run: Run | None,
    ):
        self.model, self.pattern, self.rows, self.out, self.settings = (
            model,
            pattern,
            rows,
            out,
            settings,
        )
        self.world, self.run, self.done, self.saved, self.best, self.best_step = (
            world,
            run,
            0,
            0,
            math.inf,
            -1,
        )
        self.held_out = [Row.whole(ids.numpy()) for b in held_out for ids in b.ids]
        weight = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
        dtype = weight.dtype if settings.frozen else DTYPES[settings.compute_dtype]
        self.shape = Shape.of(model.config)
        self.groups = list(served_layers(pattern))
        self.students = make_students(model, pattern, dtype).to(world.device)
        shard_students(self.students, world)
        self.zeros = _rows_that_hold_something(self.students) if settings.keep_zeros else []
        model.requires_grad_(not settings.frozen)
        self.causal = Causal(model)
        self.trained: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {
            "indexers": (self.students, self._optimizer(self.students, settings.lr))
        }
        if not settings.frozen:
            for indexer in indexers(model):
                if indexer is not None:
                    indexer.requires_grad_(False)
            shard_model(self.causal, world, dtype)
            self.trained["backbone"] = (
                self.causal,
                self._optimizer(self.causal, settings.backbone_lr),
            )
        self.lesson = Lesson(
            model,
            pattern,
            self.students,
            sparse=settings.sparse,
            kind=settings.loss,
            weights=settings.layer_weights,
        )
        self.exam = Lesson(model, pattern, self.students, sparse=True)

    def _optimizer(self, module: nn.Module, lr: float) -> torch.optim.AdamW:
        params = [p for p in module.parameters() if p.requires_grad]
        decay = self.settings.weight_decay
        groups = [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = self.world.device.type == "cuda"
        return torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=fused
        )

    # -- where a killed run goes on ---------------------------------------------------------------------------------

    def resume(self) -> None:
        """Go on from the newest whole checkpoint; without one from the start, where the journal keeps the lines it has.

        Raises:
            ValueError: the checkpoint cannot be read, or the journal is not the one it was written beside.
        """
        states, bests = found_states(self.out, "state"), found_states(self.out, "best")
        found = [load_state(path, {}, self._facts(), self.world) for path in bests[-1:]]
        if states:
            found.append(load_state(states[-1], self.trained, self._facts(), self.world))
            self.done = self.saved = int(found[-1]["step"])
        for facts in sorted(found, key=lambda f: f["best_step"])[
            -1:
        ]:  # that of the best may be newer than the state's
            self.best, self.best_step = float(facts["best"]), int(facts["best_step"])
        self.world.agree(self._check_journal())

    def _check_journal(self) -> ValueError | None:
        """What is wrong with the lines beside the checkpoint; None on processes that have no journal."""
        s, lines = self.settings, [] if self.run is None else self.run.journal
        steps, exams = (
            {e.get("step") for e in lines if kind in e} for kind in ("loss", "held_out")
        )
        wanted = {
            n
            for n in range(self.done + 1)
            if s.eval_every and self.done and (n % s.eval_every == 0 or n == s.steps)
        }
        if self.run is None or (
            set(range(1, self.done + 1)) <= steps
            and wanted <= exams
            and all("step" in e for e in lines)
        ):
            return None
        return ValueError(
            f"{self.out}: journal.jsonl does not have all steps up to the {self.done} of the checkpoint, so it was changed "
            "by hand; choose another --out."
        )

    def _facts(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step}

    def _save(self) -> None:
        """Only when the loss of the next step is known to be finite: an update that ruins the weights shows there."""
        if self.saved != self.done:
            save_state(self.out, "state", self.done, self.trained, self._facts(), self.world)
            self.saved = self.done

    def _note(self, entry: dict[str, Any], kind: str) -> None:
        """A line of the journal, unless a run that was killed wrote that line already."""
        if self.run is not None and not any(
            e["step"] == entry["step"] and kind in e for e in reversed(self.run.journal)
        ):
            self.run.append(entry)

    # -- training ---------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        s, tokens = self.settings, self.settings.rows * len(self.rows[0].ids)
        bar = progress(s.steps, "step", self.done) if self.world.rank == 0 else nullcontext()
        ceiling = peak(self.world.device)
        with bar as shown:
            if s.eval_every and self.done == 0:
                self._evaluate()
            while self.done < s.steps:
                began, scale = time.perf_counter(), s.scale(self.done)
                facts = self.learn()
                seconds = time.perf_counter() - began
                if self.done % s.save_every == 0:
                    self._save()
                began = time.perf_counter()
                self.update(scale)
                seconds += time.perf_counter() - began
                self.done += 1
                mfu = (
                    None
                    if ceiling is None
                    else round(
                        self._flops(self.done - 1) / seconds / (ceiling * self.world.size), 4
                    )
                )
                self._note(
                    {
                        "step": self.done,
                        **facts,
                        "lr": s.lr * scale,
                        "tokens": self.done * tokens,
                        "tokens_s": round(tokens / seconds, 1),
                        "mfu": mfu,
                    },
                    "loss",
                )
                if shown is not None:
                    best = f", best held-out {self.best:.4f}" if self.best < math.inf else ""
                    lm = f", lm {facts['lm_loss']:.4f}" if facts["lm_loss"] is not None else ""
                    use = "" if mfu is None else f", MFU {mfu:.1%}"
                    shown.set_postfix_str(
                        f"KL {facts['loss']:.4f}{lm}{best}, {tokens / seconds:,.0f} tokens/s{use}",
                        refresh=False,
                    )
                    shown.update()
                if s.eval_every and (self.done % s.eval_every == 0 or self.done == s.steps):
                    self._evaluate()
            if self.saved != self.done:
                self.learn()
                self._save()

    def _flops(self, step: int) -> float:
        """Operations of one step, document by document."""
        ends = [
            cut
            for row in rows_of_step(self.rows, step, self.settings.rows, self.settings.seed)
            for cut in row.cuts
        ]
        return sum(
            (b - a) * flops_per_token(self.shape, self.pattern, self.settings, b - a)
            for a, b in ends
        )

    def learn(self) -> dict[str, Any]:
        """The gradients of one step; {"loss": mean over the indexers, "kl": of each, "lm_loss", "norm", "backbone_norm"}."""
        s, w = self.settings, self.world
        mine = rows_of_step(self.rows, self.done, s.rows, s.seed)[w.rank :: w.size]
        sums = torch.zeros(
            len(self.groups) + 2, dtype=torch.float64, device=w.device
        )  # KL of each, LM loss, its tokens
        with teaching(self.model, self.lesson):
            for row in mine:
                with (
                    self.lesson.row(row, learn=True, factor=1 / len(mine)),
                    torch.set_grad_enabled(not s.frozen),
                ):
                    lm, count = self.causal(row, w.device, not s.frozen)
                if not s.frozen:
                    (lm / (len(row.ids) * len(mine))).backward()
                values = [self.lesson.losses[i].double() for i in self.groups]
                sums += torch.stack(
                    [*values, lm.detach().double(), lm.new_full((), count, dtype=torch.float64)]
                )
        sums = w.mean(sums)
        for p, holds in self.zeros:
            assert p.grad is not None
            _local(p.grad).mul_(holds)
        norms = self._clip()
        kl = (sums[:-2] / len(mine)).tolist()
        found = {
            "loss": sum(kl) / len(kl),
            "kl": kl,
            "lm_loss": None if s.frozen else float(sums[-2] / sums[-1]),
            "norm": norms["indexers"],
            "backbone_norm": norms.get("backbone"),
        }
        if not all(math.isfinite(v) for v in [*kl, *norms.values(), found["lm_loss"] or 0.0]):
            last = found_states(self.out, "state")
            kept = (
                f"the last good checkpoint, {last[-1].name}, is kept in {self.out}"
                if last
                else f"{self.out} has no checkpoint yet"
            )
            when = f"at step {self.done + 1}" if self.done < s.steps else "after the last step"
            raise ValueError(
                f"The loss is not finite {when}; {kept}. Take a smaller --lr and a new --out."
            )
        return found

    def update(self, scale: float) -> None:
        """One optimizer step with what `learn` has left; `scale`: of the peak learning rates."""
        s = self.settings
        for name, (_, optimizer) in self.trained.items():
            for group in optimizer.param_groups:
                group["lr"] = scale * (s.lr if name == "indexers" else s.backbone_lr)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _clip(self) -> dict[str, float]:
        """Clip the gradients, of each indexer apart, because they are problems apart; the norms before, of all indexers together."""
        apart = [
            nn.utils.clip_grad_norm_(student.parameters(), self.settings.clip)
            for student in self.students.values()
        ]
        norms = {"indexers": math.hypot(*torch.stack([_plain(n) for n in apart]).tolist())}
        if "backbone" in self.trained:
            params = [p for p in self.causal.parameters() if p.requires_grad]
            norms["backbone"] = float(_plain(nn.utils.clip_grad_norm_(params, self.settings.clip)))
        return norms

    # -- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        loss = self.held_out_loss()
        self._note({"step": self.done, "held_out": loss}, "held_out")
        if loss < self.best:
            self.best, self.best_step = loss, self.done
            save_state(
                self.out,
                "best",
                self.done,
                self.trained,
                self._facts(),
                self.world,
                optimizers=False,
            )

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean next-token loss over the held-out sequences, under the pattern, with the selection of the indexers as they are."""
        w, sums = self.world, torch.zeros(2, dtype=torch.float64, device=self.world.device)
        with teaching(self.model, self.exam):
            for i in range(
                w.rank, len(self.held_out) + (-len(self.held_out)) % w.size, w.size
            ):  # as many on each: FSDP2 gathers
                row = self.held_out[i % len(self.held_out)]
                with self.exam.row(row, learn=False):
                    lm, count = self.causal(row, w.device, True)
                if i < len(self.held_out):
                    sums += torch.stack([lm.double(), lm.new_full((), count, dtype=torch.float64)])
        sums = w.mean(sums)
        loss = float(sums[0] / sums[1])
        if not math.isfinite(loss):
            raise ValueError(
                f"The held-out loss is not finite after step {self.done}: the model gives no finite logits on this text."
            )
        return loss

    # -- the end ----------------------------------------------------------------------------------------------------

    def finish(self, base: dict[str, str], beyond: float) -> dict[str, Any]:
        s, best = self.settings, self.out / f"best-{self.best_step:08d}"
        if s.eval_every:
            if not best.is_dir():
                raise ValueError(
                    f"{best}: this checkpoint of the best held-out loss is missing; choose another --out to begin again."
                )
            load_state(best, self.trained, self._facts(), self.world, optimizers=False)
        write_back(self.model, self.students)
        weights = None if s.frozen else self._whole()
        result: dict[str, Any] = {}
        if self.run is not None:
            steps = [e for e in self.run.journal if "loss" in e]
            last = next(e for e in reversed(steps) if e["step"] == s.steps)
            losses = {e["step"]: e["held_out"] for e in self.run.journal if "held_out" in e}
            held = (
                {
                    "first": losses[0],
                    "best": self.best,
                    "best_step": self.best_step,
                    "last": losses[s.steps],
                }
                if losses
                else None
            )
            if s.frozen:
                save_delta(self.model, self.pattern, self.out / "delta.safetensors", base)
            result = {
                "pattern": str(self.pattern),
                "stage": s.stage,
                "loss": s.loss,
                "frozen": s.frozen,
                "steps": s.steps,
                "tokens": last["tokens"],
                "kl": dict(zip(map(str, self.groups), last["kl"], strict=True)),
                "lm_loss": last["lm_loss"],
                "held_out": held,
                "queries_beyond_k": beyond,
                "delta": "delta.safetensors" if s.frozen else None,
            }
            self.run.save("result.json", result)
        self.world.wait()
        return result if weights is None else result | {"weights": weights}

    def _whole(self) -> dict[str, Tensor]:
        """All weights, gathered, on the first process's CPU."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        found = get_model_state_dict(
            self.causal, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        return {name.removeprefix("inner."): value for name, value in found.items()}  # type: ignore[misc]


def _rows_that_hold_something(module: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """(matrix, in its dtype [rows here, 1]: 0 where a row holds nothing but zeros) of the matrices that have such rows."""
    found = [
        (p, (_local(p.detach()) != 0).any(-1, keepdim=True).to(p.dtype))
        for p in module.parameters()
        if p.dim() == 2
    ]
    return [(p, holds) for p, holds in found if not bool(holds.all())]


def _local(x: Tensor) -> Tensor:
    """This process's part: whole rows, for FSDP2 cuts between rows."""
    return x.to_local() if isinstance(x, DTensor) else x


def _plain(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
