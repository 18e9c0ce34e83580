"""Run the gate of `evaluate`: exit code 0 is safe, 1 is not, and 2 a gate that decides nothing."""

from __future__ import annotations

import json
import shlex

import pytest

from indexcache.cli import main

LENGTH = "--length 64 --batch 8"


@pytest.fixture(scope="module")
def pruned(checkpoint, tmp_path_factory):
    """A checkpoint without the indexers of layers 1, 2, 4 and 5."""
    out = tmp_path_factory.mktemp("pruned")
    assert main(shlex.split(f"export {checkpoint} --pattern FSSFSS --out {out}")) == 0
    return out / "transformers"


def run(checkpoint, text, rest: str, sequences: int = 80) -> int:
    return main(
        shlex.split(
            f"evaluate {checkpoint} --data {text} --split all --sequences {sequences} {LENGTH} "
            "--allow-blind "
            f"{rest}"
        )
    )


@pytest.mark.parametrize(("most", "code", "word"), [(100, 0, "safe"), (-100, 1, "not safe")])
def test_enough_documents_decide(checkpoint, text, tmp_path, capsys, most, code, word):
    assert run(checkpoint, text, f"--pattern FSSFSS --most={most} --out {tmp_path} --json") == code
    printed = capsys.readouterr().out
    gate = json.loads((tmp_path / "evidence.json").read_text())["gate"]
    assert gate == json.loads(printed.splitlines()[-1])["gate"]
    assert gate["passed"] == (code == 0)
    assert gate["most"] == most
    assert [(v["domain"], v["verdict"]) for v in gate["verdicts"]] == [
        ("all", word),
        ("a", word),
        ("b", word),
    ]
    assert "The gate is passed" in printed if code == 0 else "The gate is not passed" in printed


@pytest.mark.parametrize("sequences", [4, 40])
def test_few_documents_are_inconclusive(checkpoint, text, capsys, sequences):
    """Of 40 documents each domain has 20: all of the text is safe, and the domains are unknown."""
    assert run(checkpoint, text, "--pattern FSSFSS --most 100", sequences) == 1
    captured = capsys.readouterr()
    printed = captured.out
    count = sequences // 2
    assert f"the gate will be inconclusive: too few documents in a ({count}), b" in captured.err
    assert "inconclusive: FSSFSS on " in printed
    assert "fewer than 36 documents" in printed
    assert "No interval and no verdict for" in printed


@pytest.mark.parametrize("most", ["nan", "inf", "-inf", "Infinity", "1e9", "1e999", "''", "much"])
def test_a_gate_that_is_switched_off_is_refused(checkpoint, text, capsys, most):
    assert run(checkpoint, text, f"--pattern FSSFSS --most={most}") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "gate is" in captured.err or "--most" in captured.err


@pytest.mark.parametrize("most", ["nan", "inf", "-inf", "true", "''", "'nan'", "[]"])
def test_a_gate_that_a_file_switches_off_is_refused(checkpoint, text, tmp_path, capsys, most):
    settings = tmp_path / "settings.toml"
    settings.write_text(f"most = {most}\n")
    assert run(checkpoint, text, f"--pattern FSSFSS --config {settings}") == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "patterns",
    [
        "--pattern FFFFFF",
        "--pattern full",
        "--pattern uniform:1/3 same=full",
        "--pattern FSSFSS --against uniform:1/3",
        "--pattern FSSSSS FSSFSS --against 1/3",
        "--pattern FRRFRR@8 --against FFFFFF",
        "--pattern FRRFRR@1 --against FSSFSS",
        "--pattern FRRFRR@9 --against FRRFRR@99",
    ],
)
def test_a_pattern_against_itself_is_refused(checkpoint, text, capsys, patterns):
    assert run(checkpoint, text, f"{patterns} --most 0.1") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "compare a model with itself" in captured.err


def test_a_pruned_checkpoint_against_itself_is_refused(pruned, text, capsys):
    for pattern in ("FSSFSS", "1/3", str(pruned / "config.json")):
        assert run(pruned, text, f"--pattern {pattern} --most 0.1") == 2
        assert "is the baseline, FSSFSS" in capsys.readouterr().err
    assert run(pruned, text, "--pattern FSSRSS FRRFRR --most 0.1") == 2
    assert "no indexer" in capsys.readouterr().err
    assert run(pruned, text, "--pattern FSSSSS --most=100") == 0


def test_without_a_gate_a_pattern_may_be_the_baseline(pruned, text, capsys):
    assert run(pruned, text, "--pattern FSSFSS", 4) == 0
    assert "[+0.0000, +0.0000]" in capsys.readouterr().out


def test_a_gate_without_a_pattern_is_refused(checkpoint, text, capsys):
    for patterns in ("", "--pattern", "--pattern ''"):
        assert run(checkpoint, text, f"{patterns} --most 0.1") == 2
        assert capsys.readouterr().out == ""
