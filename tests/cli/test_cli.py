"""Run verbs: good input gives results, bad input one sentence and exit code 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from indexcache.cli import main
from indexcache.records import Run


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


def refused(capsys, *argv, says):
    """Exit code 2, nothing on stdout, and one line on stderr that says so."""
    assert main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [x for x in captured.err.splitlines() if x.startswith("indexcache: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    assert says in lines[0], lines[0]


COMMON = ["--length", "64", "--sequences", "4"]


def test_the_whole_path(checkpoint, text, tmp_path, capsys):
    search, out = tmp_path / "search", tmp_path
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_hidden_layers"] == 6
    assert (
        main(
            [
                "search",
                str(checkpoint),
                "--data",
                str(text),
                "--out",
                str(search),
                "--keep",
                "1/3",
                "--json",
                *COMMON,
            ]
        )
        == 0
    )
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((search / "result.json").read_text())
    assert [p["full"] for p in printed["frontier"]] == [6, 5, 4, 3, 2]
    assert all(set(p) >= {"full", "pattern", "loss"} for p in printed["frontier"])
    patterns = ["uniform:1/3", f"{search}:1/2", f"best={search}", f"r={search}+R2"]
    evaluate = [
        "evaluate",
        str(checkpoint),
        "--data",
        str(text),
        "--pattern",
        *patterns,
        "--out",
        str(out / "ev"),
        "--json",
        *COMMON,
    ]
    assert main(evaluate) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {r["domain"] for r in rows} == {"all", "a", "b"}
    assert [r["name"] for r in rows if r["domain"] == "all"] == [
        "uniform:1/3",
        f"{search}:1/2",
        "best",
        "r",
    ]
    assert all(
        set(r) >= {"pattern", "domain", "delta_loss", "ci_low", "ci_high", "kl", "tokens"}
        for r in rows
    )
    assert rows[-1]["pattern"].endswith("@2")
    assert main([*evaluate, "--against", "uniform:1/3"]) == 0
    shown = capsys.readouterr().out
    assert "vs uniform:1/3" in shown
    assert json.loads(shown.splitlines()[-1])["baseline"] == "FSSFSS"
    assert main([*evaluate, "--most", "1000"]) == 0
    assert main([*evaluate, "--most", "-1000"]) == 1  # the gate fails
    capsys.readouterr()
    assert (
        main(
            [
                "overlap",
                str(checkpoint),
                "--data",
                str(text),
                "--pattern",
                str(search),
                "--out",
                str(out / "ov"),
                *COMMON,
            ]
        )
        == 0
    )
    assert (out / "ov" / "overlap.png").stat().st_size > 5000
    assert (
        main(
            [
                "export",
                str(checkpoint),
                "--pattern",
                str(search),
                "--out",
                str(out / "ex"),
                "--json",
            ]
        )
        == 0
    )
    files = json.loads(capsys.readouterr().out.splitlines()[-1])["files"]
    assert set(files) == {"transformers", "vllm", "sglang"}


def test_search_and_evaluate_share_no_document(checkpoint, text, tmp_path, capsys):
    assert (
        main(
            [
                "search",
                str(checkpoint),
                "--data",
                str(text),
                "--out",
                str(tmp_path / "s"),
                "--keep",
                "1/2",
                *COMMON,
            ]
        )
        == 0
    )
    capsys.readouterr()
    for pattern in (tmp_path / "s", tmp_path / "s" / "pattern.json", f"x={tmp_path / 's'}:1/2+R2"):
        refused(
            capsys,
            "evaluate",
            checkpoint,
            "--data",
            text,
            "--split",
            "calibration",
            "--pattern",
            pattern,
            *COMMON,
            says="held-out documents were calibration text",
        )


def test_changed_settings_data_or_model_are_refused(checkpoint, text, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    search = [
        "search",
        str(checkpoint),
        "--data",
        str(text),
        "--out",
        str(tmp_path / "s"),
        "--keep",
        "1/2",
        *COMMON,
    ]
    assert main(search) == 0
    capsys.readouterr()
    refused(capsys, *search, "--keep", "1/3", says="keep was 0.5, now 0.333")
    refused(capsys, *search, "--seed", "1", says="other settings")
    other = tmp_path / "other.jsonl"
    other.write_text(text.read_text().replace("a 0", "a zero"))
    search[3] = str(other)
    refused(capsys, *search, says="data was")
    search[3] = str(text)
    folder = copy_of(checkpoint, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.self_attn.o_proj.weight"][1, 2] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    search[1] = str(folder)
    refused(capsys, *search, says="model was")


def test_a_config_that_shares_on_a_whole_checkpoint_is_no_native_sharing(
    checkpoint, text, tmp_path, capsys
):
    """Such a config is an override: the baseline runs all indexers, and a search is possible."""
    assert (
        main(
            [
                "export",
                str(checkpoint),
                "--pattern",
                "FSSSSS",
                "--out",
                str(tmp_path / "e"),
                "--no-prune",
            ]
        )
        == 0
    )
    shared = tmp_path / "e" / "transformers"
    capsys.readouterr()
    rows = []
    for folder in (checkpoint, shared):
        assert (
            main(
                [
                    "evaluate",
                    str(folder),
                    "--data",
                    str(text),
                    "--pattern",
                    "FSSSSS",
                    "--json",
                    *COMMON,
                ]
            )
            == 0
        )
        rows.append(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"])
    assert rows[0] == rows[1]
    assert rows[0][0]["kl"] > 0.01
    assert (
        main(
            [
                "search",
                str(shared),
                "--data",
                str(text),
                "--out",
                str(tmp_path / "s"),
                "--keep",
                "1/2",
                *COMMON,
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "FFFFFF" in out


def test_settings_from_toml(checkpoint, text, tmp_path, capsys):
    config = tmp_path / "search.toml"
    config.write_text(
        f'data = "{text}"\nlength = 64\nsequences = 4\nkeep = "1/2"\nout = "{tmp_path / "run"}"\n'
    )
    assert (
        main(["search", str(checkpoint), "--config", str(config), "--keep", "5/6", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["frontier"][-1]["full"] == 5


def test_wrong_patterns(checkpoint, text, capsys):
    for pattern, says in (
        ("FSS", "has 3 layers, but the model has 6"),
        ("SFFFFF", "must be F"),
        ("fsssss", "Write 'F'"),
        ("FSSXSS", "'X'"),
        ("FRRRRR@0", "at least 1"),
        ("nowhere/run:1/4", "no such file or run folder"),
    ):
        refused(
            capsys, "evaluate", checkpoint, "--data", text, "--pattern", pattern, *COMMON, says=says
        )


def test_short_context(checkpoint, text, tmp_path, capsys):
    refused(
        capsys,
        "search",
        checkpoint,
        "--data",
        text,
        "--out",
        tmp_path / "s",
        "--length",
        "16",
        says="too short for this model",
    )
    refused(
        capsys,
        "overlap",
        checkpoint,
        "--data",
        text,
        "--out",
        tmp_path / "o",
        "--length",
        "31",
        says="index_topk = 8",
    )
    refused(
        capsys,
        "evaluate",
        checkpoint,
        "--data",
        text,
        "--pattern",
        "FSSSSS",
        "--length",
        "10000",
        says="longer than the model's context",
    )


def test_nan_loss(checkpoint, text, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = copy_of(checkpoint, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(
        capsys, "search", folder, "--data", text, "--out", tmp_path / "s", *COMMON, says="is nan"
    )
    refused(
        capsys,
        "evaluate",
        folder,
        "--data",
        text,
        "--pattern",
        "FSSSSS",
        *COMMON,
        says="not finite",
    )


def test_truncated_checkpoint(checkpoint, text, tmp_path, capsys):
    folder = copy_of(checkpoint, tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        refused(capsys, "inspect", folder, says="model.safetensors")
        refused(
            capsys,
            "evaluate",
            folder,
            "--data",
            text,
            "--pattern",
            "FSSSSS",
            *COMMON,
            says="model.safetensors",
        )
        refused(
            capsys,
            "export",
            folder,
            "--pattern",
            "FSSSSS",
            "--out",
            tmp_path / "e",
            says="model.safetensors",
        )
    assert not (tmp_path / "e").exists()


def test_weights_that_are_not_safetensors(checkpoint, tmp_path, capsys):
    folder = copy_of(checkpoint, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused(capsys, "inspect", folder, says="safetensors")


def test_full_disk(checkpoint, text, tmp_path, capsys, monkeypatch):
    append, count = Run.append, []

    def full(self, entry):
        count.append(entry)
        if len(count) == 4:
            raise OSError(28, "No space left on device", str(self.folder / "journal.jsonl"))
        append(self, entry)

    search = ["search", checkpoint, "--data", text, "--out", tmp_path / "s", *COMMON]
    monkeypatch.setattr(Run, "append", full)
    refused(capsys, *search, says="disk is full")
    monkeypatch.undo()
    assert len((tmp_path / "s" / "journal.jsonl").read_text().splitlines()) == 3
    assert main([str(a) for a in search]) == 0
    import indexcache.evals.evaluate  # noqa: F401  (imported before the patch)

    def no_room(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("indexcache.records.write_json", no_room)
    assert (
        main(
            [
                "evaluate",
                str(checkpoint),
                "--data",
                str(text),
                "--pattern",
                "FSSSSS",
                "--out",
                str(tmp_path / "e"),
                *COMMON,
            ]
        )
        == 2
    )
    captured = capsys.readouterr()
    assert "disk is full" in captured.err
    assert "vs full" in captured.out  # the finished work was printed before


def test_unknown_models(checkpoint, text, tmp_path, capsys):
    refused(capsys, "inspect", tmp_path / "nowhere", says="no such checkpoint folder")
    refused(
        capsys,
        "search",
        "deepseek-ai/DeepSeek-V3.2",
        "--data",
        text,
        "--out",
        tmp_path / "s",
        says="nothing is downloaded",
    )
    folder = copy_of(checkpoint, tmp_path, model_type="llama")
    refused(capsys, "inspect", folder, says="'llama' is not a DSA family")
    refused(
        capsys,
        "evaluate",
        folder,
        "--data",
        text,
        "--pattern",
        "FSSSSS",
        says="'llama' is not a DSA family",
    )
    (folder / "config.json").write_text("{")
    refused(capsys, "inspect", folder, says="config.json")
    (folder / "config.json").unlink()
    refused(capsys, "inspect", folder, says="config.json")


def test_missing_indexers_are_not_filled_with_random_numbers(checkpoint, text, tmp_path, capsys):
    assert (
        main(
            [
                "export",
                str(checkpoint),
                "--pattern",
                "FSSFSS",
                "--out",
                str(tmp_path / "e"),
                "--engine",
                "transformers",
            ]
        )
        == 0
    )
    pruned = tmp_path / "e" / "transformers"
    capsys.readouterr()
    refused(
        capsys,
        "search",
        pruned,
        "--data",
        text,
        "--out",
        tmp_path / "s",
        *COMMON,
        says="no indexer of their own",
    )
    refused(
        capsys,
        "evaluate",
        pruned,
        "--data",
        text,
        "--pattern",
        "FFSFSS",
        *COMMON,
        says="no indexer weights",
    )
    config = json.loads((pruned / "config.json").read_text())
    for key in ("indexer_types", "index_topk_pattern", "index_topk_freq"):
        config.pop(key, None)
    (pruned / "config.json").write_text(json.dumps(config))
    refused(
        capsys,
        "evaluate",
        pruned,
        "--data",
        text,
        "--pattern",
        "FSSFSS",
        *COMMON,
        says="random numbers",
    )


def test_bad_text(checkpoint, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "ok"}\n{"text"')
    refused(
        capsys,
        "search",
        checkpoint,
        "--data",
        bad,
        "--out",
        tmp_path / "s",
        *COMMON,
        says="bad.jsonl:2: is not JSON",
    )
    bad.write_text('{"ids": [1, 2, 999]}')
    refused(
        capsys,
        "search",
        checkpoint,
        "--data",
        bad,
        "--out",
        tmp_path / "s",
        *COMMON,
        says="outside the model's vocabulary of 128",
    )
    refused(capsys, "search", checkpoint, "--out", tmp_path / "s", says="--data")
    refused(
        capsys,
        "search",
        checkpoint,
        "--data",
        tmp_path / "no",
        "--out",
        tmp_path / "s",
        says="no such file",
    )


def test_wrong_usage(checkpoint, tmp_path, capsys):
    refused(capsys, says="required")
    refused(capsys, "serach", says="invalid choice")
    refused(capsys, "search", checkpoint, says="search needs --out")
    refused(capsys, "search", "--out", tmp_path, says="search needs --model")
    refused(capsys, "search", checkpoint, "--out", tmp_path, "--kep", "1/4", says="--kep")
    refused(capsys, "search", checkpoint, "--out", tmp_path, "--keep", "many", says="keep")
    refused(capsys, "search", "tiny", "--out", tmp_path, "--keep", "0", says="above 0")
    refused(capsys, "search", "tiny", "--out", tmp_path, "--stages", "9", says="pipeline stages")
    refused(capsys, "search", "tiny", "--out", tmp_path, "--device", "cuda:7", says="cuda:7")
    refused(
        capsys,
        "search",
        "tiny",
        "--out",
        tmp_path,
        "--dtype",
        "int4",
        says='"float32", "bfloat16", "float16"',
    )
    refused(
        capsys, "search", "tiny", "--out", tmp_path, "--batch", "0", says="batch must be at least 1"
    )


def test_a_stage_must_begin_with_full_and_engines_know_no_reindex(checkpoint, tmp_path, capsys):
    refused(
        capsys,
        "export",
        checkpoint,
        "--pattern",
        "FSSSSS",
        "--stages",
        "2",
        "--out",
        tmp_path / "e",
        says="pipeline stage",
    )
    refused(
        capsys,
        "export",
        checkpoint,
        "--pattern",
        "FRRFRR",
        "--out",
        tmp_path / "e",
        says="only F and S",
    )


def test_as_a_program(tmp_path):
    """The real process: exit code, one line, no traceback; and the version."""
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


def test_import_is_light():
    code = (
        "import sys, indexcache; indexcache.Pattern('FS'); "
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )
