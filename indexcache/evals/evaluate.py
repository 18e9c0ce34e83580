"""Evidence that a pattern is safe: held-out loss and divergence from the full model, paired per token, by document."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indexcache.data import Batch, check_context
from indexcache.evals.statistics import bootstrap_interval
from indexcache.models.family import native_pattern
from indexcache.models.lm import hidden_states, logit_chunks
from indexcache.models.seam import selector_of, use_pattern
from indexcache.pattern import Pattern
from indexcache.progress import progress

BUCKETS = 4  # position buckets, equal parts of the sequence
FIELDS = ("loss", "delta", "kl", "agree", "tokens")


def evaluate(
    model: nn.Module,
    patterns: Mapping[str, Pattern | str] | Sequence[Pattern | str],
    batches: Sequence[Batch],
    *,
    against: Pattern | str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare patterns with the full model, or with another pattern, on the same held-out tokens.

    Args:
        model: a loaded transformers model of a known family.
        patterns: patterns, with a name each when given as a mapping.
        batches: held-out batches (`indexcache.data.make_batches`).
        against: the baseline, a pattern; None is what the model does by itself, all F unless it has layers without an indexer.
        seed: of the bootstrap.

    Returns:
        {"rows": [..], "positions": [..], "baseline": the pattern that every difference is to, "path": "stock" or "fast"}. A row is
        one pattern on one domain ("all": every domain): `pattern`, `name`, `full` (layers that stay full), `domain`, `loss` and
        `delta_loss` (nats per token; delta = pattern minus baseline), `ci_low` and `ci_high` (95 % paired bootstrap over
        documents), `kl` (KL(baseline || pattern), nats per token), `agreement` (share of tokens with the same top-1), `tokens`,
        `documents`. `positions` has the same per quarter of the sequence, over all domains.

    Raises:
        ValueError: sequences too short for k, a pattern the model cannot take, a loss that is not finite.
    """
    given = patterns if isinstance(patterns, Mapping) else {str(p): p for p in patterns}
    named = {name: p if isinstance(p, Pattern) else Pattern(p) for name, p in given.items()}
    if not named:
        raise ValueError("There is no pattern to evaluate.")
    native = native_pattern(model)
    base = (
        native if against is None else against if isinstance(against, Pattern) else Pattern(against)
    )
    for pattern in [base, *named.values()]:
        with use_pattern(model, pattern):
            pass  # refuses what this model cannot take before any work is done
    for batch in batches:
        check_context(batch.ids.shape[1], model.config.index_topk)  # type: ignore[union-attr, arg-type]
    # sums[name][domain, unit, bucket] -> loss, delta, KL, agreement, tokens
    sums: dict[str, dict[tuple[str, str, int], np.ndarray]] = {
        n: defaultdict(lambda: np.zeros(len(FIELDS))) for n in named
    }
    with progress(len(batches) * (len(named) + 1), "pass") as bar:
        for batch in batches:
            full = _hidden(model, base, native, batch)
            bar.update()
            for name, pattern in named.items():
                if (
                    pattern == base and batch is not batches[0]
                ):  # bitwise the same pass, as the first batch has shown
                    hidden = full
                else:
                    with use_pattern(model, pattern):
                        hidden = hidden_states(model, batch.ids)
                    assert pattern != base or torch.equal(hidden, full), (
                        "two passes under one pattern differ"
                    )
                for key, value in _compare(model, full, hidden, batch):
                    sums[name][key] += value
                bar.update()
    rows, positions = [], []
    domains = sorted({b.domain for b in batches})
    for name, pattern in named.items():
        head = {
            "pattern": str(pattern),
            "name": name,
            "full": len(pattern.full_layers),
            "layers": len(pattern),
        }
        for domain in ["all", *domains]:
            chosen = {k: v for k, v in sums[name].items() if domain in ("all", k[0])}
            rows.append(head | {"domain": domain} | _row(chosen, seed))
        for bucket in range(BUCKETS):
            chosen = {k: v for k, v in sums[name].items() if k[2] == bucket}
            positions.append(
                head | {"from": bucket / BUCKETS, "to": (bucket + 1) / BUCKETS} | _row(chosen, seed)
            )
    return {
        "rows": rows,
        "positions": positions,
        "baseline": str(base),
        "path": selector_of(model).path,
    }


def _hidden(model: nn.Module, base: Pattern, native: Pattern, batch: Batch) -> Tensor:
    """Hidden states of the baseline; the model itself, without the seam, where that is the baseline."""
    if base == native:
        return hidden_states(model, batch.ids)
    with use_pattern(model, base):
        return hidden_states(model, batch.ids)


def _compare(model: nn.Module, full: Tensor, hidden: Tensor, batch: Batch):
    """Yield ((domain, unit, bucket), sums of FIELDS) for each sequence and position bucket."""
    length = batch.ids.shape[1]
    fields = torch.zeros(len(FIELDS), len(batch.units), length - 1, dtype=torch.float64)
    for part, (a, b) in logit_chunks(model, full, hidden):
        target = batch.ids[:, part.start + 1 : part.stop + 1].to(a.device)[..., None]
        a, b = F.log_softmax(a, -1), F.log_softmax(b, -1)
        loss_a, loss_b = -a.gather(-1, target)[..., 0], -b.gather(-1, target)[..., 0]
        kl = (a.exp() * (a - b)).sum(-1)
        agree = (a.argmax(-1) == b.argmax(-1)).float()
        values = (loss_b, loss_b.double() - loss_a.double(), kl, agree, torch.ones_like(kl))
        fields[..., part] = torch.stack([v.double() for v in values]).cpu()
    if not math.isfinite(float(fields.sum())):
        raise ValueError(
            "The loss is not finite on this text: the model gives no finite logits (wrong dtype or broken weights?)."
        )
    bucket = torch.arange(length - 1) * BUCKETS // (length - 1)
    for row, unit in enumerate(batch.units):
        for i in range(BUCKETS):
            yield (batch.domain, unit, i), fields[:, row, bucket == i].sum(-1).numpy()


def _row(chosen: Mapping[tuple[str, str, int], np.ndarray], seed: int) -> dict[str, Any]:
    units: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(len(FIELDS)))
    for (domain, unit, _), value in chosen.items():
        units[domain, unit] += value
    table = np.stack([units[k] for k in sorted(units)])
    loss, delta, kl, agree, tokens = table.sum(0)
    low, high = bootstrap_interval(table[:, 1].tolist(), table[:, 4].tolist(), seed=seed)
    return {
        "loss": loss / tokens,
        "delta_loss": delta / tokens,
        "ci_low": low if math.isfinite(low) else None,
        "ci_high": high if math.isfinite(high) else None,
        "kl": kl / tokens,
        "agreement": agree / tokens,
        "tokens": int(tokens),
        "documents": len(table),
    }
