"""Train the indexers of a streamed model, group by group, with one pass over its layers.

In the warm-up attention is dense, so hidden states do not change while indexers learn, and an
indexer needs only the layers of its group. A pass over the layers therefore runs all rows through
a group, keeps what comes into each of its layers, and trains the group's indexer for all steps
before it goes on. The held-out losses of all steps follow in a second pass, with the indexers as
they were then. The arithmetic is that of `Trainer`.
"""

from __future__ import annotations

import math
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from indexcache.distilling.evaluation import sum_and_count
from indexcache.distilling.forward import attention_replaced, decoder_arguments
from indexcache.distilling.gradients import clip, local_shard
from indexcache.distilling.result import DistillResult
from indexcache.distilling.rows import Row, rows_of_step
from indexcache.distilling.trainer import Trainer
from indexcache.models.family import decoder_layers
from indexcache.models.stream.loading import stream_of
from indexcache.models.stream.run import Stream
from indexcache.models.stream.store import Slot, Store
from indexcache.progress import progress as progress_bar
from indexcache.records import atomic
from indexcache.seen import Seen

KEPT = ("self_attn.", "input_layernorm.")
"""The parts of a layer that its group needs for training."""


class StreamTrainer(Trainer):
    """A trainer of a model that was loaded with `stream`; see `training.distill`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        stream = stream_of(self.model)
        assert isinstance(stream, Stream)
        self.stream = stream
        self.layers = stream.layers
        self.folder = self.out / "stream"
        stream.folder = self.folder
        self.due = [n for n in range(self.settings.steps + 1) if self._evaluation_due(n)]
        self.steps: dict[int, dict[str, Any]] = {}  # what training a group says, by its F or R
        self.held: dict[int, float] = {}

    def fit(self, progress: bool = False) -> None:
        """Train all groups, then write the journal as `Trainer` does step by step."""
        s = self.settings
        if self.done == s.steps:
            return
        bar = progress_bar(len(self.owners) * s.steps, "step", shown=progress)
        with bar, torch.no_grad():
            self._train(bar)
            if self.due:
                self._hold(bar)
        self.done = 0
        if s.eval_every:
            self._restore(0)
            self._evaluate()
        while self.done < s.steps:
            self.done += 1
            self._log(self._entry(self.done), "loss")
            if self._evaluation_due(self.done):
                self._restore(self.done)
                self._evaluate()
        self._restore(s.steps)
        self._save()

    def finish(self, base: dict[str, str], beyond: float, seen: Seen) -> DistillResult:
        """Write the delta and the result; see `Trainer.finish`."""
        self.layers.load_indexers()
        result = super().finish(base, beyond, seen)
        self.stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return result

    def held_out_loss(self) -> float:
        """Return the held-out loss of this step, which a pass has measured."""
        loss = self.held[self.done]
        if not math.isfinite(loss):
            raise ValueError(
                f"The held-out loss is not finite after step {self.done}: the model gives no "
                "finite logits on this text."
            )
        return loss

    # -- training ----------------------------------------------------------------------------------

    def _train(self, bar: Any) -> None:
        """Train every group that no earlier run has trained, in one pass over the layers."""
        s = self.settings
        used = {
            id(r): r for n in range(s.steps) for r in rows_of_step(self.rows, n, s.rows, s.seed)
        }
        store = Store(self.layers.device, self.stream.host_memory, self.folder)
        try:
            entered: dict[int, dict[int, Slot]] = {}  # by layer, what comes into it by row
            hidden: dict[int, Slot] = {}
            last = max(group[-1] for group in self.training_forward.groups.values())
            for layer in range(last + 1):
                self.layers.load(layer, layer + 1 if layer < last else None)
                owner = self.training_forward.owner.get(layer)
                waits = owner is not None and not self._read_group(owner)
                if waits:
                    entered[layer] = {}
                following: dict[int, Slot] = {}
                with attention_replaced(self.model, self.evaluation_forward):
                    for key, row in used.items():
                        x = self._entering(store, hidden.get(key), row)
                        if waits:
                            entered[layer][key] = hidden.get(key) or store.put(x)
                        if layer < last:
                            following[key] = store.put(self._dense(layer, x, row))
                hidden = following
                self.layers.drop(layer, KEPT if waits else ())
                bar.set_postfix_str(f"layer {layer + 1} of {last + 1}", refresh=False)
                group = [] if owner is None else self.training_forward.groups[owner]
                if owner is not None and layer == group[-1]:
                    if waits:
                        self._train_group(owner, entered, store, bar)
                        for one in group:
                            self.layers.drop(one)
                        entered.clear()
                    else:
                        bar.update(s.steps)
        except BaseException:
            self.stream.close()
            raise
        finally:
            store.close()

    def _entering(self, store: Store, slot: Slot | None, row: Row) -> Tensor:
        """Return the hidden states [1, T, E] that come into a layer; embeddings into the first."""
        if slot is not None:
            (found,) = store.ahead([slot])()
            assert found is not None
            return found
        ids = torch.from_numpy(row.ids)[None].to(self.layers.device)
        return self.model.get_input_embeddings()(ids)

    def _dense(self, layer: int, x: Tensor, row: Row) -> Tensor:
        forward = self.evaluation_forward
        forward.sparse = False
        try:
            with forward.row(row, collect=False):
                arguments = decoder_arguments(self.model, row, self.layers.device)
                return self.stream.run_layer(layer, x, **arguments)
        finally:
            forward.sparse = True

    def _train_group(
        self, owner: int, entered: dict[int, dict[int, Slot]], store: Store, bar: Any
    ) -> None:
        """Train the indexer of layer `owner` for all steps, and keep what that gave."""
        s = self.settings
        indexer = self.indexers[str(owner)]
        mine = {id(p) for p in indexer.parameters()}
        masks = [(p, mask) for p, mask in self.zero_row_masks if id(p) in mine]
        facts: dict[str, Any] = {"kl": [], "norm": [], "seconds": [], "weights": {}}
        if 0 in self.due:
            facts["weights"][0] = _cloned(indexer)
        for step in range(s.steps):
            self.done = step
            began = time.perf_counter()
            rows = rows_of_step(self.rows, step, s.rows, s.seed)
            kl = torch.zeros(1, dtype=torch.float64, device=self.layers.device)
            with attention_replaced(self.model, self.training_forward):
                for row in rows:
                    kl += self._losses(owner, row, entered, store, 1 / len(rows))
            for p, mask in masks:
                assert p.grad is not None
                local_shard(p.grad).mul_(mask)
            norm = float(clip(indexer.parameters(), s.clip))
            facts["kl"].append(float(kl) / len(rows))
            if not math.isfinite(facts["kl"][-1]) or not math.isfinite(norm):
                raise self._not_finite()
            facts["norm"].append(norm)
            self.update(s.lr_scale(step))
            facts["seconds"].append(time.perf_counter() - began)
            if step + 1 in self.due or step + 1 == s.steps:
                facts["weights"][step + 1] = _cloned(indexer)
            bar.update()
        facts["optimizer"] = {
            name: self.trained["indexers"][1].state[p] for name, p in indexer.named_parameters()
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic(self._path(owner)) as temporary:
            torch.save(facts, temporary)
        self.steps[owner] = {key: facts[key] for key in ("kl", "norm", "seconds")}

    def _losses(
        self, owner: int, row: Row, entered: dict[int, dict[int, Slot]], store: Store, scale: float
    ) -> Tensor:
        """Compute a group's loss on a row, and its gradients: fp64 [1]."""
        forward = self.training_forward
        positions = decoder_arguments(self.model, row, self.layers.device)["position_ids"]
        with forward.row(row, collect=True, gradient_scale=scale):
            for layer in forward.groups[owner]:
                x = self._entering(store, entered[layer][id(row)], row)
                rope = self.model.model.rotary_emb(x, position_ids=positions)
                part = decoder_layers(self.model)[layer]
                part.self_attn(part.input_layernorm(x), position_embeddings=rope)
        return forward.losses[owner].double()[None]

    # -- what groups leave -------------------------------------------------------------------------

    def _path(self, owner: int) -> Path:
        return self.folder / f"group-{owner}.pt"

    def _read_group(self, owner: int) -> bool:
        """Take over what an earlier run, which was interrupted, has trained."""
        if owner in self.steps:
            return True
        with suppress(Exception):  # A file that cannot be read is as good as none.
            facts = _read(self._path(owner))
            if len(facts["kl"]) == self.settings.steps:
                indexer = self.indexers[str(owner)]
                state = self.trained["indexers"][1].state
                for name, p in indexer.named_parameters():
                    state[p] = {k: v.to(p.device) for k, v in facts["optimizer"][name].items()}
                self.steps[owner] = {key: facts[key] for key in ("kl", "norm", "seconds")}
                return True
        return False

    def _restore(self, step: int, owners: list[int] | None = None) -> None:
        """Give the indexers the weights that they had after a step."""
        for owner in self.owners if owners is None else owners:
            facts = _read(self._path(owner))
            self.indexers[str(owner)].load_state_dict(facts["weights"][step])

    def _entry(self, step: int) -> dict[str, Any]:
        """Return a step's line of the journal."""
        s = self.settings
        kl = [self.steps[owner]["kl"][step - 1] for owner in self.owners]
        norms = [self.steps[owner]["norm"][step - 1] for owner in self.owners]
        seconds = sum(self.steps[owner]["seconds"][step - 1] for owner in self.owners)
        tokens = s.rows * len(self.rows[0].ids)
        return {
            "step": step,
            "loss": sum(kl) / len(kl),
            "kl": kl,
            "lm_loss": None,
            "norm": math.hypot(*norms),
            "backbone_norm": None,
            "lr": s.lr * s.lr_scale(step - 1),
            "tokens": step * tokens,
            "tokens_s": round(tokens / seconds, 1),
            "mfu": self._mfu(step - 1, seconds),
        }

    # -- evaluation --------------------------------------------------------------------------------

    def _hold(self, bar: Any) -> None:
        """Measure the held-out losses of all evaluations with one pass over the layers."""
        store = Store(self.layers.device, self.stream.host_memory, self.folder)
        forward = self.evaluation_forward
        cases = [(step, at) for step in self.due for at in range(len(self.held_out))]
        hidden: dict[tuple[int, int], Slot] = {}
        left: dict[tuple[int, int], Any] = {case: ({}, []) for case in cases}
        count = len(self.layers)
        try:
            for layer in range(count):
                self.layers.load(layer, layer + 1 if layer + 1 < count else None)
                with attention_replaced(self.model, forward):
                    for case in cases:
                        step, at = case
                        row = self.held_out[at]
                        if at == 0 and layer in self.owners:
                            self._restore(step, [layer])
                        x = self._entering(store, hidden.pop(case, None), row)
                        with forward.row(row, collect=False):
                            forward.resume(*left.pop(case))
                            arguments = decoder_arguments(self.model, row, self.layers.device)
                            out = self.stream.run_layer(layer, x, **arguments)
                            left[case] = forward.left()
                        hidden[case] = store.put(out)
                self.layers.drop(layer)
                bar.set_postfix_str(f"held-out, layer {layer + 1} of {count}")
            for step in self.due:
                sums = torch.zeros(2, dtype=torch.float64)
                for at, row in enumerate(self.held_out):
                    x = self._entering(store, hidden.pop((step, at)), row)
                    lm, tokens = self.row_loss.of_hidden(x, row, self.layers.device)
                    sums += torch.stack(sum_and_count(lm, tokens)).cpu()
                self.held[step] = float(sums[0] / sums[1])
        except BaseException:
            self.stream.close()
            raise
        finally:
            store.close()


def _cloned(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().cpu().clone() for name, t in module.state_dict().items()}


def _read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
