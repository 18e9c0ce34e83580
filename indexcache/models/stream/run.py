"""Compute the final hidden states of many patterns with one pass over the layers.

The loops are turned around: for each layer, for each pattern, for each batch. Patterns whose layers
have been the same so far are one state, which splits at the first layer where they differ: so a
candidate of a search is born at the layer that it flips, as a copy of the trunk's state. The
decoder's own forward and the seam run each layer; all other layers hand on what they get.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from indexcache.models.family import DsaModule, decoder_layers, family_of
from indexcache.models.patch import Patches, Replaced
from indexcache.models.seam import Seam, use_pattern
from indexcache.models.soundness import check_scores
from indexcache.models.stream.layers import Layers
from indexcache.models.stream.settings import StreamSettings
from indexcache.models.stream.store import Slot, Store
from indexcache.ops import Selection
from indexcache.pattern import Pattern

ONE_BY_ONE = (
    "The weights of this model are streamed layer by layer, so it has no whole forward pass: "
    "search, evaluate, overlap and the warm-up of distill take it; load it without stream for "
    "everything else."
)


@dataclass(frozen=True)
class Variant:
    """A pattern to run, with the trained indexers where there are some, or without them."""

    pattern: Pattern
    trained: bool = True


@dataclass(eq=False)
class State:
    """What patterns that have been equal so far left behind their last layer, by batch.

    Attributes:
        variants: their numbers.
        hidden: the hidden states [B, T, E]; None before the first layer.
        ids: the selection in force, int32 [B, T, k], where the next layer reads it.
        pool: the pool in force, int32 [B, T, p], where a later layer reads it.
    """

    variants: list[int]
    hidden: list[Slot | None]
    ids: list[Slot | None]
    pool: list[Slot | None]

    @classmethod
    def empty(cls, variants: Sequence[int], batches: int) -> State:
        """Make one that holds nothing."""
        return cls(list(variants), [None] * batches, [None] * batches, [None] * batches)


@dataclass(frozen=True, kw_only=True)
class LayerDone:
    """One layer of a pass, when all states have gone through it.

    Attributes:
        layer: its number.
        layers: number of layers.
        states: number of states that went through it.
        seconds: how long the layer took, with its reading.
        waited: the seconds of them in which the compute waited for the weights.
        read: bytes that were read for it.
        read_seconds: the seconds of reading them, whoever waited.
    """

    layer: int
    layers: int
    states: int
    seconds: float
    waited: float
    read: int
    read_seconds: float

    @property
    def rate(self) -> float:
        """The GB a second that were read."""
        return self.read / max(self.read_seconds, 1e-9) / 1e9

    def show(self, bar: Any) -> None:
        """Move a progress bar on by one layer."""
        bar.set_postfix_str(f"{self.states} alive, {self.rate:.1f} GB/s", refresh=False)
        bar.update()


@dataclass(eq=False)
class _Job:
    """One layer that runs in one forward pass of the decoder, and what it left."""

    layer: int
    seam: Seam | None = None  # None where no pattern is in force.
    ids: Tensor | None = None
    pool: Tensor | None = None
    hidden: Tensor | None = None


Observe = Callable[[Store, int, int, Tensor], None]


class Finals:
    """The final hidden states of a pass, after the last norm.

    Args:
        store: what keeps them.
        slots: for each variant, those of each batch; equal patterns share them.
    """

    def __init__(self, store: Store, slots: list[list[Slot]]):
        self._store = store
        self._slots = slots

    @property
    def batches(self) -> int:
        """The number of batches."""
        return len(self._slots[0])

    def get(self, variant: int, batch: int) -> Tensor:
        """Return the final hidden states [B, T, E] of a variant on a batch, on the device."""
        (found,) = self._store.ahead([self._slots[variant][batch]])()
        assert found is not None
        return found


class Stream:
    """A model whose layers are read one at a time.

    Args:
        layers: the layers.
        settings: how much memory the states may take.

    Attributes:
        host_memory: max bytes of states in host memory; None: no limit.
        folder: where states are spilled to; None is the folder for temporary files.
        peak: the most bytes of states in host memory, over all passes.
    """

    def __init__(self, layers: Layers, settings: StreamSettings = StreamSettings()):
        self.layers = layers
        self.module: DsaModule = layers.module
        self.settings = settings
        self.host_memory = settings.limit()
        self.folder: Path | None = None
        self.peak = 0
        self._native = family_of(self.module).native_sharing
        self._job: _Job | None = None
        self._lock = threading.Lock()
        self._patches = Patches()
        for i, layer in enumerate(decoder_layers(self.module)):
            self._patches.wrap(layer, partial(self._wrapped, i))

    def _wrapped(self, index: int, node: Replaced) -> Callable[..., Any]:
        """Make the forward of a layer: its own in its turn, and nothing at all otherwise."""

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            job = self._job
            if job is None:
                raise ValueError(ONE_BY_ONE)
            if index != job.layer:
                selection = kwargs.get("prev_topk_indices")
                return (hidden_states, selection) if self._native else hidden_states
            seam = job.seam
            if seam is None:
                output = node.below(hidden_states, *args, **kwargs)
                job.hidden = output[0] if isinstance(output, tuple) else output
                return output
            seam.resume(job.ids, job.pool)
            current = seam.current()
            if self._native and current.selection is not None:
                kwargs["prev_topk_indices"] = seam.selector.answer(current.selection)
            output = node.below(hidden_states, *args, **kwargs)
            job.ids, job.pool = _ids(current.selection), _ids(current.pool)
            job.hidden = output[0] if isinstance(output, tuple) else output
            return output

        return forward

    @torch.no_grad()
    def run(
        self,
        variants: Sequence[Variant],
        inputs: Sequence[Tensor],
        use: Callable[[Finals], None],
        *,
        watch: bool = False,
        checkpoint: Any = None,
        observe: Observe | None = None,
        report: Callable[[LayerDone], None] = lambda done: None,
    ) -> None:
        """Run all variants on all batches with one pass over the layers.

        Args:
            variants: what runs.
            inputs: token ids int64 [B, T] of every batch.
            use: gets the result, which lives until it returns.
            watch: look at the scores of the indexers in the first batch.
            checkpoint: where the states are saved at intervals, and where they come from if a pass
                was interrupted (`stream.checkpoint.Checkpoint`).
            observe: gets (store, layer, batch, ids int32 [B, T, k]) of the first variant's
                selections. What it puts into the store lives until `use` returns.
            report: is called after each layer.

        Raises:
            ValueError: a layer cannot be read or is not finite, or the scores of an indexer are
                not finite.
            OSError: the disk is full.
        """
        if not self._lock.acquire(blocking=False):
            raise ValueError("This streamed model is in use already; one pass runs at a time.")
        store = Store(self.layers.device, self.host_memory, self.folder)
        try:
            states = [State.empty(range(len(variants)), len(inputs))]
            first = 0
            if checkpoint is not None and (found := checkpoint.load(store, variants)) is not None:
                first, states = found
            for layer in range(first, len(self.layers)):
                reader = self.layers.reader
                began, read, read_seconds = time.perf_counter(), reader.read, reader.seconds
                self.layers.load(layer, (layer + 1) % len(self.layers))
                self._sync()
                waited = time.perf_counter() - began
                states = self._layer(layer, states, variants, inputs, store, watch, observe)
                self._sync()
                self.layers.drop(layer)
                report(
                    LayerDone(
                        layer=layer,
                        layers=len(self.layers),
                        states=len(states),
                        seconds=time.perf_counter() - began,
                        waited=waited,
                        read=reader.read - read,
                        read_seconds=reader.seconds - read_seconds,
                    )
                )
                if checkpoint is not None and layer + 1 < len(self.layers):
                    store.settle()
                    checkpoint.save(store, variants, layer + 1, states)
            store.settle()
            slots: list[list[Any]] = [[] for _ in variants]
            for state in states:
                for number in state.variants:
                    slots[number] = list(state.hidden)
            use(Finals(store, slots))
        except BaseException:
            self.close()
            raise
        finally:
            self.peak = max(self.peak, store.peak)
            store.close()
            self._lock.release()

    def close(self) -> None:
        """End the threads that read ahead, and give back their memory."""
        self.layers.reader.close()

    def _sync(self) -> None:
        if self.layers.device.type == "cuda":
            torch.cuda.synchronize(self.layers.device)

    def _layer(
        self,
        layer: int,
        states: list[State],
        variants: Sequence[Variant],
        inputs: Sequence[Tensor],
        store: Store,
        watch: bool,
        observe: Observe | None,
    ) -> list[State]:
        """Run all states through a layer, and split those whose variants differ in it."""
        born = [one for state in states for one in self._split(layer, state, variants)]
        arriving = self._arriving(layer, born, variants, store)
        following: list[State] = []
        for parent, mine, last in born:
            one = variants[mine[0]]
            new = State.empty(mine, len(inputs))
            role = one.pattern[layer]
            ids_needed = any(_reads_ids(variants[v].pattern, layer) for v in mine)
            pool_needed = any(_reads_pool(variants[v].pattern, layer) for v in mine)
            self.layers.put_indexer(layer, trained=one.trained)
            with use_pattern(self.module, one.pattern) as seam:
                for b, ids in enumerate(inputs):
                    hidden, selection, pool = next(arriving)
                    if hidden is None:
                        hidden = self.module.get_input_embeddings()(ids.to(self.layers.device))
                    with check_scores(self.module) if watch and b == 0 else nullcontext():
                        job = _Job(layer, seam, selection, pool)
                        hidden = self._run(job, hidden)
                    new.hidden[b] = store.put(hidden)
                    if ids_needed:
                        same = role == "S"
                        new.ids[b] = parent.ids[b] if same else store.put(_known(job.ids))
                    if pool_needed:
                        same = role != "F"
                        new.pool[b] = parent.pool[b] if same else store.put(_known(job.pool))
                    if observe is not None and 0 in mine:
                        observe(store, layer, b, _known(job.ids))
                    del hidden, selection, pool, job
                    if last:
                        parent.hidden[b] = parent.ids[b] = parent.pool[b] = None
            self.layers.put_indexer(layer, trained=False)
            following.append(new)
        return following

    def _split(
        self, layer: int, state: State, variants: Sequence[Variant]
    ) -> Iterator[tuple[State, list[int], bool]]:
        """Yield the variants of a state that are equal in this layer too, and whether no more come.

        A layer's indexer matters where it runs, in F and R layers.
        """
        trained = self.layers.has_trained(layer)
        groups: dict[Any, list[int]] = {}
        for number in state.variants:
            one = variants[number]
            own = trained and one.trained and one.pattern[layer] != "S"
            groups.setdefault((one.pattern.signature()[layer], own), []).append(number)
        for n, mine in enumerate(groups.values(), 1):
            yield state, mine, n == len(groups)

    def _arriving(
        self,
        layer: int,
        born: list[tuple[State, list[int], bool]],
        variants: Sequence[Variant],
        store: Store,
    ) -> Iterator[list[Tensor | None]]:
        """Yield what each state and batch needs of the layer before, one ahead of its use."""

        def needed() -> Iterator[Callable[[], list[Tensor | None]]]:
            for parent, mine, _ in born:
                role = variants[mine[0]].pattern[layer]
                for hidden, ids, pool in zip(parent.hidden, parent.ids, parent.pool, strict=True):
                    yield store.ahead(
                        [hidden, ids if role == "S" else None, pool if role == "R" else None]
                    )

        ahead = needed()
        now = next(ahead, None)
        while now is not None:
            following = next(ahead, None)
            yield now()
            now = following

    def run_layer(self, layer: int, hidden: Tensor, **kwargs: Any) -> Tensor:
        """Run a layer that is loaded, without a pattern; behind the last one comes the last norm.

        Args:
            layer: its number.
            hidden: hidden states [B, T, E] of the layer before.
            kwargs: further arguments of the decoder's forward.

        Returns:
            The hidden states [B, T, E].
        """
        return self._run(_Job(layer), hidden, **kwargs)

    def _run(self, job: _Job, hidden: Tensor, **kwargs: Any) -> Tensor:
        """Run one layer; behind the last one comes the last norm."""
        self._job = job
        try:
            out = self.module.model(
                inputs_embeds=hidden, use_cache=False, **kwargs
            ).last_hidden_state
        finally:
            self._job = None
        assert job.hidden is not None
        return out if job.layer == len(self.layers) - 1 else job.hidden


def _ids(selection: Selection | None) -> Tensor | None:
    return None if selection is None else selection.ids


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _reads_ids(pattern: Pattern, layer: int) -> bool:
    """Return whether the layer behind this one reads the selection in force."""
    return pattern.roles[layer + 1 : layer + 2] == "S"


def _reads_pool(pattern: Pattern, layer: int) -> bool:
    """Return whether a layer behind this one reads the pool in force."""
    return "R" in pattern.roles[layer + 1 :].partition("F")[0]
