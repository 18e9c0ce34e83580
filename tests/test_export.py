"""Export: what is written loads in stock transformers with the same logits, every engine's own rule resolves the flags to
the same pattern, and everything that would run wrongly is refused with one sentence."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import indexcache.export as export_package
from indexcache.checkpoint import (
    INDEX_NAME,
    indexer_part,
    layers_without_indexer,
    read_config,
    read_header,
    read_headers,
    tensor_names,
)
from indexcache.export import check_export, export_pattern
from indexcache.export import transformers as export_transformers
from indexcache.pattern import Pattern

LAYERS = 6
PATTERN = "FSSFSF"  # of no frequency
UNIFORM = ("FSFSFS", "FFSFSF", "FFSSSF", "FSSSSS", "FFFFFF")
TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_topk": 8, "index_head_dim": 16,
    "index_n_heads": 16, "max_position_embeddings": 128, "first_k_dense_replace": 1,
}  # fmt: skip


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _save(folder: Path, family: str, **save: Any) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():  # the stock initialisation leaves logits so small that layers hardly differ
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    model.save_pretrained(folder, **save)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("free\n")
    (folder / "pytorch_model.bin").write_text("stale")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (folder / "modeling_own.py").write_text("raise SystemExit\n")
    (folder / ".cache").write_text("hidden")
    return folder


@pytest.fixture(scope="module")
def glm(tmp_path_factory) -> Path:
    return _save(tmp_path_factory.mktemp("glm") / "base", "GlmMoeDsa")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return _save(tmp_path_factory.mktemp("sharded") / "base", "GlmMoeDsa", max_shard_size="30KB")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory) -> Path:
    return _save(tmp_path_factory.mktemp("deepseek") / "base", "DeepseekV32")


@pytest.fixture
def broken(glm, tmp_path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(glm, tmp_path / "base"))


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def _packed(header: Any, data: bytes = b"") -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        call()
    message = str(caught.value)
    assert message.endswith("."), message
    for word in words:
        assert word in message, message


def load(folder: Path, **config: Any):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **config)
    return model.eval(), info


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.randint(0, TINY["vocab_size"], (2, 64), generator=torch.Generator().manual_seed(1))
    return model(ids).logits


# -- the checkpoint for transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["glm", "sharded"])
@pytest.mark.parametrize("pattern", [PATTERN, "FSSSSS"])
def test_pruned_checkpoint_gives_bitwise_the_stock_logits(kind, pattern, request, tmp_path):
    base = request.getfixturevalue(kind)
    result = export_pattern(base, pattern, tmp_path / "out")
    pruned = tmp_path / "out" / "transformers"
    assert result["files"]["transformers"] == [str(pruned)]
    assert result["pattern"] == pattern

    model, info = load(pruned)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.config.indexer_types == Pattern(pattern).to_types()
    stock, _ = load(base, indexer_types=Pattern(pattern).to_types())
    full, _ = load(base, indexer_types=["full"] * LAYERS)
    assert torch.equal(logits(model), logits(stock))
    assert not torch.equal(logits(model), logits(full))  # else the comparison above would prove nothing

    names = tensor_names(pruned)
    assert {found[0] for name in names if (found := indexer_part(name))} == set(Pattern(pattern).full_layers)
    gone = set(tensor_names(base)) - set(names)
    assert gone
    assert not set(names) - set(tensor_names(base))
    assert all(Pattern(pattern)[indexer_part(name)[0]] == "S" for name in gone)
    assert layers_without_indexer(pruned) == tuple(i for i, r in enumerate(pattern) if r == "S")


def test_every_kept_tensor_and_the_metadata_are_the_same(sharded, tmp_path):
    export_pattern(sharded, PATTERN, tmp_path / "out", engines="transformers")
    pruned = tmp_path / "out" / "transformers"
    before, after = tensor_names(sharded), tensor_names(pruned)
    for name, shard in after.items():
        assert shard == before[name]
    for shard in set(after.values()):
        old, new = load_file(sharded / shard), load_file(pruned / shard)
        assert all(torch.equal(new[name], old[name]) and new[name].dtype == old[name].dtype for name in new)
        with safe_open(pruned / shard, "pt") as f:
            assert f.metadata() == {"format": "pt"}


def test_index_of_a_sharded_export(sharded, tmp_path):
    export_pattern(sharded, "FSSSSS", tmp_path / "out", engines="transformers")
    pruned = tmp_path / "out" / "transformers"
    old, new = (json.loads((folder / INDEX_NAME).read_text()) for folder in (sharded, pruned))
    headers = read_headers(pruned)
    assert new["weight_map"] == tensor_names(pruned)
    assert new["metadata"]["total_size"] == sum(t.end - t.begin for h in headers.values() for t in h.tensors.values())
    assert new["metadata"]["total_size"] < old["metadata"]["total_size"]
    model, _ = load(pruned)
    assert new["metadata"]["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert {path.name for path in pruned.glob("*.safetensors")} == set(new["weight_map"].values())


def test_empty_shards_vanish_and_unchanged_ones_are_not_rewritten(glm, tmp_path):
    base = Path(shutil.copytree(glm, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    parts: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}, "c.safetensors": {}}
    for name, tensor in weights.items():
        found = indexer_part(name)
        part = "c" if found is None else "b" if found[0] == 1 else "a"
        parts[f"{part}.safetensors"][name] = tensor
    for name, tensors in parts.items():
        save_file(tensors, base / name, metadata={"format": "pt", "note": "é"})
    (base / INDEX_NAME).write_text(json.dumps({"weight_map": {n: p for p, t in parts.items() for n in t}}))

    result = export_pattern(base, "FSSFFF", tmp_path / "out", engines="transformers")
    pruned = tmp_path / "out" / "transformers"
    assert {p.name for p in pruned.glob("*.safetensors")} == {"a.safetensors", "c.safetensors"}
    assert "b.safetensors" not in (pruned / INDEX_NAME).read_text()
    assert os.path.samefile(base / "c.safetensors", pruned / "c.safetensors")
    assert any("1 of the exported weight files" in warning for warning in result["warnings"])
    with safe_open(pruned / "a.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt", "note": "é"}
    assert not load(pruned)[1]["missing_keys"]


def test_without_hard_links_bytes_are_copied(broken, tmp_path, monkeypatch):
    def no_links(*_args, **_kwargs):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    result = export_pattern(broken, PATTERN, tmp_path / "out", engines="transformers", prune=False)
    source, target = broken / "model.safetensors", tmp_path / "out" / "transformers" / "model.safetensors"
    assert source.read_bytes() == target.read_bytes()
    assert not os.path.samefile(source, target)
    assert not any("hard link" in warning for warning in result["warnings"])


def test_links_are_made_to_files_not_to_symbolic_links(glm, tmp_path):
    base = tmp_path / "snapshot"
    base.mkdir()
    for path in glm.iterdir():
        (base / path.name).symlink_to(os.path.relpath(path, base))
    export_pattern(base, PATTERN, tmp_path / "out", engines="transformers", prune=False)
    weights = tmp_path / "out" / "transformers" / "model.safetensors"
    assert not weights.is_symlink()
    assert os.path.samefile(weights, glm / "model.safetensors")


def test_unpruned_export_keeps_every_tensor(glm, tmp_path):
    export_pattern(glm, PATTERN, tmp_path / "out", engines="transformers", prune=False)
    assert tensor_names(tmp_path / "out" / "transformers") == tensor_names(glm)
    assert read_config(tmp_path / "out" / "transformers")["index_topk_pattern"] == PATTERN


def test_wide_elements_come_first_and_odd_dtypes_survive(tmp_path):
    """Dropping an odd number of bytes must not leave a wide tensor at an address that cannot be mapped."""
    tensors = {
        "model.layers.1.self_attn.indexer.wk.weight": torch.arange(3, dtype=torch.uint8),
        "a": torch.arange(5, dtype=torch.uint8),
        "b": torch.arange(4, dtype=torch.int64),
        "c": torch.arange(3).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
    }
    # Written by hand in an order that the library would not choose.
    dtypes = {torch.uint8: "U8", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.bfloat16: "BF16"}
    entries, data = {}, b""
    for name, tensor in tensors.items():
        raw = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        offsets = [len(data), len(data) + len(raw)]
        entries[name] = {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    (tmp_path / "model.safetensors").write_bytes(_packed(entries, data))

    (shard,) = export_transformers.plan_shards(tmp_path, Pattern("FS"), prune=True)
    assert shard.dropped == {"model.layers.1.self_attn.indexer.wk.weight"}
    export_transformers.write_shard(tmp_path / "model.safetensors", tmp_path / "new.safetensors", shard)
    header = read_header(tmp_path / "new.safetensors")
    assert all((header.data_start + t.begin) % (t.bits // 8) == 0 for t in header.tensors.values())
    new = load_file(tmp_path / "new.safetensors")
    assert set(new) == set(tensors) - shard.dropped
    for name, tensor in new.items():
        assert tensor.dtype == tensors[name].dtype
        assert tensor.shape == tensors[name].shape
        assert torch.equal(tensor.float(), tensors[name].float())


def test_layers_outside_the_pattern_keep_their_indexer(broken, tmp_path):
    weights = load_file(broken / "model.safetensors")
    mtp = f"model.layers.{LAYERS}.self_attn.indexer.wk.weight", "mtp.layers.1.self_attn.indexer.wk.weight"
    save_file(weights | {name: torch.ones(2) for name in mtp}, broken / "model.safetensors", metadata={"format": "pt"})
    edit_config(broken, num_nextn_predict_layers=1)
    result = export_pattern(broken, PATTERN, tmp_path / "out")
    assert set(mtp) <= set(tensor_names(tmp_path / "out" / "transformers"))
    assert any("MTP" in warning for warning in result["warnings"])


def test_saved_config_has_the_pattern_and_no_stale_key(broken, tmp_path):
    edit_config(broken, index_topk_freq=4, index_skip_topk_offset=3, index_topk_pattern="F" * LAYERS, auto_map={"A": "b"})
    export_pattern(broken, PATTERN, tmp_path / "out")
    config = read_config(tmp_path / "out" / "transformers")
    assert config["indexer_types"] == Pattern(PATTERN).to_types()
    assert config["index_topk_pattern"] == PATTERN
    assert config["use_index_cache"] is True
    assert not {"index_topk_freq", "index_skip_topk_offset", "layer_types", "auto_map"} & set(config)
    before = read_config(broken)
    for key in set(before) - {"indexer_types", "index_topk_pattern", "layer_types", "auto_map"}:
        assert key.startswith("index_") or config[key] == before[key]


def test_nested_text_config(broken, tmp_path):
    text = json.loads((broken / "config.json").read_text())
    outer = {"model_type": "glm_moe_dsa_vision", "text_config": text, "index_topk_pattern": "stale"}
    (broken / "config.json").write_text(json.dumps(outer))
    result = export_pattern(broken, PATTERN, tmp_path / "out")
    config = read_config(tmp_path / "out" / "transformers")
    assert config["text_config"]["index_topk_pattern"] == PATTERN
    assert "layer_types" not in config["text_config"]
    assert set(config) == {"model_type", "text_config"}
    keys = Pattern(PATTERN).to_config()
    assert json.loads((tmp_path / "out" / "vllm.json").read_text()) == {"text_config": keys}
    assert json.loads((tmp_path / "out" / "sglang.json").read_text()) == keys
    assert any("multimodal" in warning for warning in result["warnings"])


def test_other_files_are_copied_but_no_code_and_no_other_weights(glm, tmp_path):
    result = export_pattern(glm, PATTERN, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out" / "transformers").iterdir()}
    assert names == {"config.json", "generation_config.json", "LICENSE", "model.safetensors", "tokenizer.json"}
    assert any("Python" in warning for warning in result["warnings"])
    top = {path.name for path in (tmp_path / "out").iterdir()}
    assert top == {"pattern.json", "sglang.json", "sglang.txt", "transformers", "vllm.json", "vllm.txt"}
    assert Pattern.from_file(tmp_path / "out" / "pattern.json") == Pattern(PATTERN)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


# -- the flags, resolved by each engine's own rule (written from the engines' code, independent of Pattern) ---------------

Config = dict[str, Any]


def _by_freq(config: Config, offset: int, shift: int = 1) -> str:
    freq = config.get("index_topk_freq") or 1
    offset = config.get("index_skip_topk_offset", offset)
    return "".join("S" if max(i - offset + shift, 0) % freq != 0 else "F" for i in range(LAYERS))


def _by_string(config: Config) -> str | None:
    pattern = config.get("index_topk_pattern")
    if pattern is None:
        return None
    return "".join("S" if i < len(pattern) and pattern[i] == "S" else "F" for i in range(LAYERS))


def _by_types(config: Config) -> str | None:
    types = config.get("indexer_types")
    return None if types is None else "".join({"full": "F", "shared": "S"}[t] for t in types)


def vllm_rule(config: Config) -> str:
    return _by_string(config) or _by_freq(config, 2)


def sglang_new_rule(config: Config) -> str:
    return _by_types(config) or _by_string(config) or _by_freq(config, 2)


def sglang_first_rule(config: Config) -> str:
    if (pattern := config.get("index_topk_pattern")) is not None:
        return "".join("S" if pattern[i] == "S" else "F" for i in range(LAYERS))
    freq = config.get("index_topk_freq", 1)
    return "".join("S" if max(i - 1, 0) % freq != 0 else "F" for i in range(LAYERS))


def tensorrt_rule(config: Config) -> str:
    return "F" + vllm_rule(config)[1:]


def transformers_rule(config: Config) -> str:
    return transformers_types(config) or _by_freq(config, 2)


def transformers_types(config: Config) -> str | None:
    if (found := _by_types(config)) is not None:
        return found
    pattern = config.get("index_topk_pattern")
    return None if pattern is None else "".join({"F": "F", "S": "S"}[c] for c in pattern)


def atom_rule(config: Config) -> str:
    return _by_types(config) or _by_string(config) or _by_freq(config, 1, shift=0)


def types_only_rule(config: Config) -> str:
    return _by_types(config) or "F" * LAYERS


def prime_rule(config: Config) -> str:
    if not config.get("use_index_cache"):
        return "F" * LAYERS
    freq = config.get("index_topk_freq", 1)
    by_freq = "".join("S" if i % freq else "F" for i in range(LAYERS))
    return _by_string(config) or _by_types(config) or by_freq


def megatron_rule(config: Config) -> str:
    freq, offset = config.get("index_topk_freq", 1), max(config.get("index_skip_topk_offset", 0), 1)
    return "".join("S" if max(n - offset, 0) % freq != 0 else "F" for n in range(1, LAYERS + 1))


RULES = [vllm_rule, sglang_new_rule, sglang_first_rule, tensorrt_rule, transformers_rule, atom_rule, types_only_rule]
RULES += [prime_rule]

BASES: dict[str, Config] = {
    "plain": {},
    "freq": {"index_topk_freq": 4, "index_skip_topk_offset": 3},
    "freq without offset": {"index_topk_freq": 3},
    "null": {"index_topk_freq": None, "index_skip_topk_offset": None, "index_topk_pattern": None},
    "all": {
        "index_topk_freq": 2,
        "index_skip_topk_offset": 1,
        "index_topk_pattern": "FFSFFS",
        "indexer_types": ["full"] * LAYERS,
    },
}


def flag_value(path: Path, flag: str) -> Config:
    text = path.read_text()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    words = shlex.split(text)
    assert words[0] == flag
    assert len(words) == 2
    return json.loads(words[1])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("pattern", [PATTERN, *UNIFORM])
def test_every_engine_resolves_the_flags_to_the_same_pattern(base, pattern, broken, tmp_path):
    config = {**read_config(edit_config(broken, indexer_types=None)), **BASES[base]}
    (broken / "config.json").write_text(json.dumps(config))
    export_pattern(broken, pattern, tmp_path / "out")
    saved = read_config(tmp_path / "out" / "transformers")
    for name, flag in (("vllm", "--hf-overrides"), ("sglang", "--json-model-override-args")):
        value = flag_value(tmp_path / "out" / f"{name}.txt", flag)
        assert value == json.loads((tmp_path / "out" / f"{name}.json").read_text())
        for seen in (config | value, saved, saved | value):
            for rule in RULES:
                assert rule(seen) == pattern, rule.__name__
            if pattern in UNIFORM:
                assert megatron_rule(seen) == pattern
            else:  # a reader of the frequency alone runs everything, never another pattern
                assert megatron_rule(seen) == "F" * LAYERS
    assert transformers.GlmMoeDsaConfig(**{**config, **value}).indexer_types == Pattern(pattern).to_types()


def test_all_full_flags_are_allowed_for_every_engine_of_deepseek(deepseek, tmp_path):
    result = export_pattern(deepseek, "F" * LAYERS, tmp_path / "out")
    assert set(result["files"]) == {"transformers", "vllm", "sglang"}
    model, info = load(tmp_path / "out" / "transformers")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(model), logits(load(deepseek)[0]))


def test_deepseek_flags(deepseek, tmp_path):
    result = export_pattern(deepseek, PATTERN, tmp_path / "out", engines=("sglang", "vllm"))
    assert set(result["files"]) == {"sglang", "vllm"}
    assert all(Path(path).is_file() for paths in result["files"].values() for path in paths)
    assert not (tmp_path / "out" / "transformers").exists()


# -- warnings ---------------------------------------------------------------------------------------------------------


def test_warnings(broken):
    edit_config(broken, indexer_types=Pattern("FSSSSS").to_types(), num_nextn_predict_layers=1, index_topk=2048)
    text = " ".join(check_export(broken, PATTERN))
    for word in ("MTP", "two-batch overlap", "no-op here", "already shares", "Some versions of vLLM", "Python"):
        assert word in text
    edit_config(broken, index_topk=8)
    assert "contexts of up to index_topk = 8" in " ".join(check_export(broken, PATTERN))
    assert not any("no-op" in w or "overlap" in w for w in check_export(broken, "F" * LAYERS))


def test_uneven_stages_name_the_cut_that_was_checked(glm):
    assert any("2,2,1,1" in warning for warning in check_export(glm, "FSFSFF", stages=4))
    assert not any("PARTITION" in warning for warning in check_export(glm, "FSSFSS", stages=2))


def test_a_pruned_checkpoint_can_be_exported_again_but_not_widened(glm, tmp_path):
    export_pattern(glm, PATTERN, tmp_path / "one")
    pruned = tmp_path / "one" / "transformers"
    result = export_pattern(pruned, "FSSFSS", tmp_path / "two")
    assert any("no indexer at layers 1, 2, 4" in warning for warning in result["warnings"])
    assert layers_without_indexer(tmp_path / "two" / "transformers") == (1, 2, 4, 5)
    refused(lambda: export_pattern(pruned, "FFSFFF", tmp_path / "three"), "layers 1, 4,", "only be S")


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_patterns_that_are_refused(glm, deepseek, tmp_path):
    out = tmp_path / "out"
    refused(lambda: export_pattern(glm, "FSRFSS", out), "Layer 2 is R", "F and S")
    refused(lambda: export_pattern(glm, "FSS", out), "3 layers", "6")
    refused(lambda: export_pattern(glm, "fssfss", out), "Layer 0")
    refused(lambda: export_pattern(glm, "SFFFFF", out), "Layer 0")
    refused(lambda: export_pattern(glm, PATTERN, out, stages=3), "stage begins at layer 2", "S")
    refused(lambda: export_pattern(glm, PATTERN, out, stages=0), "0 pipeline stages")
    refused(lambda: export_pattern(glm, PATTERN, out, stages=True), "stages")
    refused(lambda: export_pattern(deepseek, PATTERN, out), "deepseek_v32", "use_pattern", "vllm", "sglang")
    assert not any(tmp_path.iterdir())


def test_engines_that_are_refused(glm, tmp_path):
    refused(lambda: export_pattern(glm, PATTERN, tmp_path / "o", engines=("vllm", "tgi")), "'tgi'", "sglang")
    refused(lambda: export_pattern(glm, PATTERN, tmp_path / "o", engines="tgi"), "'tgi'")
    refused(lambda: export_pattern(glm, PATTERN, tmp_path / "o", engines=()), "No engine")


def test_configs_that_are_refused(broken, tmp_path):
    call = partial(export_pattern, broken, PATTERN, tmp_path / "out")
    refused(lambda: export_pattern(tmp_path / "nowhere", PATTERN, tmp_path / "out"), "nowhere", "no such")
    edit_config(broken, model_type="llama")
    refused(call, "'llama'", "glm_moe_dsa")
    edit_config(broken, model_type="glm_moe_dsa", num_hidden_layers=None)
    refused(call, "num_hidden_layers")
    (broken / "config.json").write_text("[]")
    refused(call, "config.json", "object")
    (broken / "config.json").write_text("{")
    refused(call, "config.json", "JSON")
    (broken / "config.json").unlink()
    refused(call, "no config.json")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw[:-5], ["model.safetensors", "cut off"]),
        (lambda raw: raw[:100], ["cut off", "100"]),
        (lambda raw: b"", ["cut off"]),
        (lambda raw: raw + b"more", ["longer"]),
        (lambda raw: struct.pack("<Q", 4) + b"{{{{", ["not a safetensors"]),
        (lambda raw: _packed({"a": 1}), ["not a safetensors"]),
        (lambda raw: _packed([1]), ["not a safetensors"]),
        (lambda raw: _packed({"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, b"abc"), ["corrupt", "'a'"]),
        (lambda raw: _packed({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 3]}}, b"abc"), ["corrupt", "'a'"]),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", ["Git LFS"]),
    ],
)
def test_damaged_weight_files_are_refused(damage, words, broken, tmp_path):
    path = broken / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(lambda: export_pattern(broken, PATTERN, tmp_path / "out"), *words)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_incomplete_weights_are_refused(broken, tmp_path):
    call = partial(export_pattern, broken, PATTERN, tmp_path / "out")
    path = broken / "model.safetensors"
    weights = load_file(path)
    save_file({name: t for name, t in weights.items() if "layers.3.self_attn.indexer.k_norm" not in name}, path)
    refused(call, "layer 3", "lacks k_norm")
    shutil.copy(path, broken / "model-00001-of-00001.safetensors")
    (broken / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    refused(call, "both there")
    (broken / INDEX_NAME).unlink()
    path.unlink()
    refused(call, "neither model.safetensors nor")
    (broken / "model-00001-of-00001.safetensors").unlink()
    refused(call, "weights are read from safetensors only")


def test_indexes_that_are_refused(sharded, tmp_path):
    base = Path(shutil.copytree(sharded, tmp_path / "base"))
    index = json.loads((base / INDEX_NAME).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    call = partial(export_pattern, base, PATTERN, tmp_path / "out")

    for bad, words in (
        ({}, ["weight_map"]),
        ([], ["weight_map"]),
        ({"weight_map": {name: "../x.safetensors"}}, ["../x.safetensors"]),
        ({"weight_map": {name: 3}}, ["3"]),
        ({"weight_map": index["weight_map"] | {"not.there": shard}}, ["not.there", shard]),
    ):
        (base / INDEX_NAME).write_text(json.dumps(bad))
        refused(call, *words)
    (base / INDEX_NAME).write_text(json.dumps(index))
    (base / shard).unlink()
    refused(call, shard, "not there")


def test_an_existing_folder_is_never_overwritten(glm, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export_pattern(glm, PATTERN, out, engines="vllm")  # empty: allowed
    refused(lambda: export_pattern(glm, PATTERN, out, engines="vllm"), "not an empty folder")
    file = tmp_path / "file"
    file.write_text("mine")
    refused(lambda: export_pattern(glm, PATTERN, file), "not an empty folder")
    refused(lambda: export_pattern(glm, PATTERN, file / "below"), "below")
    assert file.read_text() == "mine"


# -- disks and kills --------------------------------------------------------------------------------------------------


def test_too_little_space_is_seen_before_writing(glm, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(export_transformers, "write", lambda *_a: pytest.fail("began to write"))
    refused(lambda: export_pattern(glm, PATTERN, tmp_path / "out"), "free", "MiB")
    assert not any(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing_behind(glm, tmp_path, monkeypatch):
    def full(_source, target, _shard):
        target.write_bytes(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_transformers, "write_shard", full)
    refused(lambda: export_pattern(glm, PATTERN, tmp_path / "out"), "disk is full")
    assert not any(tmp_path.iterdir())


def test_a_source_that_shrinks_is_an_error(broken, tmp_path):
    (shard,) = export_transformers.plan_shards(broken, Pattern(PATTERN), prune=True)
    path = broken / "model.safetensors"
    os.truncate(path, path.stat().st_size - 5)
    refused(
        lambda: export_transformers.write_shard(broken / "model.safetensors", tmp_path / "new.safetensors", shard),
        "became shorter",
    )


def test_an_interrupted_export_leaves_nothing_and_a_killed_one_is_cleared(glm, tmp_path, monkeypatch):
    def stop(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export_transformers, "write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            export_pattern(glm, PATTERN, tmp_path / "out")
    assert not any(tmp_path.iterdir())

    left = tmp_path / ".out.part"
    (left / "transformers").mkdir(parents=True)
    (left / "junk").write_text("of a killed run")
    export_pattern(glm, PATTERN, tmp_path / "out", engines="vllm")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"pattern.json", "vllm.json", "vllm.txt"}


def test_two_exports_to_one_folder_do_not_mix(glm, tmp_path):
    with export_package._whole_or_absent(tmp_path / "out") as part:
        refused(lambda: export_pattern(glm, PATTERN, tmp_path / "out", engines="vllm"), "another process")
        (part / "mine").write_text("kept")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_the_source_is_never_changed(sharded, tmp_path):
    before = {path.name: path.read_bytes() for path in sharded.iterdir()}
    export_pattern(sharded, PATTERN, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in sharded.iterdir()} == before
