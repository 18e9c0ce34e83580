"""Check what stands before vLLM's `fused_q`, over a stand-in of it."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed")

from indexcache.engines.vllm import rotating
from indexcache.ops import rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def stock(
    positions,
    q_pe,
    q_pe_cos_sin_cache,
    index_q,
    index_q_cos_sin_cache,
    ql_nope,
    q_scale,
    index_weights,
    index_weights_softmax_scale,
    index_weights_head_scale,
    has_indexer=True,
    index_rope_interleave=False,
    quantize_mqa=True,
):
    return "stock"


def arguments(tokens=256, dim=32, **named):
    table = torch.randn(tokens, 32, device=DEVICE)
    given = {
        "positions": torch.arange(tokens, device=DEVICE),
        "q_pe": torch.randn(tokens, 2, dim, device=DEVICE),
        "q_pe_cos_sin_cache": table,
        "index_q": torch.randn(tokens, 2, 64, device=DEVICE),
        "index_q_cos_sin_cache": table,
        "ql_nope": None,
        "q_scale": None,
        "index_weights": torch.randn(tokens, 2, device=DEVICE),
        "index_weights_softmax_scale": 0.5,
        "index_weights_head_scale": 0.25,
        "quantize_mqa": False,
    }
    return given | named


def test_a_long_step_is_turned_here():
    given = arguments(index_rope_interleave=True)
    index_q, weights, turned = rotating.rotating(stock)(**given)
    table = given["q_pe_cos_sin_cache"]
    position = given["positions"]
    want = rotary.rotate_queries(given["q_pe"], position, table, interleaved=True)
    assert torch.equal(turned, want)
    q = given["index_q"], given["index_weights"]
    for a, b in zip(
        (index_q, weights),
        rotary.rotate_index_queries(*q, position, table, (0.5, 0.25), interleaved=True),
        strict=True,
    ):
        assert torch.equal(a.float(), b.float())


def test_a_shared_layer_has_attention_alone():
    given = arguments(index_q=None, index_q_cos_sin_cache=None, index_weights=None)
    turned = rotating.rotating(stock)(**given, has_indexer=False)[2]
    assert turned.shape == given["q_pe"].shape


@pytest.mark.parametrize(
    "named", [{"tokens": 255}, {"quantize_mqa": True}, {"dim": 48}, {"dim": 16}], ids=str
)
def test_others_stay_with_vllm(named):
    assert rotating.rotating(stock)(**arguments(**named)) == "stock"


def test_it_is_installed_once(monkeypatch):
    module = SimpleNamespace(fused_q=stock)
    monkeypatch.setitem(sys.modules, rotating.USER, module)
    rotating.install()
    first = module.fused_q
    rotating.install()
    assert module.fused_q is first and first is not stock
    older = SimpleNamespace()
    monkeypatch.setitem(sys.modules, rotating.USER, older)
    rotating.install()
    assert not hasattr(older, "fused_q")
