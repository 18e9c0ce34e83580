"""Lead each call of an indexer to the pattern of its forward pass.

While a pattern is open on a model, in any thread, the forwards of the decoder and of the indexers
are replaced by those made here. The decoder's begins a pass under the pattern in force for its
caller. An indexer's finds the pass that it runs in: the one under way in its thread; in a
recomputation the one that the checkpointed region has recorded; else, where layers are called
without the decoder, one of its pattern's own. All else is as if nothing had been replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from indexcache.models.family import AnyModel, decoder_of, indexers
from indexcache.models.guard import cache_of, refuse_guarded
from indexcache.models.passes import Pass, pop, push, record_of, recording, running
from indexcache.models.patch import LOCK, ModelState, Replaced, keep_clean
from indexcache.models.regions import in_backward, regions
from indexcache.models.scopes import seam_here
from indexcache.models.selector import IndexerCall, indexer_forward

COPIED = (
    "A model was copied or pickled while a pattern is in force on it: the copy has none, so enter "
    "use_pattern on the copy as well."
)


def route(model: AnyModel, state: ModelState) -> None:
    """Put the router in place, over everything else that has replaced these forwards."""
    decoder, found = decoder_of(model), indexers(model)
    modules = [m for m in found if m is not None]
    if state.router and all(state.router.holds(m) for m in (decoder, *modules)):
        return
    state.router.undo()
    state.router.wrap(decoder, partial(_decoder, state, found))
    keep_clean(decoder).note = lambda: COPIED if state.patterns else None
    for layer, indexer in enumerate(found):
        if indexer is not None:  # Else it is natively shared: stock passes ids on, as S does.
            state.router.wrap(indexer, partial(_indexer, state, layer, indexer))


def _decoder(state: ModelState, routed: list[Any], node: Replaced) -> Callable[..., Any]:
    """Make the forward of the decoder, whose layers have these indexers."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        _check_indexers(node.module(), routed)
        return run_decoder(state, node, args, kwargs)

    return forward


NOT_TRACED = (
    "A pattern's bookkeeping cannot be traced into one graph (fullgraph=True, torch.export); use "
    "torch.compile without fullgraph."
)


def run_decoder(state: ModelState, node: Replaced, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a forward pass of the decoder."""
    with LOCK:
        state.running += 1
    try:
        push(state, _begin(state, cache_of(args, kwargs)))
        try:
            return node.below(*args, **kwargs)
        finally:
            pop()
    finally:
        with LOCK:
            state.running -= 1
        state.settle()


_RUN_DECODER = run_decoder.__code__


@torch.compiler.disable(reason=NOT_TRACED)
def _check_indexers(decoder: Any, routed: list[Any]) -> None:
    """Refuse a model whose indexers were replaced meanwhile: their calls would not come here."""
    for i, (now, before) in enumerate(zip(indexers(decoder), routed, strict=False)):
        if now is not before:
            raise ValueError(
                f"The indexer of layer {i} was replaced while a pattern is open on this model "
                "(adapters do that); enter use_pattern after such changes."
            )


@torch.compiler.disable(reason=NOT_TRACED)
def _begin(state: ModelState, cache: Any) -> Pass:
    """Begin a pass under the pattern in force here, or that of the pass that is recomputed."""
    watched = torch.is_grad_enabled() or in_backward()
    around = regions()
    again = next((region for region in around if region.again), None)
    if again is not None:
        record = record_of(again, state)
        # What was not recorded ran before there was a pattern.
        seam = None if record is None else record.next_pass()
    elif in_backward():
        raise ValueError(
            "A backward pass runs this model again in a way that is not known here, so the pattern "
            "cannot be the one of its forward pass; use torch.utils.checkpoint."
        )
    else:
        seam = seam_here(state)
    for region in around:
        if region is again:
            break
        recording(region, state, seam).begun.append(seam)
    if seam is None:
        refuse_guarded(state, cache)
        return Pass(None, watched)
    seam.check_cache(cache)
    return seam.begin(watched)


def _indexer(state: ModelState, layer: int, indexer: Any, node: Replaced) -> Callable[..., Any]:
    """Make the forward of an indexer."""
    return indexer_forward(layer, indexer, partial(_answer, state, node), node)


@torch.compiler.disable(reason=NOT_TRACED)
def _answer(state: ModelState, node: Replaced, call: IndexerCall) -> Any:
    one = running(state)
    if one is not None and not one.watched:
        return _run(node, one, call)[0]
    inside = regions(_RUN_DECODER, state)
    for i, region in enumerate(inside):
        if region.again:
            record = record_of(region, state)
            seam, selection = (None, None) if record is None else record.next_call(call.layer)
            for outer in inside[:i]:
                calls = recording(outer, state, seam).calls
                calls.setdefault(call.layer, []).append((seam, selection))
            return _stock(node, call) if seam is None else seam.answer_again(call, selection)
    if one is None:
        if in_backward():
            raise ValueError(
                f"A backward pass runs layer {call.layer} again in a way that is not known here, "
                "so its selection cannot be found; use torch.utils.checkpoint."
            )
        seam = seam_here(state)
        one = Pass(None, watched=True) if seam is None else seam.by_hand(call)
    answer, selection = _run(node, one, call)
    for region in inside:
        calls = recording(region, state, one.seam).calls
        calls.setdefault(call.layer, []).append((one.seam, selection))
    return answer


def _run(node: Replaced, one: Pass, call: IndexerCall) -> tuple[Any, Any]:
    return (_stock(node, call), None) if one.seam is None else one.seam.answer(one, call)


def _stock(node: Replaced, call: IndexerCall) -> Any:
    """Run what there is without a pattern: the stock indexer, or the fast path's."""
    return node.below(call.x, call.q_latent, call.rope, call.mask, call.positions, call.cache)
