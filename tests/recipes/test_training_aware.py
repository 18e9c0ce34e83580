"""Test the comparison of training-aware arms: every piece, killed and resumed, and its tables."""

from __future__ import annotations

import json
import lzma

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from indexcache.data import shipped_text
from indexcache.evals.statistics import LEAST_DOCUMENTS
from indexcache.records import write_json
from recipes.smollm2.rewrite import save
from recipes.smollm2.trainable import trainable
from recipes.training_aware import run, smollm2, table
from recipes.training_aware.arms import ALL, ARMS
from recipes.training_aware.text import (
    Windows,
    held_out_batches,
    held_out_documents,
    make_bank,
    read_tokens,
    split,
)
from recipes.training_aware.text import main as cut
from tests.recipes.support import DIGEST

FORMAT = {"model", "arm", "kept", "seed", "loss", "delta_loss", "ci_low", "ci_high", "recall"}
FORMAT |= {"recall_full", "tokens"}


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """Write tokens, held-out text and a tokenizer; return the arguments that name them."""
    folder = tmp_path_factory.mktemp("text")
    texts = {
        split: [
            np.array([*tiny.encode(json.loads(x)["text"][:3000]), 0], np.uint16)
            for x in shipped_text(split).read_text(encoding="utf-8").splitlines()[:8]
        ]
        for split in ("calibration", "heldout")
    }
    whole = folder / "all.u16.xz"
    whole.write_bytes(lzma.compress(np.concatenate(texts["calibration"]).tobytes()))
    # Two sources of two domains, one of which the recipe does not know.
    ids = texts["heldout"]
    np.savez(folder / "val.npz", code_go=np.concatenate(ids[:4]), new=np.concatenate(ids[4:]))
    return {"all": whole, "val": folder / "val.npz", "tokenizer": tiny.path / "tokenizer.json"}


def test_a_long_file_is_cut_into_whole_documents(files, tmp_path, monkeypatch, capsys):
    argv = ["text", "--tokens", str(files["all"]), "--out", str(tmp_path), "--millions"]
    monkeypatch.setattr("sys.argv", [*argv, "0.001", "0.002"])
    cut()
    parts = [read_tokens([tmp_path / f"tokens-{i}.u16.xz"]) for i in range(2)]
    whole = read_tokens([files["all"]]).tobytes()
    assert all(part[-1] == 0 and len(part) >= 1000 for part in parts)
    documents = [d for part in parts for d in np.split(part, np.flatnonzero(part == 0) + 1)[:-1]]
    assert all(d.tobytes() in whole for d in documents)
    assert len({d.tobytes() for d in documents}) == len(documents)


def arguments(files, out, *more, arms=("full", "multi-4", "r-4")):
    named = {"--tokens": files["all"], "--held-out": files["val"]}
    named |= {"--tokenizer": files["tokenizer"], "--out": out}
    argv = [str(x) for pair in named.items() for x in pair]
    argv += ["--small", "--inline", "--devices", "cpu", "--steps", "2", "--length", "128"]
    return [*argv, "--recall-lengths", "128", "--kinds", "passkey", "--arms", *arms, *more]


