"""Test that the verb generate and `Model.generate` give the tokens of stock transformers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from indexcache import accelerate, use_pattern
from indexcache.cli import main
from indexcache.models.fast.generate import end_tokens, stream_text, stream_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = (
    "The Congress assembled in Washington, and the President said to the members of both Houses "
    "that the budget of the year, "
)


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT * 3, encoding="utf-8")
    return path


def test_greedy_tokens_are_those_of_stock(tiny, prompt, capsys):
    assert (
        main(
            [
                "generate",
                "tiny",
                "--prompt-file",
                str(prompt),
                "--max-new-tokens",
                "24",
                "--chunk",
                "17",
                "--json",
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    ids = tiny.encode(PROMPT * 3)
    assert result["prompt_tokens"] == len(ids) > 64
    stock = tiny.module.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[
        0, len(ids) :
    ].tolist()
    assert result["tokens"] == [t for t in stock if t not in end_tokens(tiny.module)]
    assert result["text"] == tiny.tokenizer.decode(result["tokens"])
    assert captured.out.startswith(result["text"] + "\n")
    assert "tokens of prompt in" in captured.err


def test_a_pattern_and_a_temperature_change_what_is_said(prompt, capsys):
    def said(*more: str) -> list[int]:
        assert (
            main(
                [
                    "generate",
                    "tiny",
                    "--prompt-file",
                    str(prompt),
                    "--max-new-tokens",
                    "8",
                    "--json",
                    *more,
                ]
            )
            == 0
        )
        return json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"]

    greedy = said()
    assert said("--pattern", "full") == greedy
    assert said("--pattern", "uniform:1/4") != greedy  # Sharing layer 1 ruins this model.
    drawn = [said("--temperature", "1.5", "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]


def test_patterns_apply_as_in_the_stock_model(tiny):
    """Under R, every token is that of the stock model without a cache."""
    ids = tiny.encode(PROMPT)
    pattern = "FFRRRRRRRFRR@8"
    with use_pattern(tiny.module, pattern), torch.no_grad():
        expected = list(ids)
        for _ in range(6):
            expected.append(int(tiny.module(torch.tensor([expected])).logits[0, -1].argmax()))
    with accelerate(tiny.module), use_pattern(tiny.module, pattern):
        assert list(stream_tokens(tiny.module, ids, max_new_tokens=6)) == expected[len(ids) :]
        stop = expected[len(ids) + 3]
        cut = expected[len(ids) :].index(stop)
        assert (
            list(stream_tokens(tiny.module, ids, max_new_tokens=6, ends=[stop]))
            == expected[len(ids) : len(ids) + cut]
        )


def test_the_handle_generates_the_same_text_on_both_paths(tiny):
    stock = tiny.generate(PROMPT, max_new_tokens=8)
    with accelerate(tiny.module):
        assert tiny.generate(PROMPT, max_new_tokens=8) == stock != ""
    with use_pattern(tiny.module, "FFRRRRRRRFRR@8"):
        shared = tiny.generate(PROMPT, max_new_tokens=8)
        with pytest.raises(ValueError, match="maximum of 4096"):
            tiny.generate(PROMPT, max_new_tokens=4096)
    with accelerate(tiny.module), use_pattern(tiny.module, "FFRRRRRRRFRR@8"):
        assert tiny.generate(PROMPT, max_new_tokens=8) == shared


def test_stock_samples_by_the_seed_and_leaves_the_global_state(tiny):
    before = torch.get_rng_state()
    texts = [tiny.generate(PROMPT, max_new_tokens=8, temperature=1.5, seed=s) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_pieces_are_the_whole_text_and_whole_characters(tiny):
    text = "naïve café — 世界 🙂🙂\n  two  spaces\tand a tab\n" * 3
    tokens = tiny.encode(text)
    texts = list(stream_text(tiny.tokenizer, tokens))
    assert "".join(texts) == tiny.tokenizer.decode(tokens) == text
    assert len(texts) > len(text) / 8
    assert not any("\ufffd" in piece for piece in texts)
    slow = SimpleNamespace(decode=tiny.tokenizer.decode)  # It has no `tokenizers` backend.
    assert list(stream_text(slow, iter(tokens))) == [text]
    cut = tiny.encode("🙂")[:-1]  # These tokens end within a character.
    assert "".join(stream_text(tiny.tokenizer, cut)) == tiny.tokenizer.decode(cut)


def test_bad_input_gets_one_sentence(tmp_path, prompt, capsys):
    def said(*argv: object) -> str:
        assert main(["generate", *map(str, argv)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = (x for x in captured.err.splitlines() if x.startswith("indexcache: "))
        return line

    empty, bytes_ = tmp_path / "empty.txt", tmp_path / "bytes.txt"
    empty.write_text("")
    bytes_.write_bytes(b"\xff\xfe\xff")
    assert "is empty" in said("tiny", "--prompt-file", empty)
    assert "UTF-8" in said("tiny", "--prompt-file", bytes_)
    assert "cannot be read" in said("tiny", "--prompt-file", tmp_path / "none")
    assert "cannot be read" in said("tiny", "--prompt-file", tmp_path)
    assert "no such checkpoint folder" in said("nowhere", "--prompt-file", prompt)
    assert "maximum of 4096" in said("tiny", "--prompt-file", prompt, "--max-new-tokens", "4096")
    assert "At least one new token" in said(
        "tiny", "--prompt-file", prompt, "--max-new-tokens", "0"
    )
    assert "--temperature" in said("tiny", "--prompt-file", prompt, "--temperature", "-1")
    assert "--temperature" in said("tiny", "--prompt-file", prompt, "--temperature", "nan")
    assert "--chunk" in said("tiny", "--prompt-file", prompt, "--chunk", "0")
    assert "has 3 layers" in said("tiny", "--prompt-file", prompt, "--pattern", "FSS")
    assert "needs --prompt-file" in said("tiny")
