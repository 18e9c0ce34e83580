"""What sharing itself costs, apart from the indexers: a model whose layers share the selection that an oracle makes for them.

Under a pattern, an F layer and the S layers behind it attend over one set of k tokens. The oracle takes, for each query, the k keys
that the mean of these layers' dense attention gives most: the target of L_multi (method.md, section 4), selected from without an
indexer in between. Its loss under a pattern less its loss under all F is what sharing costs where selections are as good as that
target; it is a reference and no bound, since attention is not loss, and other weights of the layers make another target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from indexcache.distilling.forward import Lesson, run_decoder, teaching
from indexcache.distilling.loss import mean_attention
from indexcache.distilling.rows import Row
from indexcache.distilling.settings import check_model
from indexcache.ops import AttentionTarget
from indexcache.pattern import Pattern


class _Oracle(Lesson):
    """A dense pass that keeps each group's selection, then a sparse one over these. No indexer takes part."""

    def __init__(self, model: nn.Module, pattern: Pattern):
        super().__init__(model, pattern, nn.ModuleDict(), sparse=False)

    def index(self, *_: Any) -> None:
        pass

    def _learn(self, owner: int, teachers: Sequence[AttentionTarget]) -> None:
        self._selected[owner] = [
            self._choose([t.cut(a, b) for t in teachers])[None] for a, b in self.cuts
        ]

    def _choose(self, teachers: Sequence[AttentionTarget]) -> Tensor:
        """int32 [S, k] of one document, ascending, -1 for none."""
        length = len(teachers[0].q_SHn)
        ids = torch.full(
            (length, self.topk), -1, dtype=torch.int32, device=teachers[0].q_SHn.device
        )
        for rows, p_tN in mean_attention(teachers):
            best = p_tN.topk(min(self.topk, p_tN.shape[1]), -1)
            found = best.indices.masked_fill_(
                best.indices > torch.arange(rows.start, rows.stop, device=ids.device)[:, None],
                length,
            )
            found = found.sort(-1).values.int()
            ids[rows, : found.shape[1]] = found.masked_fill_(found == length, -1)
        return ids


@torch.no_grad()
def oracle_states(model: nn.Module, pattern: Pattern | str, row: Row) -> Tensor:
    """Final hidden states [1, T, E] of one row where the oracle selects for every group of layers that shares a selection.

    Raises:
        ValueError: as `check_model`; a pattern with R layers, whose selections are their own.
    """
    pattern = Pattern.of(pattern)
    if "R" in pattern.roles:
        raise ValueError(
            f"The oracle selects for layers that share a selection; in {pattern} R layers select for themselves."
        )
    check_model(model, pattern, len(row.ids))
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator, union-attr, assignment]
    oracle = _Oracle(model, pattern)
    with teaching(model, oracle), oracle.row(row, learn=True):
        run_decoder(model, row, weight.device)
        oracle.learning, oracle.sparse = False, True
        return run_decoder(model, row, weight.device)
