"""Test gradients under a pattern when the backward pass runs layers again."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from indexcache import accelerate, use_pattern
from indexcache.models.family import indexers
from indexcache.models.seam import Seam
from tests.support import FAMILIES, make_model, refused

PATTERNS = ["FSSF", "FRSF@2", "FSRS@2"]


def small(family, **changes):
    """Make a model of four layers, of which the last has experts."""
    return make_model(family, num_hidden_layers=4, first_k_dense_replace=3, **changes)


@pytest.fixture(scope="module", params=FAMILIES)
def four(request):
    return small(request.param)


@pytest.fixture(scope="module")
def texts():
    return torch.randint(0, 128, (3, 2, 24), generator=torch.Generator().manual_seed(3)).unbind()


@contextlib.contextmanager
def checkpointing(model, reentrant):
    """Let transformers checkpoint every layer; `reentrant` None does nothing."""
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    try:
        yield
    finally:
        if reentrant is not None:
            model.gradient_checkpointing_disable()
        if reentrant:
            model.disable_input_require_grads()
        model.eval()


def loss_of(model, text):
    return model(text, labels=text, use_cache=False).loss


def gradients(model, backward):
    """Return all gradients after `backward()`, as one vector."""
    model.zero_grad()
    backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(found).double()


def same(a, b):
    return float((a - b).norm() / b.norm()) < 1e-6


def plain(model, pattern, text):
    def backward():
        with use_pattern(model, pattern):
            loss_of(model, text).backward()

    with checkpointing(model, None):
        return gradients(model, backward)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_checkpointed_gradients_are_those_without(four, texts, pattern, reentrant):
    expected = plain(four, pattern, texts[0])

    def inside():
        with use_pattern(four, pattern):
            loss_of(four, texts[0]).backward()

    def after():
        with use_pattern(four, pattern):
            loss = loss_of(four, texts[0])
        loss.backward()

    def within_another():
        with use_pattern(four, pattern):
            loss = loss_of(four, texts[0])
        with use_pattern(four, "FFSS"):
            loss_of(four, texts[1])
            loss.backward()

    def in_another_thread():  # As autograd does on a GPU.
        with use_pattern(four, pattern):
            loss = loss_of(four, texts[0])
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()

    with checkpointing(four, reentrant):
        for backward in (inside, after, within_another, in_another_thread):
            assert same(gradients(four, backward), expected), backward.__name__
    gc.collect()
    assert all("forward" not in m.__dict__ for m in (four.model, *indexers(four)))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kept", ["mm", "bmm", "topk"])
def test_selective_checkpointing(four, texts, pattern, kept):
    """The outputs kept of an operation are given out in order, also those of indexers."""
    expected = plain(four, pattern, texts[0])

    def contexts():
        return create_selective_checkpoint_contexts([getattr(torch.ops.aten, kept).default])

    def backward():
        with use_pattern(four, pattern):
            loss_of(four, texts[0]).backward()

    four.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    four.train()
    try:
        assert same(gradients(four, backward), expected)
    finally:
        four.gradient_checkpointing_disable()
        four.eval()


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_passes_before_one_backward(four, texts, reentrant):
    """As in contrastive losses and preference training: also with a pattern each, and stock."""
    cases = list(zip(["FSSF", "FRSF@2", None], texts, strict=True))

    def run(text, pattern):
        with use_pattern(four, pattern) if pattern else contextlib.nullcontext():
            return loss_of(four, text)

    def together():
        sum(w * run(text, p) for w, (p, text) in enumerate(cases, 1)).backward()

    with checkpointing(four, None):
        expected = gradients(four, together)
    with checkpointing(four, reentrant):
        assert same(gradients(four, together), expected)

        def nested():
            with use_pattern(four, "FSSF"):
                a = run(texts[0], None)
                with use_pattern(four, "FRSF@2"):
                    b = run(texts[1], None)
            (a + 2 * b + 3 * run(texts[2], None)).backward()

        assert same(gradients(four, nested), expected)


def test_stock_passes_stay_stock(four, texts):
    """A pass before the context, whose backward pass comes inside of it."""
    with checkpointing(four, None):
        expected = gradients(four, lambda: loss_of(four, texts[0]).backward())

    def backward():
        loss = loss_of(four, texts[0])
        with use_pattern(four, "FSSS"):
            loss.backward()

    for reentrant in (True, False):
        with checkpointing(four, reentrant):
            assert same(gradients(four, backward), expected)


def by_hand(model, text, ranges, reentrant, rope_inside=False, whole=False):
    """Run the layers, each range of them in one checkpoint."""
    decoder = model.model
    x = decoder.embed_tokens(text)
    positions = torch.arange(text.shape[1])[None]
    mask = torch.full((text.shape[1],) * 2, torch.finfo(x.dtype).min).triu(1)[None, None]
    rope = decoder.rotary_emb(x, position_ids=positions)

    def run(layers):
        def forward(x):
            own = decoder.rotary_emb(x, position_ids=positions) if rope_inside else rope
            ids = None
            for layer in layers:
                extra = {} if ids is None else {"prev_topk_indices": ids}
                out = layer(
                    x, attention_mask=mask, position_ids=positions, position_embeddings=own, **extra
                )
                x, ids = out if isinstance(out, tuple) else (out, None)
            return x

        return forward

    for a, b in ranges:
        x = checkpoint(run(decoder.layers[a:b]), x, use_reentrant=reentrant)
    logits = model.lm_head(decoder.norm(x))[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, text[:, 1:].flatten())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rope_inside", [True, False])
@pytest.mark.parametrize("ranges", [[(0, 4)], [(0, 1), (1, 2), (2, 4)]])
def test_layers_checkpointed_by_hand(four, texts, ranges, rope_inside, reentrant):
    expected = plain(four, "FRSS@2", texts[0])

    def backward():
        with use_pattern(four, "FRSS@2"):
            loss = by_hand(four, texts[0], ranges, reentrant, rope_inside)
            other = by_hand(four, texts[0], ranges, reentrant, rope_inside)
        (0.25 * loss + 0.75 * other).backward()

    assert same(gradients(four, backward), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_whole_model_in_a_checkpoint(four, texts, reentrant):
    expected = plain(four, "FSRF@2", texts[0])

    def whole(embedded):
        return four(inputs_embeds=embedded, labels=texts[0], use_cache=False).loss

    def backward(inner=None):
        with use_pattern(four, "FSRF@2"), checkpointing(four, inner):
            loss = checkpoint(whole, four.get_input_embeddings()(texts[0]), use_reentrant=reentrant)
            if inner is not None:  # Layers are checkpointed as well.
                loss.backward()
                return
        loss.backward()

    assert same(gradients(four, backward), expected)
    assert same(gradients(four, lambda: backward(inner=False)), expected)


def test_accumulation_and_kept_graphs(four, texts):
    expected = sum(plain(four, "FSSF", text) for text in texts) + plain(four, "FSSF", texts[0])

    def backward():
        with use_pattern(four, "FSSF"):
            for text in texts:
                loss = loss_of(four, text)
                if text is texts[0]:
                    loss.backward(retain_graph=True)
                loss.backward()

    for reentrant in (True, False):
        with checkpointing(four, reentrant):
            assert same(gradients(four, backward), expected)


def test_selections_go_with_the_graph(four, texts, monkeypatch):
    """A pass that nobody differentiates keeps none; one that is, no longer than its graph."""

    made: list[weakref.ref] = []
    answer = Seam.answer

    def seen(*args):
        result = answer(*args)
        made.append(weakref.ref(result[0]))
        return result

    monkeypatch.setattr(Seam, "answer", seen)

    def alive():
        gc.collect()
        return sum(ref() is not None for ref in made)

    before = 0
    with use_pattern(four, "FRSS@2"):
        for grad in (False, True):  # Without checkpoints a graph keeps none either.
            with torch.set_grad_enabled(grad):
                loss = loss_of(four, texts[0])
            assert len(made) == 4 * (grad + 1) and alive() == before
        with checkpointing(four, False):
            loss = loss_of(four, texts[0])
            assert alive() > before
            loss.backward()
            assert alive() == before
            loss = loss_of(four, texts[0])
            assert alive() > before
            del loss
            assert alive() == before
    four.zero_grad()


def test_accelerate_waits_for_the_backward_pass(four, texts):
    with checkpointing(four, False), use_pattern(four, "FSSF"):
        loss = loss_of(four, texts[0])
    refused(lambda: accelerate(four), "backward")
    del loss
    accelerate(four).undo()


@pytest.mark.parametrize("reentrant", [True, False])
def test_accelerate_does_not_wait_for_a_loss_that_is_held(four, texts, reentrant):
    """Training loops hold the last loss while they evaluate."""
    with checkpointing(four, reentrant):
        with use_pattern(four, "FSSF"):
            loss = loss_of(four, texts[0])
        loss.backward(retain_graph=True)
        refused(lambda: accelerate(four), "backward")
        loss.backward()
        four.zero_grad()
    accelerate(four).undo()
    assert all("forward" not in m.__dict__ for m in (four.model, *indexers(four)))
    assert loss.grad_fn is not None


def test_an_unknown_recomputation_is_refused(four, texts):
    """A backward hook that calls a layer again cannot be told from a recomputation."""
    errors = []

    def hook(gradient):
        for run in (lambda: by_hand(four, texts[0], [(0, 4)], True), lambda: four(texts[0])):
            try:
                with torch.no_grad():
                    run()
            except ValueError as error:
                errors.append(str(error))

    with use_pattern(four, "FSSF"):
        x = torch.ones(1, requires_grad=True)
        y = x * 2
        y.register_hook(hook)
        y.sum().backward()
    assert len(errors) == 2 and all("backward pass" in e for e in errors)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_of_the_packaged_model(tiny, reentrant):
    model = copy.deepcopy(tiny.module)
    text = torch.randint(0, 512, (1, 96), generator=torch.Generator().manual_seed(4))
    pattern = "FSRSSFRSSSFS@2"
    expected = plain(model, pattern, text)

    def backward():
        with use_pattern(model, pattern):
            loss = loss_of(model, text)
        loss.backward()

    with checkpointing(model, reentrant):
        assert same(gradients(model, backward), expected)
