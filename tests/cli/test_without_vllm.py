"""Run every verb where vLLM cannot be imported, and as little of vLLM's side as they need."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import indexcache
from indexcache.cli import VERBS, main
from indexcache.engines.vllm import engine, plugin
from indexcache.engines.vllm.settings import VllmSettings
from tests.fp8_support import write_tokenizer
from tests.stand_ins import FakeLlm, worker
from tests.support import make_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, token ids and an empty folder of runs."""
    root = tmp_path_factory.mktemp("place")
    make_model("glm_moe_dsa").save_pretrained(root / "model")
    write_tokenizer(root / "model")
    (root / "prompt.txt").write_text("Once")
    lines = [json.dumps({"ids": [(7 * i + j) % 128 for j in range(600)]}) for i in range(8)]
    (root / "ids.jsonl").write_text("\n".join(lines))
    kinds = [
        json.dumps({"ids": [(i + (i + 3) * j * j) % 127 for j in range(80)], "domain": "ab"[i % 2]})
        for i in range(24)
    ]
    (root / "kinds.jsonl").write_text("\n".join(kinds))
    return root


TEXT = "--data ids.jsonl --split all --length 64 --sequences 2"
COMMANDS = {
    "inspect": "",
    "overlap": f"{TEXT} --out runs/overlap",
    "search": f"{TEXT} --out runs/search --keep 5/6 --no-uniform",
    "evaluate": f"{TEXT} --pattern 1/2",
    "matrix": "--data kinds.jsonl --length 64 --sequences 1 --heldout-sequences 2 --keep 5/6 "
    "--out runs/matrix",
    "distill": "--data ids.jsonl --length 64 --steps 1 --eval-every 0 --pattern 1/2 "
    "--out runs/distill",
    "export": "--pattern 1/2 --out runs/export",
    "doctor": "--pattern 1/2 --engine sglang",
    "bench": "--contexts 16 --patterns 1/2 --device cpu --no-plot --decode-tokens 1",
    "profile": "--contexts 16 --device cpu --decode-tokens 1",
    "generate": "--prompt-file prompt.txt --max-new-tokens 2",
    "plan": "--gpu H100 --context 100 --output-tokens 10 --price 1",
}


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "report"])  # It takes no model.
def test_every_verb_works_without_vllm(place, monkeypatch, capsys, verb):
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "vllm", None)  # An import of it fails, and it is not found.
    assert main([verb, "model", *COMMANDS[verb].split()]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("verb", ["search", "evaluate"])
def test_the_engine_says_how_to_get_it_before_anything_is_read(place, monkeypatch, capsys, verb):
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(engine, "start", lambda *_a, **_k: pytest.fail("was started"))
    assert main([verb, "model", *COMMANDS[verb].split(), "--engine", "vllm"]) == 2
    said = capsys.readouterr().err
    assert "vLLM is not installed here" in said
    assert "pip install indexcache[vllm]" in said
    assert said.count("\n") == 1


def test_the_modules_for_vllm_import_nothing_heavy_and_no_vllm():
    """vLLM loads the plugin in every process, and the command line reads the settings."""
    code = (
        "import sys, indexcache.engines.vllm.plugin, indexcache.engines.vllm.settings\n"
        "import indexcache.cli, indexcache.exporting\n"
        "indexcache.engines.vllm.plugin.register()\n"
        "heavy = ('torch', 'transformers', 'vllm', 'triton', 'matplotlib', 'scipy')\n"
        "sys.exit(' '.join(m for m in heavy if m in sys.modules) or 0)"
    )
    root = str(Path(indexcache.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("version", "inside"),
    [
        ("0.25.0", True),
        ("0.33.2.dev7+g12", True),
        ("0.24.3", False),
        ("0.34.0rc1", False),
        ("0.33.0rc1+cu130", True),
        ("dev", False),
        (None, False),
        ("1.0", False),
    ],
)
def test_a_version_outside_the_tested_range_is_warned_of(
    place, monkeypatch, capsys, version, inside
):
    """The run goes on: its gates decide."""
    stand_in = SimpleNamespace(LLM=lambda model, **_k: FakeLlm([worker()]), __spec__=object())
    monkeypatch.setitem(sys.modules, "vllm", stand_in)

    def installed(name):
        if version is None:  # A copy on the path, without metadata.
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    version_shown = version or "unknown"
    started = engine.start(str(place / "model"), VllmSettings(), length=64)
    started.report()
    said = capsys.readouterr().err
    assert f"vLLM {version_shown}" in said
    warned = f"tested with vLLM 0.25 to 0.33, not with {version_shown}" in said
    assert warned != inside
    assert ("warning" in started.facts) != inside
    assert (plugin.untested(version_shown) is None) == inside
