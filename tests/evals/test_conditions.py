"""Test that results say what they hold for, through the library and the command line."""

from __future__ import annotations

import dataclasses
import json
import shlex

import numpy as np
import pytest
import torch

import indexcache as ic
from indexcache.cli import main
from indexcache.data import digest_of, make_batches
from indexcache.models.conditions import Origin
from indexcache.models.identity import library_versions, weights_digest
from indexcache.models.loading import fingerprint
from tests.support import documents, make_model


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return ic.load(checkpoint)


def cut(length=64, count=6, **numbers):
    return make_batches(documents(count), length=length, sequences=4, **numbers)


def test_evidence_says_what_it_holds_for(loaded):
    batches = cut(batch=2)
    origin = Origin(text="some.jsonl", split="heldout", seed=3)
    evidence = ic.evaluate(loaded, ["FSSSSS", "FRRRRR@2"], batches, seed=3, origin=origin)
    held = evidence.conditions
    assert held.model == str(loaded.path)
    assert held.model_digest == fingerprint(loaded.path)
    assert held.weights_digest == weights_digest(loaded.module)
    assert held.text_digest == digest_of(batches)
    assert (held.text, held.split, held.seed) == ("some.jsonl", "heldout", 3)
    assert (held.lengths, held.sequences, held.documents) == ((64,), 4, 4)
    assert (held.k, held.pools) == (8, (16,))
    assert [s.size for s in held.sparsity] == [8, 16]
    assert held.share(16).longest == 0.25
    assert (held.dtype, held.path) == ("float32", "stock")
    assert held.device == f"cpu, {torch.get_num_threads()} threads"
    assert held.versions == {"indexcache": ic.__version__, **library_versions()}
    with pytest.raises(dataclasses.FrozenInstanceError):
        held.k = 9
    rows = evidence.to_json()["rows"]
    assert {(r["pattern"], r["pool"], r["pool_share"]) for r in rows} == {
        ("FSSSSS", None, None),
        ("FRRRRR@2", 16, 0.25),
    }
    json.dumps(evidence.to_json(), allow_nan=False)


def test_what_changes_a_number_changes_the_conditions(loaded, glm):
    def conditions(model=loaded, **numbers):
        return ic.evaluate(model, "FSSSSS", cut(**numbers)).conditions

    first = conditions()
    assert conditions() == first
    assert conditions(length=32).lengths == (32,)
    assert conditions(seed=1).text_digest != first.text_digest
    with ic.accelerate(loaded.module):
        assert conditions().path == "fast"
    other = conditions(make_model("glm_moe_dsa", seed=7))
    assert (other.model, other.model_digest) == (None, None)
    assert other.weights_digest != conditions(glm).weights_digest
    weight = loaded.module.model.layers[3].self_attn.o_proj.weight
    with torch.no_grad():
        weight[0, 0] += 1
        assert conditions().weights_digest != first.weights_digest
        assert conditions().model_digest == first.model_digest
        weight[0, 0] -= 1


def test_search_and_overlap_say_it_too(loaded, tmp_path):
    batches = cut()
    found = ic.search(loaded, batches, tmp_path, ic.SearchSettings(keep=0.5))
    shared = ic.overlap(loaded, batches)
    read = json.loads((tmp_path / "result.json").read_text())["conditions"]
    for conditions in (read, shared.to_json()["conditions"]):
        assert conditions["text_digest"] == digest_of(batches)
        assert conditions["model_digest"] == fingerprint(loaded.path)
        assert conditions["lengths"] == [64]
        assert conditions["k"] == 8
    assert read["pools"] == [32]
    assert "uniform, pool 50% of the context" in found.table()
    assert found.table().splitlines()[0].endswith("roles (64 tokens, k = 8)")


def test_evaluate_prints_and_writes_them(checkpoint, tmp_path, capsys):
    text = tmp_path / "text.npy"
    np.save(text, np.random.default_rng(0).integers(0, 128, 300))
    command = (
        f"evaluate {checkpoint} --pattern FSSSSS --data {text} --split all --length 64 "
        f"--sequences 3 --seed 5 --dtype bfloat16 --out {tmp_path} --json"
    )
    assert main(shlex.split(command)) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "evidence.json").read_text())["conditions"]
    assert json.loads(printed.splitlines()[-1])["conditions"] == written
    assert "roles (64 tokens, k = 8)" in printed
    assert "3 sequences of 64 tokens from 1 documents, seed 5" in printed
    for value in (written["model_digest"][:12], written["text_digest"][:12], str(text), "bfloat16"):
        assert value in printed
    assert (written["split"], written["seed"], written["path"]) == ("all", 5, "fast")


def test_every_row_says_at_how_many_of_its_tokens_something_can_differ(glm):
    """Tokens are those that predict: 63 of 64, where token t sees t + 1."""
    patterns = ["FSSSSS", "FRRRRR@2", "FRSRRR@2", "FFFFFF"]
    evidence = ic.evaluate(glm, patterns, cut())
    rows = {r.name: r for r in evidence.overall}
    expected = ((63 - 8) / 63, (63 - 16) / 63, (63 - 8) / 63, 0)
    for name, beyond in zip(patterns, expected, strict=True):
        assert rows[name].beyond == pytest.approx(beyond), name
    assert (
        ic.evaluate(glm, "FFFFFF", cut(), against="FSSSSS").rows[0].beyond == rows["FSSSSS"].beyond
    )
    first = {r.name: r for r in evidence.positions if r.where == (0.0, 0.25)}
    assert first["FRRRRR@2"].beyond == first["FRRRRR@2"].delta_loss == 0
    assert first["FSSSSS"].beyond == pytest.approx(8 / 16)
    table = evidence.table().split("\n\n")[2].splitlines()
    assert table[0].split()[-1] == "100%"
    cells = {line.split()[0]: line.split()[1] for line in table[2:]}
    assert cells["FRRRRR@2"] == cells["FFFFFF"] == "-"
    assert cells["FSSSSS"][0] in "+-"
    assert len(cells["FSSSSS"]) > 1
