"""Test that text which chose or trained something is never taken for held-out text."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from indexcache.cli import main
from indexcache.data import make_batches
from indexcache.evals.evaluate import evaluate
from indexcache.pattern import Pattern
from indexcache.searching.run import search
from indexcache.searching.settings import SearchSettings
from tests.support import documents

COMMON = "--length 64 --sequences 4"
WORDS = (
    "layer",
    "query",
    "token",
    "index",
    "share",
    "full",
    "cache",
    "model",
    "the",
    "stage",
    "café",
)


def prose(seed: int, count: int = 90) -> str:
    rng = random.Random(seed)
    words = [rng.choice(WORDS) + str(rng.randrange(100)) for _ in range(count)]
    return "\n".join(" ".join(words[i : i + 9]) for i in range(0, count, 9))


def jsonl(path: Path, *rows) -> Path:
    rows = [r if isinstance(r, dict) else {"text": r} for r in rows]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def run(command: str) -> int:
    return main(command.split())


@pytest.fixture(scope="module")
def searched(checkpoint, tmp_path_factory):
    """A search on four documents, and an export of its pattern."""
    folder = tmp_path_factory.mktemp("searched")
    text = jsonl(folder / "calibration.jsonl", *(prose(i) for i in range(4)))
    search = f"search {checkpoint} --data {text} --split all --out {folder / 'run'} --keep 1/3"
    assert run(f"{search} --no-uniform {COMMON}") == 0
    assert run(f"export {checkpoint} --pattern {folder / 'run'} --out {folder / 'out'}") == 0
    return folder


def leaks(capsys, model, pattern, text, says="calibration text") -> None:
    capsys.readouterr()
    command = f"evaluate {model} --pattern {pattern} --data {text} --split all {COMMON}"
    assert run(command) == 2, pattern
    err = capsys.readouterr().err.strip().splitlines()
    assert says in err[-1]
    assert "passes" not in err[-1]


CARRIERS = (
    "run",
    "run:1/2",
    "run+R2",
    "run/pattern.json",
    "run/result.json",
    "out",
    "out/pattern.json",
    "out/vllm.json",
    "out/vllm.txt",
    "out/sglang.json",
    "out/transformers",
    "out/transformers/config.json",
)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_digests_go_wherever_a_pattern_goes(checkpoint, searched, carrier, capsys):
    leaks(capsys, checkpoint, searched / carrier, searched / "calibration.jsonl")


def test_an_exported_checkpoint_knows_its_text(checkpoint, searched, tmp_path, capsys):
    exported = searched / "out" / "transformers"
    native = Pattern.from_file(searched / "out" / "pattern.json")
    leaks(capsys, exported, native, searched / "calibration.jsonl")
    again = f"export {exported} --pattern {native} --out {tmp_path / 'again'} --engine transformers"
    assert run(again) == 0
    leaks(capsys, tmp_path / "again" / "transformers", native, searched / "calibration.jsonl")
    shutil.copytree(exported, tmp_path / "moved")
    leaks(capsys, tmp_path / "moved", native, searched / "calibration.jsonl")


def test_the_library_refuses_too(glm, tmp_path):
    batches = make_batches(documents(4), length=64, sequences=4)
    result = search(glm, batches, tmp_path / "run", SearchSettings(keep=0.8, uniform=False))
    other = make_batches(documents(8)[4:], length=64, sequences=4)
    for pattern in (result.pattern, result.pattern.with_rest("R", 2)):
        with pytest.raises(ValueError, match="4 of the held-out documents were calibration text"):
            evaluate(glm, pattern, batches)
        evaluate(glm, pattern, other)
    evaluate(glm, str(result.pattern), batches)  # A literal carries nothing.


def windows(text: str) -> str:
    return text.replace("\n", "\r\n")


COPIES = {
    "a space": lambda t: t + " ",
    "leading line": lambda t: "\n" + t,
    "double spaces": lambda t: t.replace(" ", "  "),
    "byte order mark": lambda t: "\ufeff" + t,
    "line ends": windows,
    "one line": lambda t: t.replace("\n", " "),
    "decomposed": lambda t: unicodedata.normalize("NFD", t),
    "no-break spaces": lambda t: t.replace(" ", "\u00a0"),
    "case": str.upper,
    "zero width": lambda t: t.replace(" ", " \u200b"),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_one_document(checkpoint, searched, copy, tmp_path, capsys):
    rows = [COPIES[copy](prose(i)) for i in range(4)]
    assert rows[0] != prose(0)
    text = jsonl(tmp_path / "copy.jsonl", *rows)
    leaks(capsys, checkpoint, searched / "run", text, says="documents were calibration text")


def edited(text: str) -> str:
    return windows(text).replace("the", "a", 1) + "\nand one sentence more"


NEAR = {
    "one more sentence": lambda i: prose(i) + " and one sentence more",
    "a header": lambda i: "copied from elsewhere\n" + prose(i),
    "edited, with other line ends": lambda i: edited(prose(i)),
    "half of it": lambda i: prose(i)[: len(prose(i)) // 2],
    "within a longer document": lambda i: prose(i) + prose(100 + i, 150),
    "token ids": lambda i: {"ids": [ord(c) % 128 for c in prose(i)][5:]},
}


@pytest.mark.parametrize("near", NEAR)
def test_near_copies_are_found(checkpoint, searched, near, tmp_path, capsys):
    text = jsonl(tmp_path / "near.jsonl", *(NEAR[near](i) for i in range(4)))
    leaks(capsys, checkpoint, searched / "run", text, says="share long passages")


def test_other_text_is_no_leak(checkpoint, searched, tmp_path, capsys):
    """Text with a header of its own kind in common, and the same words, is held-out text."""
    header = prose(0)[:35]
    text = jsonl(tmp_path / "other.jsonl", *(header + prose(i) for i in range(50, 54)))
    for pattern in (searched / "run", searched / "out" / "vllm.json"):
        command = f"evaluate {checkpoint} --pattern {pattern} --data {text} --split all {COMMON}"
        command += f" --out {tmp_path / 'evidence'}"
        assert run(command) == 0
        assert "not known what text" not in capsys.readouterr().err
        evidence = tmp_path / "evidence" / "evidence.json"
        leaks(capsys, checkpoint, evidence, searched / "calibration.jsonl")


def test_literals_cannot_carry(checkpoint, tmp_path, capsys):
    text = jsonl(tmp_path / "other.jsonl", *(prose(i) for i in range(50, 54)))
    roles = "FFSFSS"  # It is not uniform.
    moved = tmp_path / "moved.json"
    moved.write_text(json.dumps(Pattern(roles).to_config()))
    command = f"evaluate {checkpoint} --data {text} --split all {COMMON} --pattern"
    assert run(f"{command} {roles} moved={moved} 1/2 full") == 0
    notes = [n for n in capsys.readouterr().err.splitlines() if "not known what text" in n]
    assert len(notes) == 1
    assert roles in notes[0]
    assert "moved" in notes[0]
    assert "1/2" not in notes[0]
    assert run(f"{command} 1/2 full 1/3+R2") == 0
    assert "not known what text" not in capsys.readouterr().err


def test_old_runs_are_still_recognised(checkpoint, searched, tmp_path, capsys):
    """Runs before this have the digests of the token ids alone."""
    old = tmp_path / "run"
    shutil.copytree(searched / "run", old)
    result = json.loads((old / "result.json").read_text())
    ids = [ord(c) if ord(c) < 128 else 63 for c in prose(0)]
    digest = hashlib.sha256(np.array(ids, np.int64).tobytes()).hexdigest()
    assert digest in result["calibration"]["digests"]
    result["calibration"] = {"digests": [digest]}
    (old / "result.json").write_text(json.dumps(result))
    leaks(capsys, checkpoint, old, searched / "calibration.jsonl", says="1 of the held-out")


def test_distillation_carries_its_text(checkpoint, searched, tmp_path, capsys):
    text = jsonl(tmp_path / "train.jsonl", *(prose(i, 60) for i in range(20, 44)))
    out = tmp_path / "d"
    flags = "--steps 1 --eval-every 1 --eval-sequences 2 --length 64 --batch-tokens 64 --whole"
    assert run(f"distill {checkpoint} --pattern FSSFSS --data {text} --out {out} {flags}") == 0
    result = json.loads((out / "result.json").read_text())
    assert result["calibration"]["digests"]
    for pattern in (out / "delta.safetensors", out):
        leaks(capsys, checkpoint, pattern, text)
    leaks(capsys, out / "checkpoint" / "transformers", "FSSFSS", text)


def test_a_distillation_leaves_near_copies_out_of_its_evaluation(checkpoint, tmp_path, capsys):
    train = jsonl(tmp_path / "train.jsonl", *(prose(i, 60) for i in range(20, 26)))
    held = [*(prose(i, 60) for i in range(80, 84)), prose(20, 60) + " and more"]
    held_out = jsonl(tmp_path / "held.jsonl", *held)
    flags = "--steps 1 --eval-every 1 --eval-sequences 5 --length 64 --batch-tokens 64"
    command = f"distill {checkpoint} --pattern 1/2 --data {train} {flags} --held-out"
    assert run(f"{command} {held_out} --out {tmp_path / 'a'}") == 0
    assert "1 of the held-out documents share long passages" in capsys.readouterr().err
    copies = jsonl(tmp_path / "copies.jsonl", windows(prose(20, 60)), *held[:4])
    assert run(f"{command} {copies} --out {tmp_path / 'b'}") == 2
    assert "1 of the held-out documents are training text" in capsys.readouterr().err
    only = jsonl(tmp_path / "only.jsonl", held[4])
    assert run(f"{command} {only} --out {tmp_path / 'c'}") == 2
    assert "All held-out documents share long passages" in capsys.readouterr().err
