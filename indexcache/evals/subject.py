"""Where an evaluation gets its numbers: a model in this process, or an engine that serves it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from indexcache.checkpoint import read_config
from indexcache.data import Batch, check_unseen
from indexcache.engines.vllm.engine import VllmEngine
from indexcache.engines.vllm.scores import PromptScores, coarse_kl
from indexcache.models.applied import delta_of, without_delta
from indexcache.models.conditions import Conditions, Origin, conditions_in, conditions_of
from indexcache.models.family import AnyModel, DsaModule, module_of, native_pattern
from indexcache.models.lm import hidden_states, logit_chunks
from indexcache.models.seam import check_pattern, use_pattern
from indexcache.models.soundness import blind_loss, check_scores, check_weights
from indexcache.models.world import ALONE, Processes
from indexcache.pattern import Pattern
from indexcache.progress import progress as progress_bar
from indexcache.seen import Seen
from indexcache.vacuity import Share, choosing_size

if TYPE_CHECKING:
    from indexcache.evals.kept import Kept

BUCKETS = 4  # number of equal parts of a sequence
ANSWERS = ("found", "base_found", "asked", "lost", "gained")
FIELDS = ("loss", "delta", "kl", "agree", "tokens", "beyond", *ANSWERS)
"""The sums over the tokens that count. The last five count the answers of retrieval."""
TOKENS = FIELDS.index("tokens")
TRIED = 8  # batches on which an engine's switches are tried
TIE = 1e-6  # nats, the rounding of log-probabilities
TWIN = "\0"
"""The name under which an engine's second evaluation of all layers full is compared with its first;
no pattern is called so."""

Key = tuple[str, str, int, int]  # (domain, unit, length, position bucket)


class Subject(ABC):
    """A model whose patterns are compared, token by token.

    Attributes:
        topk: the number of tokens that a query selects.
        native: the pattern of the model by itself.
        blind_loss: the loss of a model that gives every token the same probability, nats.
        has_delta: whether the baseline runs with other indexers than the patterns.
        twins: the number of passes a batch beside those of the baseline and the patterns.
        facts: what evidence.json says of who ran the model, beside the conditions.
        notes: what must be known of the numbers, in sentences.
    """

    topk: int
    native: Pattern
    blind_loss: float
    has_delta: bool = False
    twins: int = 0
    facts: Mapping[str, Any] = {}
    notes: tuple[str, ...] = ()

    @abstractmethod
    def check(self, batches: Sequence[Batch], patterns: Sequence[Pattern]) -> None:
        """Refuse what cannot be compared, before anything runs.

        Raises:
            ValueError: a pattern that the model cannot take, text that trained it, or weights that
                cannot give a loss that means anything.
        """

    def prepare(self, batches: Sequence[Batch], base: Pattern) -> None:  # noqa: B027
        """Try, before the comparison, what would make all of it worthless.

        Raises:
            ValueError: patterns have no effect.
        """

    @abstractmethod
    def conditions(
        self, batches: Sequence[Batch], shares: Mapping[int, Share], origin: Origin, seed: int
    ) -> Conditions:
        """Return what the numbers hold for."""

    @abstractmethod
    def compare(
        self,
        batch: Batch,
        base: Pattern,
        named: Mapping[str, Pattern],
        done: Callable[[], Any],
        *,
        first: bool,
    ) -> Iterator[tuple[str, Tensor]]:
        """Compare patterns with the baseline on one batch of sequences of T tokens.

        Args:
            batch: the sequences.
            base: the baseline.
            named: patterns by name.
            done: called after each pass.
            first: whether it is the first batch.

        Yields:
            A name, and FIELDS of each token but the last, float64 [fields, B, T - 1].

        Raises:
            ValueError: a loss is not finite.
        """

    @property
    def world(self) -> Processes:
        """The processes that compute together."""
        return ALONE

    def fill(
        self,
        kept: Kept,
        batches: Sequence[Batch],
        base: Pattern,
        named: Mapping[str, Pattern],
        *,
        progress: bool,
    ) -> None:
        """Compare patterns with the baseline on all batches, where that was not done yet.

        Args:
            kept: what is known, to which `by_bucket` of every batch and pattern is added.
            progress: show a progress bar on stderr.

        Raises:
            ValueError: as `compare`.
        """
        names = self.names(named)
        missing = {i: kept.missing(i, names) for i in range(len(batches))}
        missing = {i: some for i, some in missing.items() if some}
        passes = len(batches) * (len(named) + 1 + self.twins)
        left = len(missing) * (1 + self.twins) + sum(map(len, missing.values()))
        left -= sum(TWIN in some for some in missing.values())
        with progress_bar(passes, "pass", passes - left, shown=progress) as bar:
            for n, (i, some) in enumerate(missing.items()):
                asked = {name: named[name] for name in some if name != TWIN}
                for name, fields in self.compare(batches[i], base, asked, bar.update, first=n == 0):
                    kept.add(i, name, np.stack([v for _, v in by_bucket(fields, batches[i])]))

    def names(self, named: Mapping[str, Pattern]) -> list[str]:
        """Return the names of all that is compared with the baseline."""
        return [*named, *([TWIN] if self.twins else [])]


class ModelSubject(Subject):
    """A model in this process, whose passes repeat bit for bit."""

    def __init__(self, model: AnyModel):
        self.model = model
        self.module = module_of(model)
        self.native = native_pattern(self.module)
        self.topk = int(self.module.config.index_topk)
        self.blind_loss = blind_loss(self.module)
        self.has_delta = delta_of(model) is not None

    def check(self, batches: Sequence[Batch], patterns: Sequence[Pattern]) -> None:
        for pattern in patterns:
            check_pattern(self.module, pattern)
        check_unseen(batches, Seen.from_json(vars(self.module.config)))
        if (delta := delta_of(self.model)) is not None:
            check_unseen(batches, delta.pattern.seen)
        check_weights(self.module, selecting=True)

    def conditions(
        self, batches: Sequence[Batch], shares: Mapping[int, Share], origin: Origin, seed: int
    ) -> Conditions:
        return conditions_of(self.model, batches, shares, origin, seed=seed)

    def compare(
        self,
        batch: Batch,
        base: Pattern,
        named: Mapping[str, Pattern],
        done: Callable[[], Any],
        *,
        first: bool,
    ) -> Iterator[tuple[str, Tensor]]:
        # One batch shows whether the scores of an indexer are finite.
        watch = partial(check_scores, self.module) if first else nullcontext
        with watch(), without_delta(self.model):
            base_hidden = _base_hidden(self.module, base, self.native, batch)
        done()
        for name, pattern in named.items():
            # The baseline's own pass is repeated once, to show that two passes are bitwise equal.
            same = pattern == base and not self.has_delta
            if same and not first:
                hidden = base_hidden
            else:
                with watch(), use_pattern(self.module, pattern):
                    hidden = hidden_states(self.module, batch.ids)
                assert not same or torch.equal(hidden, base_hidden), (
                    "two passes under one pattern differ"
                )
            yield name, self.fields(pattern, base, base_hidden, hidden, batch)
            done()

    def fields(
        self, pattern: Pattern, base: Pattern, base_hidden: Tensor, hidden: Tensor, batch: Batch
    ) -> Tensor:
        """Compute FIELDS of each token but the last, float64 [fields, B, T - 1].

        Args:
            pattern: the pattern of `hidden`.
            base: the baseline, that of `base_hidden`.
            base_hidden, hidden: final hidden states [B, T, E].
            batch: the sequences.
        """
        # Other indexers choose other tokens as soon as there are more than k.
        size = self.topk if self.has_delta else choosing_size([pattern, base], self.topk)
        return _fields(self.module, base_hidden, hidden, batch, size)


class EngineSubject(Subject):
    """A model inside vLLM, whose evaluations of one pattern may differ by a noise.

    All layers full are run once more after the patterns of every batch, which gives the noise and
    shows that flipping back restores them.
    """

    def __init__(self, engine: VllmEngine):
        self.engine = engine
        self.native = engine.fullest()
        self.topk = engine.topk
        self.blind_loss = math.log(engine.vocabulary)
        self.kl_ids = 0

    def check(self, batches: Sequence[Batch], patterns: Sequence[Pattern]) -> None:
        for pattern in patterns:
            self.engine.check(pattern)
        check_unseen(batches, Seen.from_json(read_config(self.engine.path)))

    def prepare(self, batches: Sequence[Batch], base: Pattern) -> None:
        reason = self.engine.without_kl()
        self.kl_ids = 0 if reason else self.engine.kl_ids
        self.notes = (f"There is no KL: {reason}." if reason else _about_kl(self.kl_ids),)
        self.twins = 1 if base == self.native else 2
        self.facts = {"engine": {"name": "vllm", **self.engine.facts}, "kl_ids": self.kl_ids}
        # Those on which most can differ show whether the layers obey the switch.
        widest = sorted(batches, key=lambda b: -int((b.own_context > self.topk).sum()))[:TRIED]
        self.engine.check_effect(widest, self.engine.noise(widest))

    def conditions(
        self, batches: Sequence[Batch], shares: Mapping[int, Share], origin: Origin, seed: int
    ) -> Conditions:
        return conditions_in(self.engine, batches, shares, origin, seed=seed)

    def compare(
        self,
        batch: Batch,
        base: Pattern,
        named: Mapping[str, Pattern],
        done: Callable[[], Any],
        *,
        first: bool,
    ) -> Iterator[tuple[str, Tensor]]:
        ids = batch.ids.tolist()
        reference = self._reference(base, ids)
        done()
        for name, pattern in named.items():
            scores = reference if pattern == base else self._scores(pattern, ids, reference)
            size = choosing_size([pattern, base], self.topk)
            yield name, self._fields(batch, reference, scores, size)
            done()
        if base != self.native:
            reference = self._reference(self.native, ids)
            done()
        yield TWIN, self._fields(batch, reference, self._scores(self.native, ids, reference), None)
        done()

    def _reference(self, pattern: Pattern, ids: list[list[int]]) -> list[PromptScores]:
        return self.engine.score(pattern, ids, top=self.kl_ids or 1)

    def _scores(
        self, pattern: Pattern, ids: list[list[int]], reference: Sequence[PromptScores]
    ) -> list[PromptScores]:
        """Score a pattern's tokens, its likeliest ones, and the likeliest ones of the reference."""
        asked = [one.top for one in reference] if self.kl_ids else None
        return self.engine.score(pattern, ids, top=1, asked=asked)

    def _fields(
        self,
        batch: Batch,
        reference: Sequence[PromptScores],
        scores: Sequence[PromptScores],
        size: int | None,
    ) -> Tensor:
        rows, right = [], []
        for before, after, ids in zip(reference, scores, batch.ids.numpy(), strict=True):
            right.append(np.stack([one.top[:, 0] == ids[1:] for one in (after, before)]))
            same = after is before
            kl = np.full_like(after.own, 0.0 if same and self.kl_ids else np.nan)
            agree = after.top[:, 0] == before.top[:, 0]
            if after.given is not None:
                kl = coarse_kl(before.top_scores, after.given)
                # Among equally likely tokens vLLM's order says nothing.
                agree |= after.given[:, 0] >= after.top_scores[:, 0] - TIE
            values = (-after.own, before.own - after.own, kl, agree, np.ones_like(after.own))
            rows.append(np.stack([np.asarray(v, dtype=np.float64) for v in values]))
        fields = torch.from_numpy(np.stack(rows, axis=1))
        beyond = _beyond(batch, slice(0, fields.shape[-1]), size).double()
        found = _answers(batch, *torch.from_numpy(np.stack(right, axis=1)))
        return _finite(torch.cat([fields, beyond[None], found]), kl=bool(self.kl_ids))


