"""Test the gate: which hazards `doctor` finds, of which level, and its exit code."""

from __future__ import annotations

import json
import shlex

import pytest

from indexcache.cli import main
from indexcache.engines.hazards import weights
from indexcache.engines.published import PUBLISHED, copied_from
from indexcache.exporting import export
from tests.support import make_model

from .shapes import DEEPSEEK, GLM, QUARTER, SHAPES, SHIPPED, types

SMALL = GLM | {"num_hidden_layers": 6, "index_topk": 16}


@pytest.fixture
def examined(tmp_path, capsys):
    """Return a function that examines a config or a folder, and returns the code and the JSON."""

    def examine(model, words=""):
        if isinstance(model, dict):
            path = tmp_path / "config.json"
            path.write_text(json.dumps(model))
            model = path
        code = main(["doctor", str(model), "--json", *shlex.split(words)])
        out, err = capsys.readouterr()
        if code == 2:
            return code, err
        return code, json.loads(out.splitlines()[-1])

    return examine


def kinds(result, level="error"):
    return {h["kind"] for h in result["hazards"] if h["level"] == level}


def texts(result):
    return " ".join(h["text"] for h in result["hazards"])


FAILING = {
    "GLM-5.2 with one key replaced": {"disagreement", "ignored"},
    "Hy4": {"ignored"},
    "multimodal nesting": {"nesting"},
    "lower case": {"letters"},
    "61 characters on 78 layers": {"length", "copied", "fails"},
    "78 characters on 61 layers": {"length", "copied"},
    "MTP counted in": {"length"},
    "DeepSeek-V4.1": {"ignored"},
}


@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes_pass_or_fail(examined, name):
    code, result = examined(SHAPES[name][0])
    if name in FAILING:
        assert code == 1
        assert kinds(result) >= FAILING[name]
    else:
        assert code == 0, texts(result)
    assert result["failed"] == (code == 1)


