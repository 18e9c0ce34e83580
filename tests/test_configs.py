"""One reader of configs: quantisation in every format, next-token layers, nesting."""

from __future__ import annotations

import json

import pytest

from indexcache.checkpoint import config_facts
from indexcache.configs import mtp_layers, quantization_of, text_section
from tests.support import refused

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FLOATS = {"num_bits": 4, "type": "float", "group_size": 16}
FORMATS = {
    "fp8": (BLOCKS, 8, (128, 128), 8),
    "fp8 one scale": ({"quant_method": "fp8"}, 8, None, 8),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4, (1, 128), None),
    "gptq": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8, None, None),
    "auto-round": ({"quant_method": "auto-round", "bits": 2, "group_size": 64}, 2, (1, 64), None),
    "int4 groups": (
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": WEIGHTS}}},
        4,
        (1, 32),
        None,
    ),
    "nvfp4 groups": (
        {"config_groups": {"a": {"weights": FLOATS, "input_activations": {"num_bits": 4}}}},
        4,
        (1, 16),
        4,
    ),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4, (1, 16), 4),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8, None, 8),
    "mxfp4": ({"quant_method": "mxfp4"}, 4, (1, 32), None),
    "quark": (
        {
            "quant_method": "quark",
            "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32}},
        },
        4,
        (1, 32),
        None,
    ),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4, (1, 64), None),
    "hqq": (
        {
            "quant_method": "hqq",
            "quant_config": {"weight_quant_params": {"nbits": 3, "group_size": 64}},
        },
        3,
        (1, 64),
        None,
    ),
    "torchao": ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, 4, None, None),
    "unknown": ({"quant_method": "new-one"}, None, None, None),
    "two kinds": (
        {"config_groups": {"a": {"weights": WEIGHTS}, "b": {"weights": WEIGHTS | {"num_bits": 8}}}},
        None,
        None,
        None,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_says_its_bits_and_block(name):
    section, bits, block, activations = FORMATS[name]
    for config in (
        {"quantization_config": section},
        {"text_config": {"quantization_config": section}},
        {"compression_config": section},
    ):
        found = quantization_of(config)
        assert (found.bits, found.block, found.activations) == (bits, block, activations)
    json.dumps(found.to_json())


def test_no_section_is_no_quantisation():
    assert quantization_of({}) is quantization_of({"quantization_config": None}) is None
    assert quantization_of({"quantization_config": {}}) is None


@pytest.mark.parametrize(
    ("pattern", "kept", "covered"),
    [
        ("model.layers.0.self_attn", "model.layers.0.self_attn.o_proj", "model.layers.1.mlp"),
        ("kv_b_proj", "model.layers.7.self_attn.kv_b_proj", "model.layers.7.self_attn.q_b_proj"),
        ("model.layers.1", "model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj"),
        ("re:.*self_attn.*", "model.layers.3.self_attn.o_proj", "model.layers.3.mlp.up_proj"),
        ("model.layers.0*", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("*indexer*", "model.layers.2.self_attn.indexer.wk", "model.layers.2.self_attn.o_proj"),
        (
            "language_model.model.layers.4.mlp",
            "model.layers.4.mlp.up_proj",
            "model.layers.5.mlp.up_proj",
        ),
    ],
)
def test_excluded_modules_stay_as_they_are(pattern, kept, covered):
    for key in ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"):
        found = quantization_of({"quantization_config": BLOCKS | {key: [pattern]}})
        assert not found.covers(kept)
        assert found.covers(covered)
        assert not found.covers(kept.replace("model.layers", "model.language_model.layers"))
    for never in ("lm_head", "model.embed_tokens", "model.layers.5.mlp.gate"):
        assert not found.covers(never)


def test_bytes_count_the_scales_of_partial_blocks():
    found = quantization_of({"quantization_config": BLOCKS})
    assert found.bytes_of(576, 6144) == 576 * 6144 + 5 * 48 * 4
    groups = quantization_of(
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
    )
    assert groups.bytes_of(8, 256) == (8 * 256 * 4 + 8 * 2 * (16 + 4)) / 8
    refused(
        lambda: quantization_of({"quantization_config": {"quant_method": "x"}}).bytes_of(1, 1),
        "x",
        "bits",
    )


@pytest.mark.parametrize(
    "section",
    [
        "fp8",
        {"bits": 4},
        BLOCKS | {"weight_block_size": [128]},
        BLOCKS | {"ignored_layers": "lm_head"},
        {"quant_method": "awq", "bits": "four"},
    ],
)
def test_a_malformed_section_is_refused_with_its_file(tmp_path, section):
    (tmp_path / "config.json").write_text("{}")
    refused(
        lambda: config_facts(tmp_path, {"quantization_config": section}), "config.json", "quant"
    )


def test_modelopt_keeps_its_section_in_a_file_of_its_own(tmp_path):
    value = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(value))
    assert config_facts(tmp_path, {})["quantization"].bits == 4


def test_next_token_layers_are_read_at_both_places():
    nested = {"text_config": {"num_hidden_layers": 4, "num_nextn_predict_layers": 2}}
    assert mtp_layers(nested) == 2
    assert mtp_layers({"num_nextn_predict_layers": 1, "text_config": {"num_hidden_layers": 4}}) == 1
    assert mtp_layers({}) == mtp_layers({"num_nextn_predict_layers": None}) == 0
    assert text_section(nested)["num_hidden_layers"] == 4
    refused(lambda: mtp_layers({"num_nextn_predict_layers": "one"}), "num_nextn_predict_layers")