def by_bucket(fields: Tensor, batch: Batch) -> Iterator[tuple[Key, np.ndarray]]:
    """Yield the sums of FIELDS, float64 [fields], of each sequence and part of it.

    Args:
        fields: FIELDS of each token, float64 [fields, B, T - 1].
        batch: the sequences.
    """
    tokens = fields.shape[-1]
    if not batch.plain:
        fields = torch.where(batch.counted[:, 1:], fields, 0.0)
    bucket = torch.arange(tokens) * BUCKETS // tokens
    for row, unit in enumerate(batch.units):
        for i in range(BUCKETS):
            yield (batch.domain, unit, tokens + 1, i), fields[:, row, bucket == i].sum(-1).numpy()


def _about_kl(ids: int) -> str:
    return (
        f"The KL is over the {ids} tokens that the baseline finds most likely at a position and "
        "all others as one, so it is a lower bound of the KL over the vocabulary."
    )


def _base_hidden(module: DsaModule, base: Pattern, native: Pattern, batch: Batch) -> Tensor:
    """Compute the baseline's hidden states; the model's native pattern needs no `use_pattern`."""
    if base == native:
        return hidden_states(module, batch.ids)
    with use_pattern(module, base):
        return hidden_states(module, batch.ids)


def _fields(
    module: DsaModule, base_hidden: Tensor, hidden: Tensor, batch: Batch, size: int | None
) -> Tensor:
    """Compute FIELDS of each token but the last, float64 [fields, B, T - 1].

    Args:
        size: up to this many tokens of context nothing can differ; None: nothing ever differs.
    """
    length = batch.ids.shape[1]
    fields = torch.zeros(len(FIELDS), len(batch.units), length - 1, dtype=torch.float64)
    right = torch.zeros(2, len(batch.units), length - 1, dtype=torch.bool)
    for chunk, (base_logits, logits) in logit_chunks(module, base_hidden, hidden):
        target = batch.ids[:, chunk.start + 1 : chunk.stop + 1].to(logits.device)[..., None]
        base_log_p = F.log_softmax(base_logits, -1)
        log_p = F.log_softmax(logits, -1)
        base_loss = -base_log_p.gather(-1, target)[..., 0]
        loss = -log_p.gather(-1, target)[..., 0]
        kl = (base_log_p.exp() * (base_log_p - log_p)).sum(-1)
        agree = (base_log_p.argmax(-1) == log_p.argmax(-1)).float()
        beyond = _beyond(batch, chunk, size).to(kl)
        delta = loss.double() - base_loss.double()
        values = (loss, delta, kl, agree, torch.ones_like(kl), beyond)
        fields[: len(values), :, chunk] = torch.stack([v.double() for v in values]).cpu()
        if batch.answers:
            best = [p.argmax(-1) == target[..., 0] for p in (log_p, base_log_p)]
            right[..., chunk] = torch.stack(best).cpu()
    fields[-len(ANSWERS) :] = _answers(batch, *right)
    return _finite(fields, kl=True)