def test_the_table_names_the_key_and_the_roles(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL | {"index_topk_freq": 3, "index_skip_topk_offset": 1}))
    assert main(["doctor", str(path), "--engine", "vllm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["engine", "versions", "full", "decided", "by", "layers"]
    assert lines[2].split() == ["vllm", "0.25", "to", "0.33", "2/6", "index_topk_freq", "FSSFSS"]


@pytest.mark.parametrize(
    ("keys", "kind", "says"),
    [
        ({"index_topk_pattern": "FSS"}, "length", "has 3 roles, but the model has 6 layers"),
        ({"index_topk_pattern": "FSSFSSS"}, "length", "behind the last layer is ignored"),
        ({"indexer_types": types("FSS")}, "length", "indexer_types has 3 roles"),
        ({"index_topk_pattern": "fssfss"}, "letters", "write it in upper case"),
        ({"index_topk_pattern": "FRRFRR"}, "letters", "re-index"),
        ({"index_topk_pattern": "FSSXSS"}, "letters", "the role 'X'"),
        ({"index_topk_pattern": "SSSFSS"}, "first", "shares layer 0"),
        ({"index_topk_pattern": list("FSSFSS")}, "list", "write it as a string"),
        ({"index_topk_pattern": 5}, "malformed", "not a string of F and S"),
        ({"indexer_types": "FSSFSS"}, "malformed", "not a list of full and shared"),
        ({"indexer_types": types("FSSFSS")}, "ignored", "vllm ignores indexer_types"),
        (
            {"index_topk_pattern": "FSSFSS", "indexer_types": types("FFSFSS")},
            "disagreement",
            "indexer_types (3 full) and index_topk_pattern (2 full)",
        ),
        ({"use_index_cache": True}, "switch", "no key says which layers"),
        ({"use_index_cache": False, "index_topk_freq": 2}, "switch", "ignore it and share"),
        ({"index_topk_freq": None}, "fails", "index_topk_freq is null"),
        ({"index_topk_freq": 3, "index_skip_topk_offset": 0}, "first", "must make it full"),
    ],
)
def test_a_config_that_engines_misread_fails(examined, keys, kind, says):
    code, result = examined(SMALL | keys)
    assert code == 1
    assert kind in kinds(result), texts(result)
    assert says in texts(result)


@pytest.mark.parametrize("pattern", ["1/2", "FSSFSS", "full"])
def test_exported_overrides_pass(examined, pattern):
    for config in (
        SMALL,
        {"model_type": "vl", "text_config": SMALL | {"index_topk_freq": 2}},
        DEEPSEEK | {"num_hidden_layers": 6},
    ):
        code, result = examined(config, f"--pattern {pattern}")
        assert code == 0, texts(result)
        roles = {"1/2": "FSFSFS", "full": "FFFFFF"}.get(pattern, pattern)
        for found in result["schedules"]:
            lacks = found["engine"] == "transformers" and config["model_type"] == "deepseek_v32"
            assert found["schedule"] == ("FFFFFF" if lacks else roles), found["engine"]


@pytest.mark.parametrize(
    ("keys", "stops"),
    [
        ({"index_topk_pattern": "fssfss"}, True),
        ({"index_topk_freq": None}, True),
        ({"index_topk_freq": 2, "index_skip_topk_offset": None}, True),
        ({"index_topk_freq": "4"}, True),
        ({"index_topk_pattern": "FSS"}, False),
        ({"index_topk_pattern": "fssfss", "indexer_types": types("FSSFSS")}, False),
    ],
)
@pytest.mark.parametrize("flags", ["", "--engine sglang", "--engine vllm --pattern FSFSFS"])
def test_a_config_that_no_engine_loads_fails_under_any_override(examined, keys, stops, flags):
    """vLLM and SGLang load glm_moe_dsa through transformers' class, which computes the types."""
    said = "stops before an override counts"
    assert (said in texts(examined(SMALL | keys, flags)[1])) == stops
    nested = {"model_type": "vl", "text_config": SMALL | keys}
    assert (said in texts(examined(nested, flags)[1])) == stops
    other = DEEPSEEK | {"num_hidden_layers": 6} | keys
    assert said not in texts(examined(other, flags)[1])


def test_a_pattern_that_is_none_is_examined_as_it_would_be_written(examined):
    code, result = examined(SMALL, "--pattern fss")
    assert code == 1
    assert kinds(result) >= {"letters", "length"}
    code, result = examined(SMALL, "--pattern FRRFRR")
    assert (code, "letters" in kinds(result)) == (1, True)
    assert examined(SMALL, "--pattern 1/0")[0] == 2


def test_overrides_of_the_user_are_taken_as_they_are(examined, tmp_path):
    nested = {"model_type": "vl", "text_config": SMALL}
    flat = json.dumps({"index_topk_pattern": "FSSFSS", "indexer_types": types("FSSFSS")})
    code, result = examined(nested, f"--pattern '{flat}'")
    assert (code, "nesting" in kinds(result)) == (1, True)
    script = tmp_path / "serve.sh"
    script.write_text(f"vllm serve MODEL --hf-overrides '{flat}'\n")
    code, result = examined(SMALL, f"--pattern {script}")
    assert code == 0, texts(result)
    alone = json.dumps({"index_topk_pattern": "FSSFSS"})
    code, result = examined(SMALL, f"--engine sglang --pattern '{alone}'")
    assert code == 1
    assert kinds(result) >= {"ignored"}
    assert result["schedules"][0]["schedule"] == "FFFFFF"


def test_an_engine_that_cannot_share_fails_only_if_it_is_named(examined):
    config = DEEPSEEK | {"num_hidden_layers": 6}
    code, result = examined(config, "--pattern FSSFSS")
    assert (code, "no sharing" in kinds(result, "warning")) == (0, True)
    code, result = examined(config, "--pattern FSSFSS --engine transformers")
    assert (code, "no sharing" in kinds(result)) == (1, True)
    minimax = SHAPES["MiniMax-M3"][0]
    assert examined(minimax, "--engine vllm")[0] == 1


def test_engines_that_were_only_read_fail_only_if_they_are_named(examined):
    config = SMALL | {"index_topk_freq": 3, "index_skip_topk_offset": 1}
    code, result = examined(config)
    assert (code, "rule" in kinds(result, "warning")) == (0, True)
    assert examined(config, "--engine atom")[0] == 1


@pytest.mark.parametrize(
    ("words", "code", "level"),
    [
        ("--pipeline-parallel-size 2", 0, None),
        ("--pipeline-parallel-size 3", 1, "error"),
        ("--pipeline-parallel-size 3 --engine sglang", 1, "error"),
        ("--pipeline-parallel-size 3 --engine sglang --engine-version 0.5.23", 0, "note"),
        ("--pipeline-parallel-size 3 --engine sglang --engine-version 0.5.10", 1, "error"),
    ],
)
def test_a_stage_that_begins_shared_fails(examined, words, code, level):
    found, result = examined(SMALL, f"--pattern FSSFSS {words}")
    assert found == code, texts(result)
    assert [h["level"] for h in result["hazards"] if h["kind"] == "stage"][:1] == (
        [level] if level else []
    )


@pytest.mark.parametrize(
    "keys",
    [
        {"text_config": {"index_topk_freq": 4}},
        {"text_config": {"indexer_types": types("FSSFSS")}, "index_topk_freq": 1},
        {"model_type": "deepseek_v32", "text_config": {"index_topk_pattern": "FSSFSS"}},
    ],
)
def test_keys_in_a_text_config_that_is_not_the_decoders_fail(examined, keys):
    base = {k: v for k, v in keys.items() if k == "model_type"}
    given = json.dumps({k: v for k, v in keys.items() if k != "model_type"})
    for code, result in (
        examined(SMALL | keys),
        examined(SMALL | base, f"--engine vllm --pattern {shlex.quote(given)}"),
    ):
        assert (code, "nesting" in kinds(result)) == (1, True)
        assert "write the keys there" in texts(result)


@pytest.mark.parametrize("key", ["indexer_types", "index_topk_pattern"])
def test_a_list_of_nulls_is_a_wrong_role(examined, key):
    code, result = examined(DEEPSEEK | {key: [None] * 61})
    assert (code, bool(kinds(result) & {"letters", "list"})) == (1, True)


def test_a_key_that_stands_twice_is_a_warning(examined, tmp_path):
    path = tmp_path / "config.json"
    for first, level in (("FSSFSS", set()), ("FSFSFS", {"twice"}), ("null", {"twice"})):
        keys = '"index_topk_pattern": "FSSFSS", ' + json.dumps(SMALL)[1:]
        path.write_text(f'{{"index_topk_pattern": "{first}", {keys}')
        code, result = examined(path)
        assert (code, kinds(result, "warning") & {"twice"}) == (0, level)


def test_a_factor_that_only_sglang_reads_fails(examined):
    config = DEEPSEEK | {"cli_factor": 4}
    assert examined(config)[0] == 1
    assert examined(config, "--engine vllm")[0] == 0


@pytest.mark.parametrize("version", ["0.33rc1", "0.33.0rc1+cu130", "0", "v0.29.dev3", "0.29a"])
def test_a_prerelease_has_the_rules_of_its_release(examined, checkpoint, version):
    """Every one of these fails on surplus tensors."""
    code, result = examined(
        checkpoint, f"--engine vllm --engine-version {version} --pattern FSSFSS"
    )
    assert (code, "surplus" in kinds(result)) == (1, True)


def test_a_pruned_checkpoint_passes_where_the_engine_without_sharing_is_not_named(
    examined, tmp_path
):
    make_model("deepseek_v32").save_pretrained(tmp_path / "m")
    export(tmp_path / "m", "FSFFFF", tmp_path / "out", engines=["vllm"], prune=True)
    code, result = examined(tmp_path / "out" / "checkpoint")
    assert (code, "no weights" in kinds(result, "warning")) == (0, True), texts(result)
    assert "makes layers 1 full" in texts(result)
    code, result = examined(tmp_path / "out" / "checkpoint", "--engine transformers")
    assert (code, "no weights" in kinds(result)) == (1, True)
    assert "it has no sharing for deepseek_v32, so choose another engine" in texts(result)


def test_tensor_parallel_must_divide_the_heads(examined):
    assert examined(SMALL, "--tensor-parallel-size 8")[0] == 0
    code, result = examined(SMALL, "--tensor-parallel-size 6")
    assert (code, "tensor parallel" in kinds(result)) == (1, True)


@pytest.mark.parametrize(
    ("roles", "layers", "level"),
    [
        (QUARTER, 78, "note"),
        (QUARTER[:61], 61, "error"),
        (QUARTER[:61].lower(), 61, "error"),
        (QUARTER[:24], 24, "error"),
        (QUARTER + "SSSF", 82, "error"),
        (PUBLISHED["1/2 pattern of GLM-5"][1][:61], 61, "error"),
        (SHIPPED[:61], 61, None),
        (QUARTER[:10], 10, None),
    ],
)
def test_copied_patterns_are_recognised(examined, roles, layers, level):
    config = GLM | {"num_hidden_layers": layers, "index_topk_pattern": roles}
    result = examined(config)[1]
    assert [h["level"] for h in result["hazards"] if h["kind"] == "copied"] == (
        [level] if level else []
    )


def test_a_published_pattern_is_found_by_its_beginning():
    assert copied_from(QUARTER[:15]) is None
    assert copied_from(QUARTER[:16])[0] == "1/4 pattern of GLM-5"
    assert copied_from("F" * 40) is None


def test_weights_decide_what_can_be_full_and_what_is_surplus(
    examined, checkpoint, tmp_path, monkeypatch
):
    code, result = examined(checkpoint)
    assert code == 0, texts(result)
    code, result = examined(checkpoint, "--pattern FSSFSS")
    assert (code, kinds(result)) == (1, {"surplus"})
    assert examined(checkpoint, "--pattern FSSFSS --engine sglang")[0] == 0
    for version, expected in (("0.28.1", 0), ("0.29.0", 1), ("0.33.2", 1), ("0.34", 0)):
        words = f"--pattern FSSFSS --engine vllm --engine-version {version}"
        assert examined(checkpoint, words)[0] == expected, version
    monkeypatch.setattr(weights, "plugin_installed", lambda: True)
    assert examined(checkpoint, "--pattern FSSFSS")[0] == 0
    out = tmp_path / "export"
    export(checkpoint, "FSSFSS", out, engines=["transformers"])
    pruned = out / "transformers"
    code, result = examined(pruned)
    assert code == 0, texts(result)
    assert "native" in kinds(result, "note")
    code, result = examined(pruned, "--pattern FSSSFS")
    assert (code, kinds(result)) == (1, {"no weights"})
    assert "layers 4 full" in texts(result)


def test_a_native_model_without_its_weights_is_a_warning(examined):
    code, result = examined(SHAPES["GLM-5.2"][0], "--pattern 1/4")
    assert code == 0
    assert "native" in kinds(result, "warning")
    assert "layers 4, 8, 12" in texts(result)


MEGATRON = "torchrun pretrain.py --dsa-indexer-topk-freq 3 --dsa-indexer-skip-topk-offset {}\n"


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("run.sh", MEGATRON.format(1), 0),
        ("run.sh", MEGATRON.format(0), 0),
        ("run.sh", MEGATRON.format(2), 1),
        ("a.yaml", "model:\n  dsa_indexer_topk_freq: 3\n", 0),
        ("a.yaml", "dsa_indexer_topk_freq: 2  # other\ndsa_indexer_skip_topk_offset: 1\n", 1),
        ("a.json", '{"dsa_indexer_topk_freq": 1}', 0),
        ("a.toml", "[model]\nuse_index_cache = true\nindex_topk_freq = 3\n", 0),
        ("a.toml", '[model]\nuse_index_cache = true\nindex_topk_pattern = "FSFSFS"\n', 1),
        ("a.yaml", "use_index_cache: true\nindexer_types: [full, shared, shared, full]\n", 1),
        ("a.yaml", "use_index_cache: true\nindexer_types:\n" + "  - full\n" * 6, 0),
        (
            "a.yaml",
            "use_index_cache: true\nindexer_types: [full, shared,\n shared, full, shared, shared]",
            0,
        ),
        ("run.sh", "train --use-index-cache --index-topk-freq=2\n", 1),
        ("a.yaml", "use_index_cache: true\n", 0),
        ("a.yaml", "learning_rate: 1\n", 2),
        ("gone.toml", None, 2),
    ],
)
def test_training_with_another_pattern_fails(examined, tmp_path, name, text, code):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    config = SMALL | {"index_topk_freq": 3, "index_skip_topk_offset": 1}
    found, result = examined(config, f"--engine vllm sglang transformers --train-config {file}")
    assert found == code, result
    if code == 1:
        assert "training" in kinds(result)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--engine-version 0.33", "name it with --engine"),
        ("--engine vllm sglang --engine-version 0.33", "name it with --engine"),
        ("--engine vllm --engine-version new", "is no version"),
        ("--tensor-parallel-size 0", "at least 1"),
        ("--pipeline-parallel-size 7", "cannot be cut into 7"),
        ("--pattern nowhere/file", "no such file"),
        ("--engine trt", "--engine"),
    ],
)
def test_bad_input_is_one_sentence(examined, words, says):
    code, message = examined(SMALL, words)
    assert code == 2
    assert says in message
    assert len(message.splitlines()) == 1


