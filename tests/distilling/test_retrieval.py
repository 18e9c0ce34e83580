"""Test retrieval in a distillation through the command line: rows to train on, questions asked."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest

from indexcache.cli import main
from indexcache.data import shipped_text
from indexcache.distilling import run as run_module
from indexcache.distilling import training

pytestmark = pytest.mark.usefixtures("one_thread")

RUN = "--pattern 1/2 --length 256 --batch-tokens 512 --eval-sequences 2"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Write plain prose of 40 documents, in characters that the checkpoint's tokenizer knows."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = shipped_text("calibration").read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(x)["text"] for x in lines).encode("ascii", "ignore").decode()
    pieces = [words[i * 700 : (i + 1) * 700] for i in range(40)]
    path.write_text("".join(json.dumps({"text": p}) + "\n" for p in pieces))
    return path


def test_training_on_retrieval_and_counting_answers(
    checkpoint, text, tmp_path, monkeypatch, capsys
):
    taken = {}

    def watched(model, pattern, rows, out, settings, **options):
        taken["rows"], taken["held_out"] = rows, options["held_out"]
        return training.distill(model, pattern, rows, out, settings, **options)

    monkeypatch.setattr(run_module, "distill", watched)
    rest = "--retrieval passkey needles --retrieval-share 0.4 --retrieval-sequences 2"
    rest += " --answer-weight 2 --steps 3 --eval-every 2 --json"
    command = f"distill {checkpoint} --data {text} --out {tmp_path / 'run'} {RUN} {rest}"
    assert main(shlex.split(command)) == 0
    out = capsys.readouterr().out
    assert "answers found:" in out
    recall = json.loads(out.splitlines()[-1])["recall"]
    assert set(recall["best"]) == {"passkey", "needles", "all"}
    lines = [json.loads(x) for x in (tmp_path / "run" / "journal.jsonl").open()]
    assert [e["step"] for e in lines if "recall" in e] == [0, 2, 3]
    asked = [row for row in taken["rows"] if row.answers]
    # 3 steps take 6 rows, of which 0.6, rounded up, are text.
    assert (len(asked), len(taken["rows"])) == (3, 7)
    for row in asked:
        a, b = row.answers[0]
        answer = "".join(map(chr, row.ids[a:b]))
        before = "".join(map(chr, row.ids[:a]))
        assert len(row.ids) == 256 and answer.strip() and answer.strip() in before
    # Held-out questions lie in held-out text and have other answers.
    held = [b for b in taken["held_out"] if b.answers]
    assert sum(len(b.ids) for b in held) == 4

    def answers(rows, spans):
        return {
            bytes(np.asarray(ids[a:b], np.uint8)).strip()
            for ids, some in zip(rows, spans, strict=True)
            for a, b in some
        }

    trained = answers([r.ids for r in asked], [r.answers for r in asked])
    for b in held:
        assert not trained & answers(b.ids.numpy(), b.answers)
    # The same command again has nothing left to do; another weight is another run.
    assert main(shlex.split(command)) == 0
    assert main(shlex.split(command.replace("weight 2", "weight 3"))) == 2
    assert "answer_weight was 2.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rest", "word"),
    [
        ("--retrieval nothing", "kind of retrieval"),
        ("--retrieval-share 0.5", "add --retrieval"),
        ("--retrieval passkey --retrieval-share 1", "below 1"),
        ("--retrieval passkey --retrieval-share nan", "below 1"),
        ("--retrieval passkey --retrieval-share -0.1", "at least 0"),
        ("--retrieval passkey --retrieval-sequences 0", "at least 1"),
        ("--retrieval passkey --eval-every 0", "--eval-every 0"),
        ("--retrieval passkey --answer-weight 1", "--retrieval-share"),
        ("--answer-weight 1", "--retrieval-share"),
        ("--answer-weight -1", "answer_weight"),
        ("--answer-weight nan", "answer_weight"),
        ("--answer-weight 1 --loss none --stage sparse", "no indexer learns"),
        ("--retrieval passkey --length 64 --pattern 1/2", "at least 107"),
        ("--retrieval passkey --stream", "--no-stream"),
    ],
)
def test_what_makes_no_sense_is_refused(checkpoint, text, tmp_path, capsys, rest, word):
    command = f"distill {checkpoint} --data {text} --out {tmp_path / 'run'} --steps 1 "
    command += rest if "--length" in rest else f"{RUN} {rest}"
    assert main(shlex.split(command)) == 2
    said = capsys.readouterr().err
    assert word in said, said
