"""Every file and folder that holds a pattern is read as one, whoever wrote it."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from indexcache.cli.timing import split
from indexcache.pattern import Pattern
from indexcache.spec import parse_pattern
from tests.support import refused

ROLES = "FFSFSF"
KEYS = Pattern(ROLES).to_config()
OVERRIDES = json.dumps({"use_index_cache": True, "index_topk_pattern": ROLES})
TYPES = json.dumps({"indexer_types": Pattern(ROLES).to_types()})
FREQUENCY = {"index_topk_freq": 2, "index_skip_topk_offset": 2}
SCRIPT = f"""#!/bin/bash
# vllm serve old --hf-overrides '{{"index_topk_pattern": "FSSSSS"}}'
vllm serve zai/GLM-5 --tensor-parallel-size 8 \\
  --hf-overrides '{OVERRIDES}' \\
  --max-model-len 200000
"""
QUOTED = OVERRIDES.replace('"', '\\"')
CONTENTS = {
    "pattern.json": json.dumps(Pattern(ROLES).facts()),
    "overrides.json": OVERRIDES,
    "types.json": TYPES,
    "both.json": json.dumps(KEYS),
    "nested.json": json.dumps({"text_config": KEYS}),
    "twice.json": json.dumps(KEYS | {"text_config": KEYS}),
    "neutral.json": json.dumps(KEYS | {"index_topk_freq": 1}),
    "vllm.txt": f"--hf-overrides '{OVERRIDES}'\n",
    "equals.txt": f"--hf-overrides={QUOTED}",
    "sglang.txt": f"--json-model-override-args '{TYPES}'",
    "serve.sh": SCRIPT,
    "double.sh": f'vllm serve x --hf-overrides "{QUOTED}" --port 1',
    "both.sh": f"a --hf-overrides '{OVERRIDES}'\nb --json-model-override-args '{TYPES}'\n",
    "continued.sh": 'x --hf-overrides "' + QUOTED.replace(", ", ", \\\n ") + '" --port 1',
    "variable.sh": f"O='{OVERRIDES}'\nvllm serve x --hf-overrides \"$O\" ${{MORE}}\n",
    "llm.py": f'LLM("x", hf_overrides={OVERRIDES.replace("true", "True")})',
    "pod.json": json.dumps({"args": ["--hf-overrides", OVERRIDES]}),
    "dotted.sh": f"vllm serve x --hf-overrides.index_topk_pattern {ROLES} --port 1",
    "dotted_text.sh": f"vllm serve x --hf-overrides.text_config.index_topk_pattern={ROLES}",
    "vllm.yaml": f"model: x\nhf-overrides: {OVERRIDES}\n",
    "compose.yaml": f'command: ["--hf-overrides", "{QUOTED}"]\n',
    "vllm_config.json": json.dumps({"model": "x", "hf_overrides": {"index_topk_pattern": ROLES}}),
    "string.json": json.dumps({"hf-overrides": OVERRIDES}),
    "config.json": json.dumps({"num_hidden_layers": 6, **KEYS}),
    "multimodal.json": json.dumps(
        {"model_type": "glm5v", "text_config": {"num_hidden_layers": 6, **KEYS}}
    ),
    "flat_over_nested.json": json.dumps({**KEYS, "text_config": {"num_hidden_layers": 6}}),
    "bom.txt": "\ufeff" + ROLES,
    "evaluate.toml": f'pattern = ["{ROLES}"]\nsequences = 3\n',
    "one.toml": f'pattern = "{ROLES}"\n',
    "evidence.json": json.dumps({"rows": [{"pattern": ROLES}, {"pattern": ROLES}]}),
    "distill.json": json.dumps({"pattern": ROLES, "stage": "warmup"}),
    "search.json": json.dumps(
        {"frontier": [{"full": 4, "pattern": ROLES}], "calibration": {"digests": ["d"]}}
    ),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_is_read_as_a_pattern(folder, name):
    (folder / name).write_text(CONTENTS[name], encoding="utf-8")
    for spec in (name, str(folder / name), f"x={name}"):
        assert str(parse_pattern(spec, 6).pattern) == ROLES
    assert str(parse_pattern(f"{name}+R2", 6).pattern) == "FFRFRF@2"
    refused(lambda: parse_pattern(name, 7), "7")


def test_a_frequency_takes_the_layers_of_the_model(folder):
    (folder / "o.json").write_text(json.dumps(FREQUENCY))
    assert str(parse_pattern("o.json", 6).pattern) == "FFSFSF"
    assert str(parse_pattern("o.json", 9).pattern) == "FFSFSFSFS"
    refused(lambda: Pattern.from_file("o.json"), "o.json", "no pattern")


@pytest.mark.parametrize("spec", [OVERRIDES, TYPES, json.dumps(Pattern(ROLES).to_types())])
def test_json_is_read_where_a_file_is(spec):
    assert str(parse_pattern(spec, 6).pattern) == ROLES
    assert split((spec, "1/2,1/4")) == [spec, "1/2", "1/4"]


def test_a_path_may_have_an_equals_sign(folder):
    (folder / "lr=1").mkdir()
    (folder / "lr=1" / "p.json").write_text(OVERRIDES)
    assert parse_pattern("lr=1/p.json", 6).name == "lr=1/p.json"
    assert str(parse_pattern("lr=1/p.json", 6).pattern) == ROLES


def test_a_delta_names_the_pattern_it_was_trained_for(folder):
    save_file({"a": torch.zeros(1)}, folder / "delta.safetensors", {"pattern": "FFRFRF@2"})
    assert str(parse_pattern("delta.safetensors", 6).pattern) == "FFRFRF@2"
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    refused(lambda: parse_pattern("model.safetensors", 6), "model.safetensors", "no delta")
    (folder / "cut.safetensors").write_bytes(b"x")
    refused(lambda: parse_pattern("cut.safetensors", 6), "cut.safetensors")


@pytest.mark.parametrize("name", ["pattern.json", "config.json", "result.json", "evidence.json"])
def test_a_folder_is_read_by_what_lies_in_it(folder, name):
    (folder / "d").mkdir()
    content = CONTENTS["distill.json" if name == "result.json" else name]
    (folder / "d" / name).write_text(content)
    assert str(parse_pattern("d", 6).pattern) == ROLES
    refused(lambda: parse_pattern("d:1/4", 6), "d")


REFUSED = [
    ({"index_topk_pattern": ROLES, "indexer_types": ["full"] * 6}, ["FFSFSF", "FFFFFF"]),
    ({"text_config": KEYS, "index_topk_pattern": "FFFFFF"}, ["index_topk_pattern", "twice"]),
    ({"use_index_cache": True}, ["no pattern", "index_topk_pattern"]),
    ({"rope_scaling": {"factor": 4}}, ["no pattern"]),
    ({"index_topk_pattern": "ffsfsf"}, ["'f'", "Write 'F'"]),
    ({"index_topk_pattern": "FFRFRF"}, ["R"]),
    ({"pattern": None}, ["no pattern"]),
    ({"pattern": ROLES, "indexer_types": ["full"] * 6}, ["indexer_types"]),
    ({"rows": [{"pattern": ROLES}, {"pattern": "FSSSSS"}]}, ["2 different"]),
    ({"rows": []}, ["0 different"]),
    ({"frontier": []}, ["not the result"]),
    ("vllm serve x --port 1", ["no pattern"]),
    ("--hf-overrides '{index_topk_pattern: F}'", ["no JSON"]),
    (CONTENTS["vllm.txt"] + CONTENTS["vllm.txt"].replace(ROLES, "FSSSSS"), ["2"]),
    ("{" * 100_000, ["no pattern"]),
    ('{"a": 1}\n{"a": 2}\n', ["no pattern"]),
]


@pytest.mark.parametrize(("content", "parts"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_pattern_is_refused_with_its_file(folder, content, parts):
    (folder / "f.json").write_text(content if isinstance(content, str) else json.dumps(content))
    refused(lambda: parse_pattern("f.json", 6), "f.json", *parts)


@pytest.mark.parametrize(
    "text", ["", "a = 1", 'pattern = ["F", "S"]', "pattern = 3", 'pattern = "f.toml"', "= ="]
)
def test_settings_without_one_pattern_are_refused(folder, text):
    (folder / "f.toml").write_text(text)
    refused(lambda: parse_pattern("f.toml", 6), "f.toml")


def test_special_files_and_broken_json_are_refused(folder):
    os.mkfifo(folder / "pipe")
    refused(lambda: parse_pattern("pipe", 6), "pipe", "neither")
    refused(lambda: parse_pattern("/dev/zero", 6), "/dev/zero")
    refused(lambda: parse_pattern('{"index_topk_pattern": ', 6), "JSON")
    refused(lambda: parse_pattern('{"a": 3}', 6), "no pattern")