def test_a_model_without_indexer_is_bad_input(examined):
    code, message = examined({"model_type": "llama", "num_hidden_layers": 2})
    assert code == 2
    assert "'llama' is not known to have an indexer" in message


@pytest.mark.parametrize(
    "keys", [{"num_hidden_layers": 10**9}, {"num_nextn_predict_layers": "one"}]
)
def test_a_config_with_impossible_numbers_is_bad_input(examined, keys):
    assert examined(SMALL | keys)[0] == 2


@pytest.mark.parametrize("value", [[], {}, [{}], [None] * 6, 0, -1, 1e308, float("nan"), "F", True])
def test_no_value_of_a_key_is_a_bug(examined, value):
    for key in ("index_topk_pattern", "indexer_types", "index_topk_freq", "use_index_cache"):
        assert examined(SMALL | {key: value})[0] in (0, 1, 2), key
    assert examined(SMALL | {"index_topk_freq": 2, "index_skip_topk_offset": value})[0] < 3


def test_a_newer_version_is_a_warning_and_an_older_one_an_error(examined):
    code, result = examined(SMALL, "--engine vllm --engine-version 0.40")
    assert (code, "version" in kinds(result, "warning")) == (0, True)
    code, result = examined(SMALL, "--engine vllm --engine-version 0.10")
    assert (code, "version" in kinds(result)) == (1, True)