def test_every_piece_killed_and_resumed(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    class Killed(BaseException):
        pass

    real = run.measure

    def dies(loaded, pattern, texts, **options):
        if (out / "seed0" / "multi-4").exists():
            raise Killed
        return real(loaded, pattern, texts, **options)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(run, "measure", dies)
        run.main(arguments(files, out))
    finished = (out / "seed0" / "full" / "measured.json").stat().st_mtime_ns
    journal = (out / "seed0" / "multi-4" / "journal.jsonl").read_text()
    assert run.main(arguments(files, out, "--collect", str(tmp_path / "kept"))) == 0
    assert (out / "seed0" / "full" / "measured.json").stat().st_mtime_ns == finished
    assert (out / "seed0" / "multi-4" / "journal.jsonl").read_text() == journal

    content = json.loads((out / "training_aware.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == sorted(rows)
    assert set(rows) == {"full", "multi-4", "r-4"}
    assert all(set(row) >= FORMAT for row in rows.values())
    assert {row["tokens"] for row in rows.values()} == {2 * 2 * 128}
    assert rows["full"]["delta_loss"] == 0
    full = rows["full"]["loss"]
    for row in rows.values():
        assert row["delta_loss"] == pytest.approx(row["loss"] - full, abs=2e-6)
        assert set(row["by_domain"]) == {"code", "documentation"}
    assert rows["multi-4"]["pattern"] == "FSSSFSSS"
    assert rows["r-4"]["pattern"] == "FRRRFRRR@4"
    assert rows["multi-4"]["loss"] != rows["full"]["loss"]
    assert rows["r-4"]["tokens_s"] > 0 and rows["r-4"]["mfu"] is None
    # Stock transformers gives the losses of the recipe, with the pattern in the config.
    stock = AutoModelForCausalLM.from_pretrained(
        out / "seed0" / "multi-4" / "checkpoint" / "transformers", dtype="float32"
    ).eval()
    documents = held_out_documents(files["val"], 64, 1)
    losses = []
    with torch.no_grad():
        for b in held_out_batches(documents, 64, 1, 2):
            logits = stock(b.ids).logits[:, :-1]
            targets = b.ids[:, 1:].flatten()
            losses.append(cross_entropy(logits.flatten(0, 1), targets, reduction="none"))
    # Four index heads give ties, which stock settles otherwise.
    assert float(torch.cat(losses).mean()) == pytest.approx(rows["multi-4"]["loss"], abs=1e-4)
    assert abs(rows["full"]["loss"] - rows["multi-4"]["loss"]) > 2e-4
    assert [(p["name"], p["against"]) for p in content["pairs"]] == [("r-4", "multi-4")]
    # The package refuses a search on a model that was trained under a pattern.
    assert "trained with sharing" in content["after"]["seed0/multi-4"]["search"]["refused"]
    searched = content["after"]["seed0/full"]
    assert searched["search"]["frontier"][-1]["full"] == 1
    assert {p["pattern_name"] for p in searched["patterns"]} >= {"multi-4", "searched-4-after"}
    assert "multi-4" in capsys.readouterr().out

    # Other settings would make other arms.
    with pytest.raises(SystemExit, match="lr"):
        run.main(arguments(files, out, "--lr", "0.5"))

    # Another machine goes on from what was collected, and does nothing twice.
    other = tmp_path / "other"
    again = ("--restore", str(tmp_path / "kept"))
    assert run.main(arguments(files, other, *again)) == 0
    assert json.loads((other / "training_aware.json").read_text())["rows"] == content["rows"]
    assert not (other / "seed0" / "full" / "checkpoint").exists()


def test_all_arms_share_what_they_train_on():
    """Arms differ in the pattern and the target alone."""
    patterns = {name: arm.pattern(12, None, 4) for name, arm in ALL.items() if not arm.searched}
    assert str(patterns["multi-4"]) == str(patterns["own-4"]) == str(patterns["lm-4"])
    assert str(patterns["multi-2"]) == "FS" * 6
    assert str(patterns["multi-8-offset2"]) == "FFSSSSSSSFSS"
    assert str(patterns["r-8"]) == "FRRRRRRRFRRR@4"
    wanted = {"full", "uniform_multi", "uniform_own", "uniform_lm", "searched", "uniform_r"}
    assert {arm.name for arm in ARMS.values()} == wanted


def facts(shift, found):
    """Make measurements of an arm: every document loses `shift` a token."""
    documents = [["text", f"d{i}", 10.0 * (3 + shift) + i % 3, 10] for i in range(LEAST_DOCUMENTS)]
    recall = [{"kind": "k", "length": 64, "found_each": found, "asked_each": [2] * len(found)}]
    return {"documents": documents, "recall": recall}


def test_paired_differences_average_the_seeds_first():
    full = [facts(0.0, [2, 2, 1]), facts(0.0, [2, 1, 1])]
    arm = [facts(0.1, [1, 2, 1]), facts(0.3, [1, 1, 0])]
    compared = table.paired(arm, full)
    assert compared["delta_loss"] == pytest.approx(0.2)
    assert compared["ci_low"] == pytest.approx(0.2, abs=1e-6)
    assert compared["delta_recall"] == pytest.approx(-1.5 / 6)
    assert compared["recall_ci_low"] is None  # Three sequences are too few for an interval.


def test_bad_arguments_are_refused(files, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run.parsed(arguments(files, tmp_path, "--rows", "3"))
    assert "no multiple" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="nothing that --collect"):
        run.main(arguments(files, tmp_path / "o", "--restore", str(tmp_path / "no")))


def test_smollm2_has_the_same_arms(llama, rewritten, tiny, files, tmp_path, monkeypatch, capsys):
    """Its base is the form that can be trained, in bf16 with fp32 masters; it stays there."""

    def write_base(o):
        save(*trainable(*rewritten), tiny.tokenizer, o.out / "base", torch.float32, DIGEST)

    monkeypatch.setattr(run.smollm2, "write_base", write_base)
    result = tmp_path / "result.json"
    write_json(result, {"rows": [{"model": "tiny", "arm": "full"}], "setup": {"length": 1}})
    more = ("--model", "smollm2", "--wheel", "w", "--searched", "FSS", "--result", str(result))
    argv = arguments(files, tmp_path / "out", *more, arms=("full", "searched-4"))
    assert run.main([*argv, "--collect", str(tmp_path / "kept")]) == 0
    content = json.loads(result.read_text())
    assert [r["model"] for r in content["rows"]] == ["tiny", "SmolLM2", "SmolLM2"]
    assert content["setup"] == {"length": 1}
    assert content["SmolLM2"]["setup"]["dtype"] == "bfloat16"
    assert content["SmolLM2"]["before"]["search"] == {"pattern": "FSS"}
    assert {r["pattern"] for r in content["rows"][1:]} == {"FFF", "FSS"}
    assert sum(p.stat().st_size for p in (tmp_path / "kept").glob("state.*")) < 1 << 20

    with pytest.raises(SystemExit):
        run.parsed([x for x in argv if x not in ("--wheel", "w")])
    assert "needs --wheel" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.parsed([*argv[: argv.index("--arms")], "--arms", "weighted-4", *more])
    assert "need a search" in capsys.readouterr().err


def test_held_out_text_in_another_vocabulary(tiny, files):
    """Documents stay what they are, one by one, in order."""
    old = Tokenizer.from_file(str(files["tokenizer"]))
    new = Tokenizer(BPE({chr(i): i for i in range(256)} | {"<unk>": 256}, [], unk_token="<unk>"))
    with np.load(files["val"]) as sources:
        ids = smollm2.recoded(sources, old, new)
        texts = [old.decode(p.tolist()) for p in split(sources["new"])]
    pieces = split(ids["new"])
    assert [len(p) for p in pieces] == [len(t) for t in texts]
    plain = [t for t in texts if t.isascii()]
    assert plain and "".join(map(chr, pieces[texts.index(plain[0])])) == plain[0]


def test_the_bank_says_where_answers_are(files, tmp_path):
    decode = Tokenizer.from_file(str(files["tokenizer"])).decode
    tokens = read_tokens([files["all"]])
    options = {"vocabulary": 4096, "length": 257, "sequences": 3, "parts": 1}
    make_bank(tmp_path / "bank.npy", tokens, files["tokenizer"], ["passkey"], **options)
    windows = Windows(tokens, np.load(tmp_path / "bank.npy"), files["tokenizer"], 4096, 1.0)
    rows = windows.rows(0, 6, 2, 256)
    more = windows.rows(0, 9, 2, 256)[:6]
    assert [r.ids.tobytes() for r in rows] == [r.ids.tobytes() for r in more]
    asked = [row for row in rows if row.answers]
    assert 0 < len(asked) < 6  # The retrieval of recipes/tiny does not say where answers are.
    for row in asked:
        for a, b in row.answers:
            start = next(start for start, stop in row.cuts if start < a < stop)
            before, answer = (decode(ids.tolist()) for ids in (row.ids[start:a], row.ids[a:b]))
            assert answer.strip() and answer.strip() in before
