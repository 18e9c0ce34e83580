"""Evidence that a pattern is safe: loss, divergence and recall, paired per token, by document."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from indexcache.data import ALL, Batch, check_unseen, digest_of, document_groups
from indexcache.data.retrieval import DOMAIN
from indexcache.engines.vllm.engine import VllmEngine
from indexcache.evals.evidence import Evidence
from indexcache.evals.kept import Kept, check_entry
from indexcache.evals.measurement import (
    ALL_RETRIEVAL,
    Measurement,
    Where,
    by_document,
    mean_kl,
    measure,
    noise_at,
)
from indexcache.evals.streamed import subject_of
from indexcache.evals.subject import BUCKETS, FIELDS, TOKENS, TWIN, Key
from indexcache.models.conditions import Origin
from indexcache.models.family import AnyModel
from indexcache.models.together import open_together
from indexcache.pattern import Pattern
from indexcache.vacuity import Share, check_batches, share_of

__all__ = ["Evidence", "Measurement", "evaluate"]

logger = logging.getLogger(__name__)


def evaluate(
    model: AnyModel | VllmEngine,
    patterns: Pattern | str | Mapping[str, Pattern | str] | Sequence[Pattern | str],
    batches: Sequence[Batch],
    *,
    against: Pattern | str | None = None,
    seed: int = 0,
    origin: Origin = Origin(),
    out: str | Path | None = None,
    progress: bool = False,
) -> Evidence:
    """Compare patterns with the full model, or with another pattern, on the same held-out tokens.

    Args:
        model: a model of a known family, or a running vLLM that holds one
            (`engines.vllm.engine.start`). Where `load` put a delta into it, the patterns run with
            the trained indexers and the baseline with the checkpoint's own.
        patterns: one pattern, several, or a mapping from names to patterns.
        batches: held-out batches (`indexcache.data.batches`), and retrieval sequences beside them
            (`indexcache.data.retrieval_batches`), of which the answers alone count. Each length is
            measured by itself.
        against: the baseline; None is what the model does by itself, all F unless it has layers
            without an indexer.
        seed: random seed that the batches were taken with, for the record; nothing here is random.
        origin: where the batches come from, for the record in `conditions`.
        out: run folder, which gets settings.json and journal.jsonl (one line per pattern and batch;
            of a streamed model they are written at the end of its pass). An interrupted evaluation
            with the same settings continues, to the same result. None keeps no journal.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: text that chose or trained a pattern, the checkpoint or its delta
            (`data.check_unseen`), sequences or documents on which a role has too little to lose
            (`vacuity.check_batches`), a pattern the model or a pipeline stage of vLLM cannot take,
            weights, indexer scores or a loss that are not finite, a vLLM in which sharing has no
            effect, or an `out` that belongs to a run with other settings or is no folder.

    The table says where the baseline is no better than a blind guess.
    """
    named = _named(patterns)
    subject = subject_of(model)
    base = subject.native if against is None else Pattern.of(against)
    for pattern in [base, *named.values()]:
        check_unseen(batches, pattern.seen)
    every = [base, *named.values()]
    subject.check(batches, every)
    asked = [b for b in batches if b.domain.startswith(DOMAIN)]
    text = [b for b in batches if not b.domain.startswith(DOMAIN)] or asked
    shares = check_batches(text, subject.topk, every)
    retrieval = _about_retrieval(asked, check_batches(asked, subject.topk, every)) if asked else {}
    _note_near_copies(batches)
    conditions = subject.conditions(text, shares, origin, seed)
    subject.prepare(text, base)
    sums: dict[str, dict[Key, np.ndarray]] = defaultdict(
        lambda: defaultdict(lambda: np.zeros(len(FIELDS)))
    )
    facts = {
        "patterns": {name: str(pattern) for name, pattern in named.items()},
        "against": str(base),
        "data": digest_of(batches),
        **conditions.to_json(),
        **subject.facts,
    }
    names = subject.names(named)
    check = partial(check_entry, batches=batches, names=names)
    with ExitStack() as stack:
        run = None
        if out is not None:
            run = stack.enter_context(open_together(subject.world, Path(out), facts, check))
        kept = Kept(run)
        subject.fill(kept, batches, base, named, progress=progress)
    for number, batch in enumerate(batches):
        for name in names:
            for key, value in kept.of(number, name, batch):
                sums[name][key] += value
    places: list[Where] = [ALL, *sorted({b.domain for b in batches})]
    if len({b.domain for b in asked}) > 1:
        places.append(ALL_RETRIEVAL)
    places += [(i / BUCKETS, (i + 1) / BUCKETS) for i in range(BUCKETS)]
    lengths = sorted({int(b.ids.shape[1]) for b in batches})
    measured = [
        measure(
            name,
            pattern,
            where,
            length,
            sums[name],
            same=pattern == base and not subject.has_delta,
            noise=noise_at(sums[TWIN], where, length) if subject.twins else None,
        )
        for name, pattern in named.items()
        for length in lengths
        for where in places
        if by_document(sums[name], where, length)[:, TOKENS].sum()
    ]
    first = min(conditions.lengths)
    return Evidence(
        tuple(m for m in measured if isinstance(m.where, str)),
        tuple(m for m in measured if not isinstance(m.where, str)),
        base,
        conditions.path,
        conditions,
        subject.blind_loss,
        noise=noise_at(sums[TWIN], ALL, first) if subject.twins else None,
        noise_kl=mean_kl(by_document(sums[TWIN], ALL, first)) if subject.twins else None,
        facts=subject.facts,
        notes=subject.notes,
        shares={
            n: tuple(share_of([b for b in text if b.ids.shape[1] == n], size) for size in shares)
            for n in conditions.lengths
        },
        retrieval=retrieval,
    )


def _about_retrieval(batches: Sequence[Batch], shares: Mapping[int, Share]) -> dict[str, Any]:
    """Say what the retrieval sequences of an evaluation are."""
    return {
        "kinds": list(dict.fromkeys(b.domain.removeprefix(DOMAIN) for b in batches)),
        "lengths": sorted({int(b.ids.shape[1]) for b in batches}),
        "sequences": sum(len(b.units) for b in batches),
        "answers": sum(len(spans) for b in batches for spans in b.answers),
        "digest": digest_of(batches),
        "sparsity": [share.to_json() for share in shares.values()],
    }


def _named(
    patterns: Pattern | str | Mapping[str, Pattern | str] | Sequence[Pattern | str],
) -> dict[str, Pattern]:
    if isinstance(patterns, (Pattern, str)):
        patterns = [patterns]
    if not isinstance(patterns, Mapping):
        patterns = {str(p): p for p in patterns}
    if not patterns:
        raise ValueError("There is no pattern to evaluate.")
    return {name: Pattern.of(p) for name, p in patterns.items()}


def _note_near_copies(batches: Sequence[Batch]) -> None:
    """Log how many documents are near copies of others: the interval takes them as independent."""
    groups = document_groups([b for b in batches if not b.answers])
    copies = len(groups) - len(set(groups.values()))
    if copies:
        logger.warning(
            "%d of %d documents share half of their passages or more with another one; forms and "
            "revisions of one text are not independent, so intervals are too narrow and a verdict "
            "says less; give other documents in their place.",
            copies,
            len(groups),
        )
