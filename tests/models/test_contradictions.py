"""Checkpoints whose config contradicts their family or their tensors are refused, by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from indexcache.cli import main
from indexcache.models.loading import load
from tests.fp8_support import edit_config, save_sharded, write_tokenizer
from tests.support import FAMILIES, make_model, refused

SMALL = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
CONFIG = {"glm_moe_dsa": "GlmMoeDsaForCausalLM", "deepseek_v32": "DeepseekV32ForCausalLM"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        make_model(family, **SMALL).save_pretrained(made[family])
        write_tokenizer(made[family])
    return made


@pytest.fixture
def copied(folders, tmp_path):
    """Copy a family's checkpoint, and change its config and its tensors."""

    def copy(family="glm_moe_dsa", tensors=None, **config):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders[family], folder)
        edit_config(folder, **config)
        if tensors is not None:
            weights = load_file(folder / "model.safetensors") | tensors
            weights = {n: t for n, t in weights.items() if t is not None}
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return copy


def test_a_relabelled_family_is_refused(copied):
    relabelled = {"model_type": "deepseek_v32", "indexer_types": None}
    folder = copied(indexer_rope_interleave=True, architectures=None, **relabelled)
    refused(lambda: load(folder), str(folder), "indexer_rope_interleave", "deepseek_v32")
    # The class tells too, in both directions.
    folder = copied(**relabelled)
    refused(lambda: load(folder), "architectures", "GlmMoeDsaForCausalLM", "DeepseekV32")
    folder = copied("deepseek_v32", model_type="glm_moe_dsa")
    refused(lambda: load(folder), "architectures", "DeepseekV32ForCausalLM", "GlmMoeDsa")
    folder = copied("glm_moe_dsa", indexer_rope_interleave=False)
    refused(lambda: load(folder), "indexer_rope_interleave", "glm_moe_dsa")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_interleave", False),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("moe_layer_freq", 2),
        ("qk_head_dim", 17),
        ("index_kpool", 16),
        ("index_source_layer_ids", [0, 0, 2]),
    ],
)
def test_keys_that_ask_for_another_computation_are_refused(copied, family, key, value):
    refused(lambda: load(copied(family, **{key: value})), key, repr(value), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_released_configs_are_taken(copied, family):
    interleaved = family == "glm_moe_dsa"
    folder = copied(
        family,
        indexer_rope_interleave=interleaved,
        rope_interleave=True,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_layer_freq=1,
        ep_size=1,
        qk_head_dim=16,
        head_dim=8,
        num_nextn_predict_layers=1,
        scale_fmt="ue8m0",
        auto_map={"AutoConfig": "x.Y"},
    )
    assert load(folder).layers == 3


def test_a_rope_that_is_unknown_or_contradicts_itself_is_refused(copied):
    for key in ("rope_scaling", "rope_parameters"):
        folder = copied(**{key: {"type": "none"}})
        refused(lambda f=folder: load(f), key, "'none'", "remove")
    folder = copied(rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    refused(lambda: load(folder), "rope_theta = 10000.0", "1000000.0")
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    folder = copied(rope_scaling=yarn, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    refused(lambda: load(folder), "rope_scaling", "differ")


def test_tensors_that_nobody_reads_are_refused(copied):
    scale = {"model.layers.0.self_attn.o_proj.weight_scale_inv": torch.ones(1, 1)}
    refused(lambda: load(copied(tensors=scale)), *scale, "by nobody", "quantization_config")
    extra = {"model.layers.1.self_attn.extra.weight": torch.ones(4)}
    refused(lambda: load(copied(tensors=extra)), *extra, "by nobody")
    adapter = {"model.layers.0.self_attn.o_proj.lora_A.weight": torch.ones(4, 4)}
    refused(lambda: load(copied(tensors=adapter)), *adapter, "merged")
    bias = {"model.layers.0.self_attn.o_proj.bias": torch.ones(32)}
    refused(lambda: load(copied(tensors=bias)), *bias)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert load(copied(tensors=frequencies)).layers == 3


def test_a_config_that_cuts_the_model_short_is_refused(copied):
    folder = copied(num_hidden_layers=2, indexer_types=None, mlp_layer_types=None, layer_types=None)
    refused(lambda: load(folder), "2 layers", "layer 2 too", "num_hidden_layers")


def test_shapes_that_contradict_the_config_are_refused(copied):
    for key, value, name in (
        ("index_n_heads", 8, "indexer."),
        ("vocab_size", 64, "weight"),
        ("v_head_dim", 16, "kv_b_proj"),
        ("moe_intermediate_size", 8, "experts"),
    ):
        refused(lambda k=key, v=value: load(copied(**{k: v})), name, "has the shape")
    refused(lambda: load(copied(n_routed_experts=2)), "experts.2", "by nobody")


def test_a_tensor_in_two_files_is_refused(copied):
    folder = copied()
    weights = load_file(folder / "model.safetensors")
    save_sharded(folder, weights, 2)
    (folder / "model.safetensors").unlink()
    assert load(folder).layers == 3
    first, second = sorted(folder.glob("*.safetensors"))
    name = "lm_head.weight"
    for file in (first, second):
        save_file(load_file(file) | {name: weights[name]}, file, {"format": "pt"})
    refused(lambda: load(folder), name, "lies in two files", first.name, second.name)


def test_inspect_says_what_loading_would_refuse(copied, capsys):
    assert main(["inspect", str(copied()), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["refusal"] is None
    assert main(["inspect", str(copied(v_head_dim=16))]) == 0
    assert "refused: " in (shown := capsys.readouterr().out)
    assert "has the shape" in shown


def test_missing_weights_are_refused(copied):
    stem = "model.layers.1.mlp.experts"
    for name in (f"{stem}.3.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        refused(lambda n=name: load(copied(tensors={n: None})), "1 weights are missing", name)


def test_integers_without_scales_are_refused(copied):
    name = "model.layers.0.self_attn.o_proj.weight"
    for dtype, said in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.uint8, "U8")):
        tensors = {name: torch.zeros(32, 32).to(dtype)}
        refused(lambda t=tensors: load(copied(tensors=t)), name, said, "without scales")


def test_a_head_that_tying_would_drop_is_refused(copied):
    folder = copied(tie_word_embeddings=True)
    refused(lambda: load(folder), "tie_word_embeddings", "lm_head.weight")
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    for tensors in ({"lm_head.weight": head.clone()}, {"lm_head.weight": None}):
        module = load(copied(tensors=tensors, tie_word_embeddings=True)).module
        assert module.lm_head.weight is module.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("rms_norm_eps", "x", "rms_norm_eps"),
        ("rope_parameters", 7, "rope_parameters"),
        ("dtype", "nonsense", "nonsense"),
        ("pad_token_id", 10**6, "adding_idx"),
        ("text_config", {}, "transformers"),
        ("model_type", ["glm_moe_dsa"], "glm_moe_dsa"),
        ("architectures", [["x"]], None),
        ("return_dict", False, None),
        ("output_attentions", True, None),
        ("num_experts_per_tok", 99, "n_routed_experts"),
        ("n_group", 0, "n_group"),
        ("n_group", 99, "n_group"),
        ("topk_group", 99, "topk_group"),
        ("quantization_config", {"quant_method": "auto-round", "extra_config": [1]}, "auto-round"),
    ],
)
def test_values_that_fit_no_model_are_refused_or_harmless(copied, key, value, part):
    folder = copied(**{key: value})
    if part is not None:
        refused(lambda: load(folder), part)
        return
    if key == "architectures" and transformers.__version__.startswith("5.17"):
        refused(lambda: load(folder), key)  # It looks at the types of its own keys.
        return
    assert load(folder).module.config.return_dict
