"""Measure how much attention a selection keeps, and run a model with an oracle's selections.

Under a pattern, an F layer and the S layers behind it attend over one set of k tokens. The oracle
takes, for each query, the k keys with the largest mean dense attention of these layers: the target
of L_multi, without an indexer in between. Its loss under a pattern less its loss under all F is
what sharing costs where selections are as good as that target. This is a reference and no bound,
since attention is not loss, and other weights of the layers make another target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from indexcache.distilling.checks import check_model
from indexcache.distilling.forward import DistillForward, attention_replaced, run_decoder
from indexcache.distilling.indexers import trainable_indexers
from indexcache.distilling.loss import attention_kept, mean_attention
from indexcache.distilling.rows import Row
from indexcache.models.family import AnyModel, DsaModule, module_of
from indexcache.models.mla import Rope
from indexcache.ops import AttentionTarget
from indexcache.pattern import Pattern


@torch.no_grad()
def measure_kept(model: AnyModel, pattern: Pattern | str, rows: Sequence[Row]) -> list[float]:
    """Measure how much of its dense attention (heads averaged) each layer's selection keeps.

    An S layer has its source's selection. An R layer is measured over all keys, not its pool.

    Returns:
        For each layer the mean share of the attention that lies on its selection under `pattern`,
        over the queries that see more than k tokens.

    Raises:
        ValueError: see `check_model`; or no query sees more than k tokens.
    """
    module = module_of(model)
    pattern = Pattern.of(pattern)
    check_model(module, pattern, max(len(row.ids) for row in rows))
    weight = module.get_input_embeddings().weight
    measure = _Measure(module, pattern, trainable_indexers(module, pattern, weight.dtype))
    with attention_replaced(module, measure):
        for row in rows:
            with measure.row(row, collect=True):
                run_decoder(module, row, weight.device)
    if not measure.queries:
        raise ValueError(
            f"No query of these rows sees more than k = {measure.topk} tokens of its document."
        )
    return (measure.kept / measure.queries).tolist()


@torch.no_grad()
def oracle_states(model: AnyModel, pattern: Pattern | str, row: Row) -> Tensor:
    """Run one row with the oracle's selection for every group of layers that shares one.

    Returns:
        The final hidden states [1, T, E].

    Raises:
        ValueError: see `check_model`; or a pattern with R layers, whose selections are their own.
    """
    module = module_of(model)
    pattern = Pattern.of(pattern)
    if "R" in pattern.roles:
        raise ValueError(
            f"The oracle selects for layers that share a selection; in {pattern} R layers select "
            "for themselves."
        )
    check_model(module, pattern, len(row.ids))
    weight = module.get_input_embeddings().weight
    oracle = _Oracle(module, pattern)
    with attention_replaced(module, oracle), oracle.row(row, collect=True):
        run_decoder(module, row, weight.device)
        oracle.collecting = False
        oracle.sparse = True
        return run_decoder(module, row, weight.device)


class _Measure(DistillForward):
    """A dense pass that compares every layer's attention with its indexer's top k."""

    def __init__(self, model: DsaModule, pattern: Pattern, indexers: nn.ModuleDict):
        super().__init__(model, pattern, indexers, sparse=False)
        self.kept = torch.zeros(len(pattern), dtype=torch.float64)
        self.queries = 0

    def add_target(self, layer: int, target: AttentionTarget) -> None:
        q, k, w = (x[0].detach() for x in self._projected[self.owner[layer]])
        for a, b in self.cuts:
            if b - a > self.topk:
                kept = attention_kept(q[a:b], k[a:b], w[a:b], target.cut(a, b), self.topk)
                # The first k queries keep all that they see and do not count.
                self.kept[layer] += float(kept) - self.topk
                self.queries += (b - a - self.topk) if layer == 0 else 0


class _Oracle(DistillForward):
    """A dense pass that stores each group's selection, then a sparse one over these selections.

    No indexer takes part.
    """

    def __init__(self, model: DsaModule, pattern: Pattern):
        super().__init__(model, pattern, nn.ModuleDict(), sparse=False)

    def run_indexer(self, layer: int, x: Tensor, q_latent: Tensor, rope: Rope) -> None:
        pass

    def _finish_group(self, owner: int, targets: list[AttentionTarget]) -> None:
        self._selected[owner] = [
            self._best_keys([target.cut(a, b) for target in targets])[None] for a, b in self.cuts
        ]

    def _best_keys(self, targets: Sequence[AttentionTarget]) -> Tensor:
        """Return the best keys of one document: int32 [S, k], ascending, -1 for none."""
        q = targets[0].q_SHn
        length = len(q)
        ids = torch.full((length, self.topk), -1, dtype=torch.int32, device=q.device)
        for rows, p_tN in mean_attention(targets):
            best = p_tN.topk(min(self.topk, p_tN.shape[1]), -1).indices
            positions = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
            best.masked_fill_(best > positions, length)
            best = best.sort(-1).values.int()
            ids[rows, : best.shape[1]] = best.masked_fill_(best == length, -1)
        return ids
