"""Give every flag of every verb values that nobody should give: exit code 2 and one sentence."""

from __future__ import annotations

import json
import os
import shlex
from typing import Any

import pytest

from indexcache.cli import VERBS, build_app, main

COMMANDS = {
    "inspect": "inspect {model}",
    "overlap": "overlap {model} --data text.jsonl --split all --length 64 --out o",
    "search": "search {model} --data text.jsonl --split all --length 64 --out o",
    "evaluate": "evaluate {model} --data text.jsonl --split all --length 64 --pattern FSSSSS",
    "distill": "distill {model} --data text.jsonl --eval-every 0 --length 64 --pattern FSSSSS"
    " --out o",
    "export": "export {model} --pattern FSSSSS --out o",
    "doctor": "doctor {model}",
    "bench": "bench {model} --contexts 64 --patterns FSSSSS --device cpu",
    "profile": "profile {model} --contexts 64 --pattern FSSSSS --device cpu",
    "generate": "generate {model} --prompt-file prompt.txt",
    "plan": "plan {model} --gpu H200 --context 64 --output-tokens 10 --price 1",
    "matrix": "matrix {model} --data text.jsonl --length 64 --keep 1/2 --out o",
    "report": "report folder --out page.html",
}
NUMBERS = ["-1", "nan", "1e999", "9" * 400, "1e3", "1/0", "", "x", "9223372036854775808", "٤٤"]
DEVICES = ["meta", "mps", "hpu", "cuda:99", "nonsense", "", "cuda:-1", "lazy"]
PATTERNS = [
    "",
    "F",
    "SFFFFF",
    "1/0",
    "uniform:1e99999999",
    "uniform:1/99999999999999",
    "uniform:4:" + "9" * 400,
    "FRRFRR@" + "9" * 400,
    "1/2+R" + "9" * 6000,
    "1/2+R0",
    "full:1e400",
    "\n",
    "\udce5",
]
FILES = ["pipe", "zero", "pipe.json", "zero.json", "deep.json", "deep.toml", "huge.json", "folder"]
FILES += ["folder.json", "nul.json", "list.json", "/dev/full", "", "nowhere\udce5", "n" * 5000]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with files that have no end, no bottom or nothing to read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("pipe", "pipe.json"):
        os.mkfifo(name)
    for name in ("zero", "zero.json"):
        os.symlink("/dev/zero", name)
    for name in ("folder", "folder.json"):
        (tmp_path / name).mkdir()
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "deep.toml").write_text("a=" + "[" * 100_000)
    (tmp_path / "nul.json").write_bytes(b"\0" * 100)
    (tmp_path / "list.json").write_text("[]")
    with open("huge.json", "wb") as f:
        f.truncate(1 << 40)  # It takes no room.
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"ids": [(i * j) % 128 for j in range(300)]}) for i in range(30))
    )
    (tmp_path / "prompt.txt").write_text("Once upon a time")
    return tmp_path


def flags(verb: str) -> list[tuple[str, list[str]]]:
    """List the flags of a verb that take a value, each with bad values of its kind."""
    collection = build_app()[verb].assemble_argument_collection(parse_docstring=True)
    found = []
    for argument in collection:
        if not argument.parse or argument.children or argument.hint is bool:
            continue
        name, hint = argument.name, str(argument.hint)
        values = FILES
        if name == "--device":
            values = DEVICES
        elif "int" in hint or "float" in hint or name in ("--contexts", "--context", "--batch"):
            values = NUMBERS
        elif name in ("--pattern", "--patterns", "--against"):
            values = [*PATTERNS, *FILES]
        elif "Literal" in hint:
            values = ["x", ""]
        found.append((name, values))
    return found


def with_flag(words: list[str], flag: str, value: str) -> list[str]:
    """Return a command with a flag's value replaced or added."""
    if flag == "--model":
        return [words[0], value, *words[2:]]
    if flag in words:
        at = words.index(flag)
        words = words[:at] + words[at + 2 :]
    return [*words, f"{flag}={value}"]


@pytest.mark.parametrize("verb", VERBS)
def test_bad_values_are_one_sentence_and_exit_code_2(
    verb, checkpoint, here, monkeypatch, capsys: Any
):
    """Values that are none after all, e.g. `--seed 1e3`, end where the model would be loaded."""
    import transformers

    def stop(*args, **kwargs):
        raise ValueError("the model would be loaded now")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", stop)
    words = shlex.split(COMMANDS[verb].format(model=checkpoint))
    for place, (flag, values) in enumerate(flags(verb)):
        for value in values[place % 4 :: 4]:  # All flags of a kind together see all values.
            if verb in ("inspect", "export", "plan") and flag in ("--config", "--model", "--bench"):
                expected = {2}
            else:
                expected = {0, 2} if verb in ("inspect", "export", "plan") else {2}
                if verb == "doctor":  # Its verdict on a bad pattern is that it fails.
                    expected = {0, 1, 2}
            code = main(with_flag(words, flag, value))
            out, err = capsys.readouterr()
            where = (flag, value[:40], err[-500:])
            assert code in expected, where
            assert "Traceback" not in err, where
            if code == 2:
                assert out == "", where
                lines = [x for x in err.splitlines() if x.startswith("indexcache: ")]
                lines = [x for x in lines if not x.startswith("indexcache: note: ")]
                assert len(lines) == 1, where
                assert len(lines[0]) < 2000, where
