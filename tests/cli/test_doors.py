"""Walk every verb with every kind of input and of pattern source: right, or one sentence."""

from __future__ import annotations

import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from indexcache import load as real_load
from indexcache.checkpoint import fingerprint
from indexcache.cli import VERBS, main
from indexcache.exporting import export
from indexcache.models.loading import describe
from tests.fp8_support import FP8, edit_config, save_sharded, write_fp8, write_tokenizer
from tests.support import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
REACHED = "every check was passed"
MODELS = ("single", "sharded", "nested", "pruned", "fp8", "bare tokens", "shares", "mtp", "tiny")
BARE = ("config.json", "config", "nested config.json", "fp8 config.json")
DAMAGED = ("damaged", "no indexer", "llama", "lfs", "bad pattern")
OTHER = ("text.txt", "run", "missing", "empty", *DAMAGED)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of inputs, named as in MODELS, BARE and OTHER, and of pattern sources."""
    root = tmp_path_factory.mktemp("doors")
    single = root / "single"
    make_model("glm_moe_dsa").save_pretrained(single)
    write_tokenizer(single)
    weights = load_file(single / "model.safetensors")
    config = json.loads((single / "config.json").read_text())

    def copy(name, tensors=None, **changes):
        shutil.copytree(single, root / name)
        edit_config(root / name, **changes)
        if tensors is not None:
            save_file(tensors, root / name / "model.safetensors", {"format": "pt"})
        return root / name

    (copy("sharded") / "model.safetensors").unlink()
    save_sharded(root / "sharded", weights, 3)
    copy("nested", {n.replace("model.", "model.language_model.", 1): w for n, w in weights.items()})
    nested = json.dumps({"model_type": "glm5v", "text_config": config})
    (root / "nested" / "config.json").write_text(nested)
    export(single, "FSFSFS", root / "export")
    shutil.copytree(root / "export" / "transformers", root / "pruned")
    write_fp8(root / "fp8", "glm_moe_dsa")
    (copy("bare tokens") / "tokenizer.json").unlink()
    (root / "bare tokens" / "tokenizer_config.json").unlink()
    copy("shares", indexer_types=["full", "shared"] * 3)
    last = [n for n in weights if "layers.5." in n]
    behind = {n.replace("layers.5.", "layers.6."): weights[n].clone() for n in last}
    copy("mtp", weights | behind | {"model.layers.6.eh_proj.weight": torch.zeros(32, 64)},
         num_nextn_predict_layers=1)  # fmt: skip
    (root / "config").mkdir()
    shutil.copy(single / "config.json", root / "config")
    shutil.copy(single / "config.json", root / "config.json")
    (root / "nested config.json").write_text(nested)
    (root / "fp8 config.json").write_text(json.dumps(config | {"quantization_config": FP8}))
    (root / "text.txt").write_text("Once upon a time. " * 400)
    (root / "prompt.txt").write_text("Once upon a time")
    (root / "empty").mkdir()
    (copy("damaged") / "model.safetensors").write_bytes(b"\0" * 100)
    copy("no indexer", {n: w for n, w in weights.items() if "indexer" not in n})
    copy("llama", model_type="llama")
    (copy("lfs") / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    copy("bad pattern", indexer_types=None, index_topk_pattern="fsfsfs")
    (root / "ids").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        np.save(root / "ids" / f"{i}.npy", rng.integers(0, 128, 400))
    (root / "run").mkdir()
    points = [{"full": 6, "pattern": "F" * 6}, {"full": 3, "pattern": "FSFSFS"}]
    result = {"frontier": points, "calibration": {"digests": []}}
    (root / "run" / "result.json").write_text(json.dumps(result))
    (root / "run" / "journal.jsonl").write_text("{}\n")
    meta = {"format": "indexcache-delta-1", "pattern": "FSFSFS", "base_digest": fingerprint(single)}
    full = tuple(f"model.layers.{i}.self_attn.indexer." for i in (0, 2, 4))
    kept = {n: w for n, w in weights.items() if n.startswith(full)}
    save_file(kept, root / "delta.safetensors", meta)
    (root / "settings.toml").write_text('pattern = "run:1/2"\n')
    (root / "serve.sh").write_text("vllm serve x " + (root / "export" / "vllm.txt").read_text())
    (root / "roles.txt").write_text("FSFSFS\n")
    return root


@pytest.fixture
def walk(place, monkeypatch, capsys, tmp_path):
    """Run a verb up to the loading of the weights; return its exit code and last line of stderr."""

    def load(path, **settings):
        describe(path)
        raise ValueError(REACHED)

    # All are imported before any is patched, or one would take the patched function for good.
    readers = ("models.loading", "bench.subject", "distilling.run")
    for module in [importlib.import_module(f"indexcache.{name}") for name in readers]:
        monkeypatch.setattr(module, "load", load)
    monkeypatch.chdir(place)
    text = ["--data", "ids", "--split", "all", "--length", "256", "--sequences", "4"]
    out = str(tmp_path / "out")
    rows = [{"ids": [(i * j) % 90 for j in range(300)], "domain": "ab"[i % 2]} for i in range(16)]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, rows)))
    two = ["--data", str(tmp_path / "two.jsonl"), "--length", "256", "--sequences", "1"]
    more = {
        "inspect": [],
        "overlap": ["--out", out, *text],
        "search": ["--out", out, *text],
        "matrix": ["--out", out, *two],
        "evaluate": text,
        "distill": ["--out", out, *text[:2], "--length", "256", "--eval-every", "0"],
        "export": ["--out", out, "--engine", "vllm"],
        "bench": ["--contexts", "100", "--device", "cpu"],
        "profile": ["--contexts", "100", "--device", "cpu"],
        "generate": ["--prompt-file", "prompt.txt", "--max-new-tokens", "8"],
        "doctor": [],
        "plan": ["--gpu", "H100", "--context", "100", "--output-tokens", "10", "--price", "1"],
    }  # fmt: skip

    def call(verb, model, pattern=None):
        named = []
        if pattern is not None:
            named = ["--patterns" if verb == "bench" else "--pattern", pattern]
        shutil.rmtree(out, ignore_errors=True)
        code = main([verb, model, *more[verb], *named])
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("indexcache: ") and "note:" not in line]
        assert code in ((0, 1, 2) if verb == "doctor" else (0, 2)), lines
        assert len(errors) == (code == 2), lines
        assert "\n".join(lines).count("Traceback") == 0
        return code, errors[0] if errors else ""

    return call


NEEDS_PATTERN = ("evaluate", "distill", "export")
TAKES_MODEL = [v for v in VERBS if v != "report"]
LOADS = ("overlap", "search", "matrix", "evaluate", "distill", "bench", "profile", "generate")


@pytest.mark.parametrize("verb", TAKES_MODEL)
def test_every_model_is_taken_by_every_verb(walk, verb):
    assert set(TAKES_MODEL) == {*LOADS, "inspect", "export", "plan", "doctor"}
    for model in MODELS:
        layers = {"tiny": "FSSSSSSSSSSS", "fp8": "FSS"}.get(model, "FSFSFS")
        code, said = walk(verb, model, layers if verb in NEEDS_PATTERN else None)
        if verb not in LOADS:
            assert code in (0, 1), (model, said)  # Only doctor gives 1, for what it finds.
        elif verb == "generate" and model == "bare tokens":
            assert "tokenizer" in said
        elif verb in ("bench", "profile") and model == "pruned":
            assert "no indexer weights" in said  # Its default patterns have more full layers.
        else:
            assert REACHED in said, (model, said)


@pytest.mark.parametrize("verb", TAKES_MODEL)
def test_a_config_alone_serves_the_verbs_that_need_no_weights(walk, verb):
    for model in BARE:
        code, said = walk(verb, model, "FSFSFS" if verb in NEEDS_PATTERN else None)
        if verb in ("inspect", "export", "plan", "doctor"):
            assert code in (0, 1), (model, said)
        else:
            assert code == 2, model
            assert REACHED not in said
            assert any(word in said for word in ("is a file", "no model.safetensors", "bench.json"))


@pytest.mark.parametrize("verb", TAKES_MODEL)
def test_everything_else_is_one_sentence(walk, verb):
    for model in OTHER:
        code, said = walk(verb, model, "FSFSFS" if verb in NEEDS_PATTERN else None)
        if (verb, model) == ("export", "bad pattern") or (
            verb == "plan" and model in DAMAGED and model != "llama"
        ):
            assert code == 0, (model, said)  # It is replaced there; plan needs the config alone.
            continue
        if verb == "doctor" and code == 1:
            continue  # It says what is wrong with a checkpoint that it can read.
        assert code == 2, model
        assert REACHED not in said, model
        assert model in said or "no indexer" in said, (model, said)


SOURCES = (
    "FSFSFS", "uniform:1/2", "1/2", "full", "roles.txt", "run", "run:1/2", "run:3", "x=run",
    "run/result.json", "export", "export/pattern.json", "export/vllm.json", "export/sglang.json",
    "export/vllm.txt", "export/sglang.txt", "export/transformers", "pruned/config.json", "shares",
    "serve.sh", "delta.safetensors", "settings.toml", '{"index_topk_pattern": "FSFSFS"}',
)  # fmt: skip
NO_SOURCES = ("text.txt", "missing.json", "empty", "ids/0.npy", "model.safetensors", "run:1/4", "")


@pytest.mark.parametrize(
    "verb", [v for v in TAKES_MODEL if v not in ("inspect", "search", "matrix", "plan")]
)
def test_every_verb_reads_every_source_of_a_pattern(walk, verb):
    taken = REACHED if verb in LOADS else ""
    for i, source in enumerate(SOURCES):
        code, said = walk(verb, "single", source)
        expected = (2,) if taken else (0, 1) if verb == "doctor" else (0,)
        assert code in expected, (i, source, said)
        assert taken in said
    for source in NO_SOURCES:
        code, said = walk(verb, "single", source)
        assert code == 2, source
        assert REACHED not in said


def test_what_is_exported_is_what_the_checkpoint_says(place):
    """The pattern, the quantisation and the MTP layers of a copy are those of its source."""
    assert describe(place / "pruned")["native_pattern"] == "FSFSFS"
    assert str(real_load(place / "pruned").native) == "FSFSFS"
    assert describe(place / "nested")["nested"]
    assert describe(place / "mtp")["mtp_layers"] == 1
    assert describe(place / "fp8")["quantization"].bits == 8
