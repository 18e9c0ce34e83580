"""Compare models that are streamed layer by layer with loaded ones, bit for bit."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from indexcache.models.fast.accelerate import accelerate
from indexcache.models.identity import weights_digest
from indexcache.models.lm import hidden_states
from indexcache.models.loading import load
from indexcache.models.seam import use_pattern
from indexcache.models.stream.loading import stream_of
from indexcache.models.stream.run import Variant
from indexcache.models.stream.store import Store
from indexcache.pattern import Pattern
from tests.fp8_support import write_fp8
from tests.support import FAMILIES, refused

PATTERNS = [Pattern(p) for p in ("FFFF", "FSSS", "FSFS", "FRSF@2", "FFRR@3", "FRRS@1/2", "FSFS")]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return write_fp8(tmp_path_factory.mktemp("fp8"), request.param, num_hidden_layers=4)


@pytest.fixture(scope="module")
def deepseek4(tmp_path_factory):
    return write_fp8(tmp_path_factory.mktemp("one"), "deepseek_v32", num_hidden_layers=4)


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 128, shape, generator=generator) for shape in ((2, 60), (1, 37))]


def run(model, **kwargs):
    """Return the final hidden states of every pattern and batch."""
    found = []
    kwargs = {"use": None, "watch": True} | kwargs
    ids = inputs()
    kwargs["use"] = lambda finals: found.extend(
        finals.get(i, b) for i in range(len(PATTERNS)) for b in range(len(ids))
    )
    stream_of(model).run([Variant(p) for p in PATTERNS], ids, **kwargs)
    return found


@pytest.mark.parametrize("fast", [False, True])
def test_a_pass_over_the_layers_gives_the_bits_of_whole_passes(folder, fast, tmp_path):
    loaded, streamed = load(folder), load(folder, stream=True)
    if fast:
        accelerate(loaded)
        accelerate(streamed)
    expected = []
    for pattern in PATTERNS:
        with use_pattern(loaded, pattern):
            expected += [hidden_states(loaded, ids) for ids in inputs()]
    done = []
    stream = stream_of(streamed)
    unbounded = run(streamed, report=done.append)
    wanted = stream.peak
    stream.host_memory, stream.folder, stream.peak = wanted // 3, tmp_path / "out", 0
    spilled = run(streamed)
    assert 0 < stream.peak <= wanted // 3
    assert os.listdir(tmp_path / "out") == []
    for found in (unbounded, spilled):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [d.states for d in done] == [3, 5, 6, 6]  # Equal patterns are one state.
    assert all(p.is_meta for p in streamed.module.model.layers.parameters())


def test_pinned_memory_is_counted_as_it_is_taken(tmp_path, monkeypatch):
    """States of 300 bytes take 512 of a GPU's pinned memory, computed or read again."""
    monkeypatch.setattr(
        Store, "_allocated", lambda self, size: torch.empty(size, dtype=torch.uint8)
    )
    store = Store(torch.device("cpu"), 1100, tmp_path)
    store._gpu = True
    first = [torch.full((300,), i, dtype=torch.uint8) for i in range(4)]
    (tmp_path / "saved").write_bytes(b"".join(t.numpy().tobytes() for t in first))
    with open(tmp_path / "saved", "rb") as file:
        slots = [store.read(file, (300,), torch.uint8) for _ in first]
    assert (store.peak, store.spilled) == (1024, 600)
    assert all(torch.equal(store.host(s), t) for s, t in zip(slots, first, strict=True))
    del slots[0]
    with open(tmp_path / "saved", "rb") as file:
        slots.append(store.read(file, (300,), torch.uint8))
    assert (store.peak, store.spilled) == (1024, 600)
    store.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_digest_of_weights_is_that_of_the_loaded_model(folder, dtype):
    loaded, streamed = load(folder, dtype=dtype), load(folder, dtype=dtype, stream=True)
    assert weights_digest(streamed) == weights_digest(loaded)


def test_a_streamed_model_has_no_whole_pass(deepseek4):
    model = load(deepseek4, stream=True)
    refused(lambda: hidden_states(model, inputs()[0]), "streamed layer by layer")


def edit(folder, part, change):
    """Change the tensors of the file that holds a tensor with this part in its name."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        found = next((n for n in tensors if part in n), None)
        if found is not None:
            change(tensors, found)
            save_file(tensors, file)
            return file
    raise AssertionError(part)


def nan(tensors, name):
    tensors[name].view(torch.uint8)[0, 0] = 0x7F  # NaN of e4m3


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("layers.2.self_attn.indexer.wk.weight_scale_inv", lambda t, n: t.pop(n), "should be here"),
        ("layers.2.mlp.experts.1.up_proj.weight", nan, "layers.2.mlp.experts.gate_up_proj is not"),
        ("layers.3.self_attn.indexer.wq_b.weight", nan, "layers.3.self_attn.indexer.wq_b.weight"),
        (
            "layers.1.self_attn.o_proj.weight_scale_inv",
            lambda t, n: t[n].fill_(-1.0),
            "o_proj.weight_scale_inv holds scales",
        ),
    ],
)
def test_damaged_layers_are_named(deepseek4, tmp_path, part, change, says):
    copy = shutil.copytree(deepseek4, tmp_path / "copy")
    edit(copy, part, change)
    refused(lambda: run(load(copy, stream=True)), says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda file: file.unlink(), "cannot be read"),
        (lambda file: os.truncate(file, file.stat().st_size // 2), "has changed since"),
        (lambda file: os.utime(file, ns=(1, 1)), "has changed since"),
    ],
)
def test_files_that_change_under_a_run_are_named(deepseek4, tmp_path, change, says):
    copy = shutil.copytree(deepseek4, tmp_path / "copy")
    model = load(copy, stream=True)
    run(model)
    shard = stream_of(model).layers.reader.plans[2].spans[0].shard

    def later(done):
        if done.layer == 0:
            change(copy / shard)

    refused(lambda: (run(model, report=later), run(model)), shard, says)
    shutil.copy2(deepseek4 / shard, copy / shard)
