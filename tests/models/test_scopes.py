"""Test which pattern is in force where several are open: threads, tasks, generators."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from indexcache import Pattern, accelerate, use_pattern
from indexcache.models.prefix import PrefixCache
from tests.support import FAMILIES, logits, make_model, refused

FOUR = ["FSSF", "FFSS", "FRRF@2", "FFFF", "FSRS@2", "FSSS", "FFFS", "FRFF@3"]


@pytest.fixture(scope="module", params=FAMILIES)
def four(request):
    return make_model(request.param, num_hidden_layers=4, first_k_dense_replace=3)


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, 128, (1, 40), generator=torch.Generator().manual_seed(3))


def under(model, pattern, text):
    with use_pattern(model, pattern):
        return logits(model, text)


def clean(model):
    """Return whether nothing of the package is on a model."""
    if model.model._forward_pre_hooks:  # A cache of an earlier test may keep the guard in place.
        gc.collect()
        logits(model, torch.zeros(1, 1, dtype=torch.int64))
    names = {"forward", "save_pretrained", "__getstate__"}
    touched = any(names & set(m.__dict__) for m in model.modules())
    return not touched and not model.model._forward_pre_hooks


def in_threads(count, work):
    """Run work(i) in threads that begin together; return their results."""
    start = threading.Barrier(count)

    def run(i):
        start.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("fast", [False, True])
def test_threads_with_patterns_of_their_own(four, text, count, fast):
    with accelerate(four, index_dtype="fp8") if fast else contextlib.nullcontext():
        expected = [under(four, pattern, text) for pattern in FOUR]
        entered = threading.Barrier(count)

        def work(i):
            right = []
            for _ in range(3):
                with use_pattern(four, FOUR[i]):
                    entered.wait(60)  # All patterns are open now.
                    right += [torch.equal(logits(four, text), expected[i]) for _ in range(2)]
            return right

        assert all(all(results) for results in in_threads(count, work))
    assert clean(four)


def test_threads_that_share_the_pattern_of_the_main_thread(four, text):
    expected = under(four, "FSSF", text)
    with use_pattern(four, "FSSF"):
        got = in_threads(4, lambda i: [logits(four, text) for _ in range(4)])
        # A pattern of its own goes before the one of the main thread.
        own = in_threads(2, lambda i: under(four, FOUR[i + 1], text))
    assert all(torch.equal(x, expected) for xs in got for x in xs)
    assert [torch.equal(x, under(four, p, text)) for x, p in zip(own, FOUR[1:3], strict=True)]
    assert clean(four)


def test_a_thread_without_a_pattern_beside_one_with(four, text):
    """Who means the model as it is says so; who says nothing is refused, and nothing is wrong."""
    stock = logits(four, text)
    entered, done = threading.Event(), threading.Event()

    def other():
        with use_pattern(four, "FSSS"):
            entered.set()
            done.wait(20)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(20)
    refused(lambda: logits(four, text), "Another thread", "use_pattern")
    assert torch.equal(under(four, "FFFF", text), stock)
    refused(lambda: accelerate(four), "use_pattern")
    done.set()
    thread.join()
    assert torch.equal(logits(four, text), stock)
    assert clean(four)


def test_training_in_threads(four, text):
    """Gradients of the input in two threads, each with a pattern and checkpoints of its own."""

    def work(i):
        with use_pattern(four, FOUR[i]):
            x = four.get_input_embeddings()(text).detach().requires_grad_()
            loss = four(inputs_embeds=x, labels=text, use_cache=False).loss
            return torch.autograd.grad(loss, x)[0]

    expected = [work(i) for i in range(2)]
    four.train()
    four.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        got = in_threads(2, work)
    finally:
        four.gradient_checkpointing_disable()
        four.eval()
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(got, expected, strict=True))


def test_prefix_reuse_in_threads(four, text):
    """Two searches on one model: each reuses its own layers."""
    patterns = ["FSSF", "FSFF", "FFSF", "FFFS"]

    def work(i):
        cache = PrefixCache(four, [text + i])
        cache.rebase(Pattern("FFFF"))
        return [cache.hidden(0, Pattern(p)) for p in patterns for _ in range(3)]

    expected = [work(i) for i in range(2)]
    for got, right in zip(in_threads(2, work), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))
    assert clean(four)


def test_contexts_left_in_another_order(four, text):
    stock = logits(four, text)
    outer, inner = use_pattern(four, "FSSS"), use_pattern(four, "FFSS")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert torch.equal(logits(four, text), under(four, "FFSS", text))
    inner.__exit__(None, None, None)
    assert torch.equal(logits(four, text), stock)
    assert clean(four)
    # One that another thread leaves.
    stack = contextlib.ExitStack()
    stack.enter_context(use_pattern(four, "FSSS"))
    thread = threading.Thread(target=stack.close)
    thread.start()
    thread.join()
    assert torch.equal(logits(four, text), stock)
    assert clean(four)


def generator(model, pattern, text):
    with use_pattern(model, pattern):
        while True:
            yield logits(model, text)


def test_generators(four, text):
    stock = logits(four, text)
    a = generator(four, "FSSS", text)
    right = next(a)
    assert torch.equal(right, under(four, "FSSS", text))
    b = generator(four, "FFSS", text)
    assert torch.equal(next(b), under(four, "FFSS", text))
    # Each means its own, the one entered last is in force: that is refused in the other.
    refused(lambda: next(a), "FSSS", "FFSS", "take turns")
    b.close()
    assert torch.equal(logits(four, text), stock)  # The refusal has ended the generator.
    c = generator(four, "FSSS", text)
    assert torch.equal(next(c), right)
    del c
    gc.collect()
    assert torch.equal(logits(four, text), stock)
    assert clean(four)


def test_helpers_that_are_generators(four, text):
    """A context manager around ours nests like ours, though its function is suspended."""

    @contextlib.contextmanager
    def helper(pattern):
        with use_pattern(four, pattern):
            yield

    with use_pattern(four, "FSSS"):
        with helper("FFSS"):
            assert torch.equal(logits(four, text), under(four, "FFSS", text))
        with contextlib.ExitStack() as stack:
            stack.enter_context(helper("FFFS"))
            stack.enter_context(use_pattern(four, "FFSS"))
            assert torch.equal(logits(four, text), under(four, "FFSS", text))
    assert clean(four)


def test_tasks_take_turns(four, text):
    """Tasks of one thread: with a pattern each, with that of their parent, with none."""
    expected = {p: under(four, p, text) for p in FOUR}

    async def run(pattern):
        right = []
        with use_pattern(four, pattern):
            for _ in range(3):
                await asyncio.sleep(0)
                right.append(torch.equal(logits(four, text), expected[pattern]))
            threaded = await asyncio.to_thread(logits, four, text)
        return all(right) and torch.equal(threaded, expected[pattern])

    async def child(pattern):
        await asyncio.sleep(0)
        return torch.equal(logits(four, text), expected[pattern])

    async def main():
        assert all(await asyncio.gather(*map(run, FOUR)))
        with use_pattern(four, "FSSS"):
            late = asyncio.create_task(child("FFFF"))
            assert await asyncio.create_task(child("FSSS"))
            waiting = asyncio.create_task(child("FFFF"))
            await asyncio.sleep(0)
        # The parent has left: its pattern holds for nobody any more.
        return await waiting, late

    async def beside():
        stop = asyncio.Event()

        async def holder():
            with use_pattern(four, "FSSS"):
                await stop.wait()

        held = asyncio.create_task(holder())
        await asyncio.sleep(0)
        refused(lambda: logits(four, text), "task", "use_pattern")
        stop.set()
        await held
        return torch.equal(logits(four, text), expected["FFFF"])

    assert asyncio.run(beside())
    waiting, _ = asyncio.run(main())
    assert waiting
    assert clean(four)


def test_undo_of_accelerate_between_patterns(four, text):
    stock = logits(four, text)
    fast = accelerate(four)
    context = use_pattern(four, "FSSS")
    context.__enter__()
    refused(fast.undo, "Leave use_pattern")
    context.__exit__(None, None, None)
    fast.undo()
    assert torch.equal(logits(four, text), stock)
    assert clean(four)


def test_forwards_of_other_libraries_stay(four, text):
    """A wrapper that was put over ours works after the context, and is not removed."""
    layer = four.model.layers[1].self_attn.indexer
    calls = []
    with use_pattern(four, "FSSF"):
        forward = layer.forward

        def wrapper(*args, **kwargs):
            calls.append(1)
            return forward(*args, **kwargs)

        layer.forward = wrapper
        logits(four, text)
    try:
        assert len(calls) == 1
        stock = logits(four, text)
        assert len(calls) == 2
        assert layer.forward is wrapper
        with use_pattern(four, "FRSF@2"):
            wrapped = logits(four, text)
        with use_pattern(four, "FSSF"):
            logits(four, text)
    finally:
        layer.__dict__.pop("forward", None)
        layer.__dict__.pop("__getstate__", None)
    assert torch.equal(logits(four, text), stock)
    assert torch.equal(under(four, "FRSF@2", text), wrapped)


def test_a_model_that_is_distilled_in_another_thread(four, text):
    from indexcache.distilling.forward import DistillForward, attention_replaced
    from indexcache.distilling.indexers import trainable_indexers

    pattern = Pattern("FSSF")
    indexers = trainable_indexers(four, pattern, torch.float32)
    forward = DistillForward(four, pattern, indexers, sparse=False)
    with attention_replaced(four, forward):
        refused(lambda: in_threads(1, lambda _: logits(four, text)), "distilled in another thread")
    assert clean(four)
