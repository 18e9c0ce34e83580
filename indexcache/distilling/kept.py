"""How much of each layer's attention the selections keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from indexcache.distilling.forward import Lesson, run_decoder, teaching
from indexcache.distilling.indexers import trainable_indexers
from indexcache.distilling.loss import attention_kept
from indexcache.distilling.rows import Row
from indexcache.distilling.settings import check_model
from indexcache.ops import AttentionTarget
from indexcache.pattern import Pattern


class _Measure(Lesson):
    """A pass with dense attention in which nothing learns: every layer's attention is compared with its selector's top-k."""

    def __init__(self, model: nn.Module, pattern: Pattern, students: nn.ModuleDict):
        super().__init__(model, pattern, students, sparse=False)
        self.kept = torch.zeros(len(pattern), dtype=torch.float64)
        self.queries = 0

    def teach(self, layer: int, teacher: AttentionTarget) -> None:
        q, k, w = (x[0].detach() for x in self._projected[self.owner[layer]])
        for a, b in self.cuts:
            if b - a > self.topk:
                kept = attention_kept(q[a:b], k[a:b], w[a:b], teacher.cut(a, b), self.topk)
                self.kept[layer] += (
                    float(kept) - self.topk
                )  # the first k queries keep all that they see
                self.queries += (b - a - self.topk) if layer == 0 else 0


@torch.no_grad()
def measure_kept(model: nn.Module, pattern: Pattern | str, rows: Sequence[Row]) -> list[float]:
    """The mean share of each layer's dense attention (heads averaged) that lies on its selection under `pattern`, over the queries that
    see more than k tokens; an S layer has its source's selection, an R layer is measured over all keys, not its pool.

    Raises:
        ValueError: as `check_model`; no query that sees more than k tokens.
    """
    pattern = Pattern.of(pattern)
    check_model(model, pattern, max(len(row.ids) for row in rows))
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator, union-attr, assignment]
    measure = _Measure(model, pattern, trainable_indexers(model, pattern, weight.dtype))
    with teaching(model, measure):
        for row in rows:
            with measure.row(row, learn=True):
                run_decoder(model, row, weight.device)
    if not measure.queries:
        raise ValueError(
            f"No query of these rows sees more than k = {measure.topk} tokens of its document."
        )
    return (measure.kept / measure.queries).tolist()
