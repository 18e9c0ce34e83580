"""Test models whose FP8 weights stay in FP8, against dequantised ones."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from indexcache import ops
from indexcache.cli import main
from indexcache.models import blocks
from indexcache.models.blocks import BlockExperts, BlockLinear
from indexcache.models.effective import is_plain
from indexcache.models.fast import accelerate as fast_path
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.decode import Decoder
from indexcache.models.fast.prefill import prefill
from indexcache.models.loading import load
from indexcache.models.seam import use_pattern
from tests.fp8_support import write_fp8
from tests.support import FAMILIES, refused


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return write_fp8(tmp_path_factory.mktemp(request.param) / "fp8", request.param)


def logits(model, ids, steps=2):
    """Return the logits of a prompt's end and of the steps of decoding behind it."""
    cache = FastCache(model, ids.shape[1] + steps)
    found = [prefill(model, ids, cache)]
    decoder = Decoder(model, cache)
    for _ in range(steps):
        found.append(decoder.step(found[-1].argmax(-1)).clone())
    return torch.cat(found)


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(0, 100, (1, 40), generator=torch.Generator().manual_seed(3))


def test_kept_weights_give_the_same_numbers(folder, prompt):
    """On a CPU they are bitwise those of dequantised weights, in stock and on the fast path."""
    expected, kept = load(folder).module, load(folder, fp8="keep").module
    stored = {n: p for n, p in kept.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert any(".indexer.wq_b." in n for n in stored) and any(".experts.gate" in n for n in stored)
    assert not any("kv_b_proj" in n for n in stored)
    sizes = [sum(p.numel() * p.itemsize for p in m.parameters()) for m in (kept, expected)]
    assert sizes[0] < 0.5 * sizes[1]
    for (name, p), q in zip(expected.named_buffers(), kept.buffers(), strict=True):
        assert torch.equal(p, q), name
    pattern = "FSF"
    with torch.no_grad():
        assert torch.equal(kept(prompt).logits, expected(prompt).logits)
        with accelerate(expected), use_pattern(expected, pattern):
            wanted = logits(expected, prompt)
        with accelerate(kept), use_pattern(kept, pattern):
            assert torch.equal(logits(kept, prompt), wanted)


def test_compiled(prompt, tmp_path, monkeypatch):
    """Prefill calls the operations, a step is traced whole. The backend is left out."""
    kept = load(write_fp8(tmp_path / "fp8", "glm_moe_dsa"), fp8="keep").module
    monkeypatch.setattr(blocks, "_fuses", lambda *_: True)  # as on a GPU
    with accelerate(kept):
        wanted = logits(kept, prompt)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    called = []
    for name in ("block_linear", "gated_experts"):
        monkeypatch.setattr(blocks.ops, name, counted(getattr(blocks.ops, name), called))
    with accelerate(kept, compile=True):
        cache = FastCache(kept, 42)
        got = [prefill(kept, prompt, cache)]
        assert {*called} == {"block_linear", "gated_experts"}
        called.clear()
        decoder = Decoder(kept, cache)
        for _ in range(2):
            got.append(decoder.step(got[-1].argmax(-1)).clone())
        assert not called
    torch._dynamo.reset()
    assert float((torch.cat(got) - wanted).norm() / wanted.norm()) < 1e-5


def test_unquantised_experts_in_one_operation(glm, ids, monkeypatch):
    """The tuning lets the fast path run them so on a GPU, compiled or not."""
    with torch.no_grad():
        wanted = glm(ids).logits
    monkeypatch.setattr(fast_path, "on_gpu", lambda _: True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    called = []
    monkeypatch.setattr(blocks.ops, "gated_experts", counted(blocks.ops.gated_experts, called))
    for fused, compiled in ((True, False), (True, True), (False, False)):
        called.clear()
        with ops.tuned(linear={"fused_experts": fused}), accelerate(glm, compile=compiled):
            with torch.no_grad():
                got = glm(ids).logits
            assert bool(called) == fused
        assert float((got - wanted).norm() / wanted.norm()) < 1e-5
    assert all("forward" not in m.__dict__ for m in glm.modules())


def test_partial_blocks_are_not_fused_on_a_cpu(monkeypatch):
    """Torch's code generator would leave the columns 128 to 159 out. Others need not be, either."""
    torch._dynamo.reset()
    for width, fuses in ((160, True), (128, True), (128, False)):
        called = ["block_linear"] if width == 160 or not fuses else []
        linear = blocks.BlockLinear(torch.nn.Linear(width, 128, bias=False), (128, 128), False)
        linear.weight.data = torch.randn(128, width).to(torch.float8_e4m3fn)
        linear.weight_scale_inv.data.fill_(0.1)
        linear.may_fuse = fuses
        found = []
        with monkeypatch.context() as patch:
            patch.setattr(blocks.ops, "block_linear", counted(blocks.ops.block_linear, found))
            run = torch.compile(linear.__call__, backend="eager", dynamic=True)
            x = torch.randn(1, 1, width)
            assert torch.equal(run(x), torch.nn.functional.linear(x, linear.weight.float() * 0.1))
        assert found == called


def counted(op, called):
    def run(*args, **kwargs):
        called.append(op.__name__)
        return op(*args, **kwargs)

    return run


def test_generate_keeps_weights(folder, tmp_path, capsys):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("w1 w2 w3 w4 w5", encoding="utf-8")
    found = []
    for fp8 in ("dequantize", "keep"):
        flags = ["--prompt-file", str(prompt), "--max-new-tokens", "3", "--json", "--fp8", fp8]
        assert main(["generate", str(folder), *flags]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"])
    assert found[0] == found[1]
    assert main(["generate", "tiny", *flags]) == 2
    assert "no weight is stored" in capsys.readouterr().err


def test_quantised_inputs_are_a_choice(folder, prompt):
    kept, both = load(folder, fp8="keep").module, load(folder, fp8="both").module
    with torch.no_grad():
        a, b = kept(prompt).logits, both(prompt).logits
    assert 1e-4 < float((a - b).norm() / a.norm()) < 0.9
    for module in both.modules():
        if isinstance(module, BlockLinear | BlockExperts):
            assert module.quantized_inputs and is_plain(module)
    layer = both.model.layers[0].mlp.down_proj
    handle = layer.register_forward_hook(lambda *_: None)
    assert not is_plain(layer)
    handle.remove()


def test_what_is_refused(folder, tmp_path):
    refused(lambda: load(folder, fp8="yes"), "dequantize, keep, both")
    refused(lambda: load(folder, fp8="keep", stream=True), "one at a time")
    refused(lambda: load("tiny", fp8="keep"), "no weight is stored")
