"""Test that the packaged checkpoint is as described, and that sharing matters on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from indexcache import Pattern, evaluate, export, use_pattern
from indexcache.data import Batch, shipped_text
from indexcache.evals.statistics import LEAST_DOCUMENTS
from indexcache.models.lm import hidden_states
from indexcache.records import read_json

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "demo_tiny.json"
# The pattern that the demo's search found at 1/4.
SEARCHED = next(p["pattern"] for p in read_json(RESULTS)["frontier"] if p["full"] == 3)


@pytest.fixture(scope="module")
def held_out(tiny):
    return tiny.batches("heldout", length=512, sequences=12, batch=2)


def test_it_is_what_was_promised(tiny):
    config = tiny.config
    assert config.model_type == "glm_moe_dsa"
    assert config.num_hidden_layers >= 12
    assert "sparse" in config.mlp_layer_types
    assert config.index_n_heads >= 16
    assert config.max_position_embeddings >= 4096
    assert config.index_topk * 16 <= config.max_position_embeddings
    assert sum(f.stat().st_size for f in tiny.path.glob("*.safetensors")) <= 12_000_000
    assert tiny.native == Pattern.full(12)
    assert tiny.config is tiny.module.config
    assert (tiny.layers, tiny.topk) == (config.num_hidden_layers, config.index_topk)
    text = "func main() {\n\treturn 42, nil\n}  // Überprüfung\n"
    assert tiny.tokenizer.decode(tiny.encode(text)) == text


def test_stock_from_pretrained_loads_it(tiny, held_out):
    from transformers import AutoModelForCausalLM

    stock, report = AutoModelForCausalLM.from_pretrained(
        tiny.path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = held_out[0].ids[:1]
    with torch.no_grad(), use_pattern(tiny.module, "F" * 12):
        assert torch.equal(stock.eval()(ids).logits, tiny.module(ids).logits)


def test_cached_decoding_equals_one_pass(tiny, held_out):
    ids = held_out[0].ids[:1, :192]
    for pattern in ("F" * 12, SEARCHED, "FFRRRRRRRFRR@4"):
        with use_pattern(tiny.module, pattern), torch.no_grad():
            one_pass = tiny.module(ids).logits
            cache, outputs = None, []
            for start, stop in [(0, 150), (150, 151), *((t, t + 1) for t in range(151, 192))]:
                out = tiny.module(ids[:, start:stop], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                outputs.append(out.logits)
        difference = (torch.cat(outputs, 1) - one_pass).norm() / one_pass.norm()
        assert difference < 1e-5, (pattern, float(difference))


def test_exported_pruned_checkpoint_is_bitwise_use_pattern(tiny, held_out, tmp_path):
    from transformers import AutoModelForCausalLM

    result = export(tiny.path, SEARCHED, tmp_path / "out")
    pruned, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "transformers", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = held_out[0].ids[:1]
    with torch.no_grad(), use_pattern(tiny.module, SEARCHED):
        assert torch.equal(pruned.eval()(ids).logits, tiny.module(ids).logits)
    assert (
        json.loads((tmp_path / "out" / "vllm.json").read_text())["index_topk_pattern"] == SEARCHED
    )
    assert set(result.files) == {"transformers", "vllm", "sglang"}


def test_sharing_hurts_where_it_should_and_the_searched_pattern_helps(tiny):
    """36 documents are the least for an interval."""
    text = tiny.batches("heldout", length=192, sequences=36, batch=6)
    patterns = {"uniform": "FSSSFSSSFSSS", "reindex": "FFRRRRRRRFRR@2"}
    rows = {r.name: r for r in evaluate(tiny.module, patterns, text, against=SEARCHED).overall}
    assert rows["uniform"].ci_low > 0
    assert rows["reindex"].ci_high < 0


def test_the_shipped_text_is_split_by_document(tiny):
    rows = {
        s: [json.loads(x) for x in shipped_text(s).read_text(encoding="utf-8").splitlines()]
        for s in ("calibration", "heldout")
    }
    names = {s: {r["source"] for r in lines} for s, lines in rows.items()}
    assert not names["calibration"] & names["heldout"]
    held_out = [r["domain"] for r in rows["heldout"]]
    assert {d: held_out.count(d) for d in held_out} == dict.fromkeys(
        ("code", "documentation", "prose"), LEAST_DOCUMENTS
    )
    for lines in rows.values():
        assert {r["domain"] for r in lines} == {"code", "documentation", "prose"}
        assert {r["licence"] for r in lines} <= {
            "BSD-3-Clause",
            "PSF-2.0",
            "PostgreSQL",
            "public domain",
        }


def test_batches_go_through_the_model_alike(tiny, held_out):
    """A batch gives what its rows give alone, up to rounding, so --batch changes no conclusion."""
    batch: Batch = held_out[0]
    together = hidden_states(tiny.module, batch.ids)
    alone = torch.cat([hidden_states(tiny.module, row[None]) for row in batch.ids])
    assert (together - alone).norm() / alone.norm() < 1e-3
