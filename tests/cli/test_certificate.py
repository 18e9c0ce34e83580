"""Certify a pattern, and check the certificate against checkpoints, as a CI job does."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from indexcache.cli import main
from indexcache.evals.certificate import content_digest
from tests.support import make_model

PATTERN = "FSSFSS"
ROOT = Path(__file__).parents[2]
RUN = "--split all --sequences 80 --length 64 --batch 40 --allow-blind"


@pytest.fixture(scope="module")
def certified(checkpoint, text, tmp_path_factory):
    """A folder with the certificate of a pattern of the random checkpoint."""
    out = tmp_path_factory.mktemp("certified")
    command = f"evaluate {checkpoint} --data {text} {RUN} --pattern {PATTERN} --most 100"
    assert main(shlex.split(f"{command} --out {out} --certificate")) == 0
    return out


def doctor(capsys, model, certificate, rest: str = "") -> tuple[int, str]:
    code = main(shlex.split(f"doctor {model} --certificate {certificate} {rest}"))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def changed(checkpoint, folder, **keys):
    """Copy a checkpoint with other keys in its config."""
    shutil.copytree(checkpoint, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


def test_a_certificate_has_its_figures_and_a_page(certified, checkpoint):
    value = json.loads((certified / "certificate.json").read_text())
    evidence = json.loads((certified / "evidence.json").read_text())
    assert value["digest"] == content_digest(value)
    assert (value["verdict"], value["passed"], value["k"]) == ("safe", True, 8)
    assert value["margins"] == {"loss": 100, "recall": None}
    assert value["pattern"]["pattern"] == PATTERN
    assert [(r["domain"], r["length"], r["verdict"]) for r in value["loss"]] == [
        (d, 64, "safe") for d in ("all", "a", "b")
    ]
    for mine, theirs in zip(value["loss"], evidence["rows"], strict=True):
        assert mine["ci_low"] == theirs["ci_low"] < theirs["ci_high"] == mine["ci_high"]
        assert mine["ci_high"] <= mine["upper"] < 100
        assert mine["kl_ci"][0] < mine["kl"] < mine["kl_ci"][1]
        assert mine["flips_ci"][0] < mine["flips"] < mine["flips_ci"][1]
    assert [s["mean"] for s in value["sparsity"]] == [evidence["conditions"]["sparsity"][0]["mean"]]
    assert value["data"][0]["digest"] == evidence["conditions"]["text_digest"]
    assert set(value["versions"]) == {"indexcache", "torch", "transformers"}
    page = (certified / "certificate.md").read_text()
    for shown in ("SAFE", PATTERN, value["digest"], value["model"]["weights_digest"], "Signature"):
        assert shown in page
    assert f"{value['loss'][0]['delta_loss']:+.4f}" in page
    assert "blind guess" in page  # The model is random, and the page does not hide it.
    assert str(checkpoint) in page


def test_doctor_accepts_it_for_its_checkpoint_and_its_exports(
    certified, checkpoint, tmp_path, capsys
):
    paper = certified / "certificate.json"
    code, said = doctor(capsys, checkpoint, paper)
    assert code == 0, said
    assert "holds for this checkpoint" in said
    assert "asks for sharing" in said
    for flags in ("--no-prune", ""):
        out = tmp_path / f"out{flags}"
        command = f"export {checkpoint} --pattern {PATTERN} --out {out} {flags}"
        assert main(shlex.split(command)) == 0
        code, said = doctor(capsys, out / "transformers", paper, "--engine sglang")
        assert (code, "asks for sharing" in said) == (0, False), said
    config = out / "transformers" / "config.json"
    assert doctor(capsys, config, paper)[0] == 0
    result = doctor(capsys, config, paper, "--json")[1]
    hazards = json.loads(result.splitlines()[-1])["hazards"]
    assert [h["level"] for h in hazards if h["kind"] == "certificate"] == ["note"]


@pytest.mark.parametrize(
    ("keys", "rest", "word"),
    [
        ({"index_topk": 16}, "", "k = 8"),
        ({"rope_theta": 5e5}, "", "rope_theta"),
        ({"some_new_key": 1}, "", "some_new_key"),
        ({"indexer_types": ["full"] * 5 + ["shared"]}, "", "is asked for"),
        ({}, "--pattern FFSFFS", "is asked for"),
        ({}, f"--pattern '{json.dumps({'index_topk_pattern': PATTERN, 'index_topk': 4})}'", "k ="),
    ],
)
def test_doctor_refuses_another_k_config_or_pattern(
    certified, checkpoint, tmp_path, capsys, keys, rest, word
):
    other = changed(checkpoint, tmp_path / "other", **keys)
    for model in (other, other / "config.json"):
        code, said = doctor(capsys, model, certified / "certificate.json", rest)
        assert code == 1
        errors = [line for line in said.splitlines() if "certificate" in line]
        assert any(line.startswith("error") and word in line for line in errors), said
        assert "holds for this checkpoint" not in said


def test_the_job_of_the_docs_passes_and_stops_another_model(
    checkpoint, text, certified, tmp_path, monkeypatch, capsys
):
    """Its commands are run as they stand, with a random model and text for MODEL and TEXT."""
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    (job,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    lines = [line.strip() for line in job.replace("\\\n", " ").splitlines()]
    certify, export, check = [line for line in lines if line.startswith("indexcache ")]
    model = changed(checkpoint, tmp_path / "model")
    monkeypatch.chdir(tmp_path)

    def run(line: str, rest: str = "") -> int:
        words = shlex.split(f"{line} {rest}")[1:]
        return main([{"MODEL": str(model), "TEXT": str(text)}.get(w, w) for w in words])

    # A certificate that was not passed stops the job before the export, and doctor too.
    assert run(certify, f"{RUN} --most -100") == 1
    assert run(export) == 0
    assert run(check) == 1
    assert "allows nothing" in capsys.readouterr().out
    assert run(certify, f"{RUN} --most 100") == 0
    assert run(check) == 0
    assert "holds for this checkpoint" in capsys.readouterr().out
    # The same weights and text give the same figures.
    same, value = (
        json.loads((folder / "certificate.json").read_text())
        for folder in (certified, tmp_path / "certified")
    )
    for key in ("loss", "sparsity", "sentence", "versions", "k"):
        assert value[key] == same[key]
    assert value["model"]["weights_digest"] == same["model"]["weights_digest"]
    config = tmp_path / "exported" / "transformers" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"index_topk": 16}))
    assert run(check) == 1


@pytest.mark.parametrize("where", ["indexer", "mlp", "another"])
def test_doctor_refuses_other_weights(certified, checkpoint, tmp_path, capsys, where):
    from safetensors.torch import load_file, save_file

    other = changed(checkpoint, tmp_path / "other")
    if where == "another":
        make_model("glm_moe_dsa", seed=1).save_pretrained(other)
    else:
        file = other / "model.safetensors"
        weights = load_file(file)
        name = next(n for n in sorted(weights) if where in n and ".layers.3." in n)
        weights[name].view(-1)[-1] += 1e-3
        save_file(weights, file, metadata={"format": "pt"})
    code, said = doctor(capsys, other, certified / "certificate.json")
    assert code == 1
    assert ("indexers of the layers 3" if where == "indexer" else "weights are others") in said


def test_doctor_refuses_an_edited_certificate(certified, checkpoint, tmp_path, capsys):
    value = json.loads((certified / "certificate.json").read_text())
    other = tmp_path / "certificate.json"

    def edited(**keys) -> tuple[int, str]:
        other.write_text(json.dumps(value | keys))
        return doctor(capsys, checkpoint, other)

    assert edited()[0] == 0  # White space does not count.
    for keys in (
        {"k": 9},
        {"passed": 1},
        {"verdict": "very safe"},
        {"margins": {"loss": 0.01, "recall": None}},
        {"loss": value["loss"][:1]},
        {"digest": "0" * 64},
        {"certificate": 2},
        {"new": None},
    ):
        code, said = edited(**keys)
        assert (code, "was edited" in said) == (1, True), keys
    other.write_text(json.dumps({k: v for k, v in value.items() if k != "digest"}))
    assert doctor(capsys, checkpoint, other)[0] == 1
    later = value | {"certificate": 2}
    other.write_text(json.dumps(later | {"digest": content_digest(later)}))
    assert doctor(capsys, checkpoint, other)[0] == 2
    for content in ("", "{", "[]", "{}", '"certificate"', json.dumps(value)[:-9]):
        other.write_text(content)
        code, said = doctor(capsys, checkpoint, other)
        assert (code, "Traceback" in said) == (2, False), content
    assert doctor(capsys, checkpoint, tmp_path / "none.json")[0] == 2
    assert doctor(capsys, checkpoint, tmp_path)[0] == 2


def test_recall_that_the_model_has_not_got_is_no_evidence(
    checkpoint, text, certified, tmp_path, capsys
):
    """A random model finds no answer, so the certificate is inconclusive, and doctor refuses it."""
    command = f"evaluate {checkpoint} --data {text} {RUN} --pattern {PATTERN} --most 100"
    rest = "--retrieval passkey --retrieval-sequences 36 --retrieval-filler generated"
    rest += " --retrieval-length 256 --certificate"
    assert main(shlex.split(f"{command} --out {tmp_path} {rest}")) == 1
    assert "leave it out" in capsys.readouterr().out
    value = json.loads((tmp_path / "certificate.json").read_text())
    assert (value["verdict"], value["margins"]["recall"]) == ("inconclusive", 0.1)
    assert value["lengths"] == [64, 256]
    assert [(r["task"], r["length"], r["verdict"]) for r in value["recall"]] == [
        ("passkey", 256, "inconclusive")
    ]
    assert value["data"][1]["filler"] == "generated"
    code, said = doctor(capsys, checkpoint, tmp_path / "certificate.json")
    assert code == 1
    assert "allows nothing" in said
    # The text's own figures are those of the run without retrieval.
    alone = json.loads((certified / "certificate.json").read_text())
    assert [r["delta_loss"] for r in value["loss"]] == [r["delta_loss"] for r in alone["loss"]]


@pytest.mark.parametrize(
    ("rest", "word"),
    [
        ("--certificate --most 1", "--out"),
        ("--certificate --out {}", "--most"),
        ("--certificate --most 1 --out {} --pattern FSSSSS", "one pattern"),
        ("--recall-most 0.1 --retrieval passkey", "--most"),
        ("--recall-most 0.1 --most 1", "--retrieval"),
        ("--recall-most 3 --most 1 --retrieval passkey", "share of the answers"),
        ("--recall-most nan --most 1 --retrieval passkey", "share of the answers"),
        ("--retrieval-sequences 9", "--retrieval"),
        ("--retrieval nothing", "kind of retrieval"),
        ("--retrieval passkey --retrieval-length 16", "too short"),
        ("--length 64 8", "too short"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_model_is_loaded(
    checkpoint, text, tmp_path, capsys, rest, word
):
    command = f"evaluate {checkpoint} --data {text} --split all --pattern {PATTERN} "
    assert main(shlex.split(command + rest.format(tmp_path / "out"))) == 2
    captured = capsys.readouterr()
    assert word in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_digests_of_weights_do_not_depend_on_files(tmp_path, monkeypatch):
    """Of large weights blocks are read; the last value of a tensor is always in one."""
    import torch
    from safetensors.torch import save_file

    from indexcache import checkpoint as module

    names = ("model.norm.weight", "model.layers.1.self_attn.indexer.wk.weight")
    weights = {name: torch.arange(300_000.0) for name in names}
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    save_file(weights, tmp_path / "one" / "model.safetensors")
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, file in zip(names, files, strict=True):
        save_file({name: weights[name]}, tmp_path / "two" / file)
    index = {"metadata": {}, "weight_map": dict(zip(names, files, strict=True))}
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps(index))
    for most in (1 << 30, 0):
        monkeypatch.setattr(module, "MAX_BYTES_READ", most)
        before = module.tensor_digests(tmp_path / "one")
        assert before == module.tensor_digests(tmp_path / "two")
        for place, name in enumerate(names):
            changed = weights | {name: weights[name].clone()}
            changed[name][-1] += 1
            save_file(changed, tmp_path / "one" / "model.safetensors")
            after = module.tensor_digests(tmp_path / "one")
            assert [a == b for a, b in zip(before, after, strict=True)] == [place == 1, place == 0]
        save_file(weights, tmp_path / "one" / "model.safetensors")
