"""Run verbs: good input gives results, and bad input gives one sentence and exit code 2."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

from indexcache.cli import main
from indexcache.records import Run, write_json


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [
        {
            "text": f"{d} {i} " + "".join(chr(97 + (i * j * j + j) % 26) for j in range(300)),
            "domain": d,
        }
        for d in "ab"
        for i in range(12)
    ]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


def copy_of(checkpoint, tmp_path, **config):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    if config:
        value = json.loads((folder / "config.json").read_text())
        value = {k: v for k, v in (value | config).items() if v is not None}
        (folder / "config.json").write_text(json.dumps(value))
    return folder


def run(command: str) -> int:
    """Run a command as a user types it, without the name of the program."""
    return main(shlex.split(command))


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, command: str, says: str) -> None:
    """Expect exit code 2, nothing on stdout, and one line on stderr that has `says`."""
    assert run(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [x for x in captured.err.splitlines() if x.startswith("indexcache: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    assert says in lines[0], lines[0]


COMMON = "--length 64 --sequences 4"


def test_every_verb_on_one_checkpoint(checkpoint, text, tmp_path, capsys):
    search = tmp_path / "search"
    assert run(f"inspect {checkpoint} --json") == 0
    assert last_json(capsys)["num_hidden_layers"] == 6
    assert run(f"search {checkpoint} --data {text} --out {search} --keep 1/3 --json {COMMON}") == 0
    printed = last_json(capsys)
    assert printed == json.loads((search / "result.json").read_text())
    assert [p["full"] for p in printed["frontier"]] == [6, 5, 4, 3, 2]
    assert all(set(p) >= {"full", "pattern", "loss"} for p in printed["frontier"])
    patterns = ["uniform:1/3", f"{search}:1/2", f"best={search}", f"r={search}+R2"]
    evaluate = (
        f"evaluate {checkpoint} --data {text} --pattern {' '.join(patterns)} --json "
        f"--out {tmp_path / 'ev'} {COMMON}"
    )
    assert run(evaluate) == 0
    rows = last_json(capsys)["rows"]
    assert {r["domain"] for r in rows} == {"all", "a", "b"}
    names = [r["name"] for r in rows if r["domain"] == "all"]
    assert names == ["uniform:1/3", f"{search}:1/2", "best", "r"]
    keys = {"pattern", "domain", "delta_loss", "ci_low", "ci_high", "kl", "tokens"}
    assert all(set(r) >= keys for r in rows)
    assert rows[-1]["pattern"].endswith("@2")
    assert run(f"{evaluate} --against uniform:1/3") == 0
    shown = capsys.readouterr().out
    assert "vs uniform:1/3" in shown
    assert json.loads(shown.splitlines()[-1])["baseline"] == "FSSFSS"
    assert run(f"{evaluate} --most 1000 --allow-blind") == 1  # Four documents are no evidence.
    assert "inconclusive" in capsys.readouterr().out
    overlap = tmp_path / "overlap"
    command = f"overlap {checkpoint} --data {text} --pattern {search} --out {overlap} {COMMON}"
    assert run(command) == 0
    assert (overlap / "overlap.png").stat().st_size > 5000
    assert run(f"export {checkpoint} --pattern {search} --out {tmp_path / 'ex'} --json") == 0
    files = last_json(capsys)["files"]
    assert set(files) == {"transformers", "vllm", "sglang"}


def test_search_and_evaluate_share_no_document(checkpoint, text, tmp_path, capsys):
    assert run(f"search {checkpoint} --data {text} --out {tmp_path / 's'} --keep 1/2 {COMMON}") == 0
    capsys.readouterr()
    for pattern in (tmp_path / "s", tmp_path / "s" / "pattern.json", f"x={tmp_path / 's'}:1/2+R2"):
        refused(
            capsys,
            f"evaluate {checkpoint} --data {text} --split calibration --pattern {pattern} {COMMON}",
            says="held-out documents were calibration text",
        )


def test_changed_settings_data_or_model_are_refused(checkpoint, text, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    def search(model, data) -> str:
        return f"search {model} --data {data} --out {tmp_path / 's'} --keep 1/2 {COMMON}"

    first = search(checkpoint, text)
    assert run(first) == 0
    capsys.readouterr()
    refused(capsys, f"{first} --keep 1/3", says="keep was 0.5, now 0.333")
    refused(capsys, f"{first} --seed 1", says="other settings")
    other = tmp_path / "other.jsonl"
    other.write_text(text.read_text().replace("a 0", "a zero"))
    refused(capsys, search(checkpoint, other), says="data was")
    folder = copy_of(checkpoint, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.self_attn.o_proj.weight"][1, 2] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(capsys, search(folder, text), says="model was")


def test_a_sharing_config_with_all_indexers_is_not_native(checkpoint, text, tmp_path, capsys):
    """Such a config only overrides: the baseline runs all indexers, and a search is possible."""
    assert run(f"export {checkpoint} --pattern FSSSSS --out {tmp_path / 'e'} --no-prune") == 0
    shared = tmp_path / "e" / "transformers"
    capsys.readouterr()
    rows = []
    for folder in (checkpoint, shared):
        assert run(f"evaluate {folder} --data {text} --pattern FSSSSS --json {COMMON}") == 0
        rows.append(last_json(capsys)["rows"])
    assert rows[0] == rows[1]
    assert rows[0][0]["kl"] > 0.01
    assert run(f"search {shared} --data {text} --out {tmp_path / 's'} --keep 1/2 {COMMON}") == 0
    assert "FFFFFF" in capsys.readouterr().out


def test_settings_from_toml(checkpoint, text, tmp_path, capsys):
    config = tmp_path / "search.toml"
    config.write_text(
        f'data = "{text}"\nlength = 64\nsequences = 4\nkeep = "1/2"\nout = "{tmp_path / "run"}"\n'
    )
    assert run(f"search {checkpoint} --config {config} --keep 5/6 --json") == 0
    assert last_json(capsys)["frontier"][-1]["full"] == 5


def test_wrong_patterns_are_refused(checkpoint, text, capsys):
    for pattern, says in (
        ("FSS", "has 3 layers, but the model has 6"),
        ("SFFFFF", "must be F"),
        ("fsssss", "Write 'F'"),
        ("FSSXSS", "'X'"),
        ("FRRRRR@0", "at least 1"),
        ("nowhere/run:1/4", "no such file or run folder"),
    ):
        refused(
            capsys, f"evaluate {checkpoint} --data {text} --pattern {pattern} {COMMON}", says=says
        )


def test_short_and_long_sequences_are_refused(checkpoint, text, tmp_path, capsys):
    refused(
        capsys,
        f"search {checkpoint} --data {text} --out {tmp_path / 's'} --length 16",
        says="too short for this model",
    )
    refused(
        capsys,
        f"overlap {checkpoint} --data {text} --out {tmp_path / 'o'} --length 31",
        says="index_topk = 8",
    )
    refused(
        capsys,
        f"evaluate {checkpoint} --data {text} --pattern FSSSSS --length 10000",
        says="longer than the model's context",
    )


def test_nan_losses_are_refused(checkpoint, text, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = copy_of(checkpoint, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(capsys, f"search {folder} --data {text} --out {tmp_path / 's'} {COMMON}", says="is nan")
    refused(capsys, f"evaluate {folder} --data {text} --pattern FSSSSS {COMMON}", says="not finite")


def test_truncated_checkpoints_are_refused(checkpoint, text, tmp_path, capsys):
    folder = copy_of(checkpoint, tmp_path)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for size in (0, 5, 200, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:size])
        refused(capsys, f"inspect {folder}", says="model.safetensors")
        refused(
            capsys,
            f"evaluate {folder} --data {text} --pattern FSSSSS {COMMON}",
            says="model.safetensors",
        )
        refused(
            capsys,
            f"export {folder} --pattern FSSSSS --out {tmp_path / 'e'}",
            says="model.safetensors",
        )
    assert not (tmp_path / "e").exists()


def test_weights_that_are_not_safetensors_are_refused(checkpoint, tmp_path, capsys):
    folder = copy_of(checkpoint, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused(capsys, f"inspect {folder}", says="safetensors")


def test_a_full_disk_keeps_what_was_done(checkpoint, text, tmp_path, capsys, monkeypatch):
    append = Run.append
    entries = []

    def full(self, entry):
        entries.append(entry)
        if len(entries) == 4:
            raise OSError(28, "No space left on device", str(self.folder / "journal.jsonl"))
        append(self, entry)

    search = f"search {checkpoint} --data {text} --out {tmp_path / 's'} {COMMON}"
    monkeypatch.setattr(Run, "append", full)
    refused(capsys, search, says="disk is full")
    monkeypatch.undo()
    assert len((tmp_path / "s" / "journal.jsonl").read_text().splitlines()) == 3
    assert run(search) == 0
    import indexcache.evals.evaluate  # noqa: F401  # It must be imported before the patch.

    def no_room(path, value):
        if path.name == "evidence.json":
            raise OSError(28, "No space left on device", str(path))
        write_json(path, value)

    monkeypatch.setattr("indexcache.records.write_json", no_room)
    out = tmp_path / "evidence"
    assert run(f"evaluate {checkpoint} --data {text} --pattern FSSSSS --out {out} {COMMON}") == 2
    captured = capsys.readouterr()
    assert "disk is full" in captured.err
    assert "vs full" in captured.out  # The finished table is printed before it is written.
    monkeypatch.undo()
    assert run(f"evaluate {checkpoint} --data {text} --pattern FSSSSS --out {out} {COMMON}") == 0
    assert sorted(p.name for p in out.iterdir()) == ["evidence.json"]


def test_unknown_models_are_refused(checkpoint, text, tmp_path, capsys):
    refused(capsys, f"inspect {tmp_path / 'nowhere'}", says="no such checkpoint folder")
    refused(
        capsys,
        f"search deepseek-ai/DeepSeek-V3.2 --data {text} --out {tmp_path / 's'}",
        says="nothing is downloaded",
    )
    folder = copy_of(checkpoint, tmp_path, model_type="llama")
    refused(capsys, f"inspect {folder}", says="'llama' is not a DSA family")
    refused(
        capsys,
        f"evaluate {folder} --data {text} --pattern FSSSSS",
        says="'llama' is not a DSA family",
    )
    (folder / "config.json").write_text("{")
    refused(capsys, f"inspect {folder}", says="config.json")
    (folder / "config.json").unlink()
    refused(capsys, f"inspect {folder}", says="config.json")


def test_missing_indexers_are_not_made_at_random(checkpoint, text, tmp_path, capsys):
    out = tmp_path / "export"
    assert run(f"export {checkpoint} --pattern FSSFSS --out {out} --engine transformers") == 0
    pruned = out / "transformers"
    capsys.readouterr()
    refused(
        capsys,
        f"search {pruned} --data {text} --out {tmp_path / 's'} {COMMON}",
        says="no indexer of their own",
    )
    refused(
        capsys,
        f"evaluate {pruned} --data {text} --pattern FFSFSS {COMMON}",
        says="no indexer weights",
    )
    config = json.loads((pruned / "config.json").read_text())
    for key in ("indexer_types", "index_topk_pattern", "index_topk_freq"):
        config.pop(key, None)
    (pruned / "config.json").write_text(json.dumps(config))
    refused(
        capsys, f"evaluate {pruned} --data {text} --pattern FSSFSS {COMMON}", says="random numbers"
    )


def test_bad_text_is_refused(checkpoint, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "ok"}\n{"text"')
    refused(
        capsys,
        f"search {checkpoint} --data {bad} --out {tmp_path / 's'} {COMMON}",
        says="bad.jsonl:2: is not JSON",
    )
    bad.write_text('{"ids": [1, 2, 999]}')
    refused(
        capsys,
        f"search {checkpoint} --data {bad} --out {tmp_path / 's'} {COMMON}",
        says="outside the model's vocabulary of 128",
    )
    refused(capsys, f"search {checkpoint} --out {tmp_path / 's'}", says="--data")
    refused(
        capsys,
        f"search {checkpoint} --data {tmp_path / 'no'} --out {tmp_path / 's'}",
        says="no such file",
    )


def test_wrong_flags_are_refused(checkpoint, tmp_path, capsys):
    refused(capsys, "", says="required")
    refused(capsys, "serach", says="invalid choice")
    refused(capsys, f"search {checkpoint}", says="search needs --out")
    refused(capsys, f"search --out {tmp_path}", says="search needs --model")
    refused(capsys, f"search {checkpoint} --out {tmp_path} --kep 1/4", says="--kep")
    refused(capsys, f"search {checkpoint} --out {tmp_path} --keep many", says="keep")
    refused(capsys, f"search tiny --out {tmp_path} --keep 0", says="above 0")
    refused(capsys, f"search tiny --out {tmp_path} --stages 9", says="pipeline stages")
    refused(capsys, f"search tiny --out {tmp_path} --device cuda:7", says="cuda:7")
    refused(
        capsys,
        f"search tiny --out {tmp_path} --dtype int4",
        says='"float32", "bfloat16", "float16"',
    )
    refused(capsys, f"search tiny --out {tmp_path} --batch 0", says="batch must be at least 1")


def test_export_refuses_reindex_and_stages_that_begin_shared(checkpoint, tmp_path, capsys):
    refused(
        capsys,
        f"export {checkpoint} --pattern FSSSSS --stages 2 --out {tmp_path / 'e'}",
        says="pipeline stage",
    )
    refused(
        capsys, f"export {checkpoint} --pattern FRRFRR --out {tmp_path / 'e'}", says="only F and S"
    )


def test_a_process_has_the_exit_code_and_prints_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "indexcache", "inspect", str(tmp_path / "no")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    done = subprocess.run(
        [sys.executable, "-m", "indexcache", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("indexcache 0.")