def _answers(batch: Batch, right: Tensor, base_right: Tensor) -> Tensor:
    """Say at the last token of every answer whether it is found: ANSWERS, float64 [5, B, T - 1].

    Args:
        right, base_right: whether each token but the first is the most likely one under the
            pattern and under the baseline, bool [B, T - 1].

    Returns:
        1 where the pattern finds it, where the baseline does, where an answer is, where only the
        baseline finds it, and where only the pattern does.
    """
    values = torch.zeros(len(ANSWERS), *right.shape, dtype=torch.float64)
    for row, spans in enumerate(batch.answers):
        for start, stop in spans:
            now, before = (bool(r[row, start - 1 : stop - 1].all()) for r in (right, base_right))
            every = (now, before, True, before and not now, now and not before)
            values[:, row, stop - 2] = torch.tensor(every, dtype=torch.float64)
    return values


def _finite(fields: Tensor, *, kl: bool) -> Tensor:
    """Return FIELDS that are finite.

    Args:
        kl: whether there is a KL.

    Raises:
        ValueError: they are not.
    """
    checked = fields if kl else torch.cat([fields[:2], fields[3:]])
    if not math.isfinite(float(checked.sum())):
        raise ValueError(
            "The loss is not finite on this text: the model gives no finite logits (wrong dtype or "
            "broken weights?)."
        )
    return fields


def _beyond(batch: Batch, chunk: slice, size: int | None) -> Tensor:
    """Say which tokens see more than `size` tokens of their own document, bool [B, chunk]."""
    own = batch.own_context[:, chunk]
    return torch.zeros_like(own, dtype=torch.bool) if size is None else own > size
