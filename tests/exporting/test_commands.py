"""Check the launch commands: what a shell makes of them, and for which versions they are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from docs.tables import ROOT
from indexcache.checkpoint import resolve
from indexcache.cli import main
from indexcache.exporting import export
from indexcache.exporting.commands import bash, powershell
from tests.exporting.support import PATTERN

pytestmark = pytest.mark.usefixtures("one_thread")

ODD = (
    "plain/path-1.0",
    "",
    "with space",
    "it's",
    "typographic \u2019 \u201a \u201c",
    'double " and \\"',
    "$HOME `id` $(id) %PATH% !! & ; | < > ( ) { } # @x ~",
    "tab\tand\nline",
    "ü",
    '{"a": ["F", true], "b": {"c": "it\'s"}}',
)


def by_powershell(line: str) -> list[str]:
    """Split a command line by PowerShell's rules for bare words and single quotes."""
    quotes = "'\u2018\u2019\u201a\u201b"
    words, i = [], 0
    while i < len(line):
        if line[i] == " ":
            i += 1
        elif line[i] in quotes:
            word, i = "", i + 1
            while True:
                if line[i] in quotes:
                    i += 1
                    if i == len(line) or line[i] not in quotes:
                        break
                word, i = word + line[i], i + 1
            words.append(word)
        else:
            word = re.match(r"[^ ]+", line[i:])[0]
            assert re.fullmatch(r"[A-Za-z0-9_./:=+-]+", word), word
            words, i = [*words, word], i + len(word)
    return words


def by_shell(line: str) -> list[str]:
    """Let the shell itself run the command, whose program prints what it was given."""
    program, rest = line.split(" ", 1)
    code = f"show() {{ printf '%s\\0' {program} \"$@\"; }}\nshow {rest}\n"
    out = subprocess.run(["sh", "-c", code], capture_output=True, text=True, check=True).stdout
    return out.split("\0")[:-1]


def test_every_word_survives_both_shells():
    words = ["vllm", *ODD]
    assert by_shell(bash(words)) == words
    assert by_powershell(powershell(words)) == words


def test_commands_give_the_engines_what_the_files_hold(glm_folder, tmp_path, capsys):
    base = Path(shutil.copytree(glm_folder, tmp_path / "it's a model"))
    out = tmp_path / "out"
    assert main(["export", str(base), "--pattern", PATTERN, "--out", str(out), "--json"]) == 0
    printed, _, last = capsys.readouterr().out.rstrip().rpartition("\n")
    found = json.loads(last)["commands"]
    for command in found:
        assert by_shell(command["bash"]) == by_powershell(command["powershell"]) == command["words"]
        assert command["bash"] in printed
        assert command["powershell"] in printed
    checkpoint = str(out / "transformers")
    assert [(c["engine"], c["words"][-3:]) for c in found] == [
        ("vllm", ["vllm", "serve", checkpoint]),
        ("vllm", [str(base), "--hf-overrides", (out / "vllm.json").read_text().rstrip()]),
        ("sglang", ["sglang.launch_server", "--model-path", checkpoint]),
        (
            "sglang",
            [str(base), "--json-model-override-args", (out / "sglang.json").read_text().rstrip()],
        ),
        ("tensorrt-llm", ["trtllm-serve", checkpoint]),
    ]


def versions(*args, **kwargs) -> list[str]:
    return [c.versions for c in export(*args, **kwargs).commands if c.engine == "vllm"]


def test_vllm_with_surplus_tensors_needs_its_plugin(glm_folder, deepseek, tmp_path):
    plugin = "0.25 and newer, but 0.29 to 0.33 only with the plugin indexcache[vllm]"
    for i, base in enumerate((glm_folder, deepseek)):
        pruned = export(base, PATTERN, tmp_path / f"p{i}", engines=None)
        assert [c.versions for c in pruned.commands if c.engine == "vllm"] == [
            "0.25 to 0.33", plugin,
        ]  # fmt: skip
        (folder,) = pruned.files.get("transformers") or pruned.files["checkpoint"]
        assert versions(folder, PATTERN, tmp_path / f"again{i}", engines="vllm") == ["0.25 to 0.33"]
        assert versions(base, "F" * 6, tmp_path / f"full{i}", engines="vllm") == ["0.25 to 0.33"]
    kept = export(deepseek, PATTERN, tmp_path / "k", engines=("vllm", "tensorrt-llm"), prune=False)
    assert [c.versions for c in kept.commands if c.engine == "vllm"] == [plugin, plugin]
    bare = export(glm_folder / "config.json", PATTERN, tmp_path / "b", engines=None)
    assert {c.words[-3] for c in bare.commands} == {"MODEL"}
    assert {c.engine for c in bare.commands} == {"vllm", "sglang"}


def test_tensorrt_llm_gets_a_checkpoint_and_needs_weights(glm_folder, deepseek, tmp_path, capsys):
    for i, base in enumerate((glm_folder, deepseek)):
        result = export(base, PATTERN, tmp_path / str(i), engines="tensorrt-llm")
        assert set(result.files) == {"checkpoint"}
        config = json.loads((tmp_path / str(i) / "checkpoint" / "config.json").read_text())
        assert config["index_topk_pattern"] == PATTERN
    command = ["export", str(glm_folder / "config.json"), "--pattern", PATTERN, "--out"]
    assert main([*command, str(tmp_path / "no"), "--engine", "tensorrt-llm"]) == 2
    assert "no weights" in capsys.readouterr().err


def test_the_page_shows_the_commands_as_they_are_printed(tmp_path):
    page = (ROOT / "docs" / "engines.md").read_text()
    result = export("tiny", "FFSSSSSSSFSS", tmp_path / "out", engines=None)
    printed = result.table().split("\n\n", 1)[1]
    printed = printed.replace(str(tmp_path / "out"), "runs/serve")
    assert f"```text\n{printed.replace(str(resolve('tiny')), 'MODEL')}\n```" in page
    compose, kubernetes = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", page, re.S))
    vllm = compose["services"]["vllm"]
    (container,) = kubernetes["spec"]["template"]["spec"]["containers"]
    for engine, words in (
        ("vllm", vllm["entrypoint"] + vllm["command"]),
        ("sglang", container["command"] + container["args"]),
    ):
        (shown,) = [c for c in result.commands if c.engine == engine and c.words[-1][0] == "{"]
        shown = [w.replace(str(resolve("tiny")), "/model") for w in shown.words]
        assert words[: len(shown)] == shown
        assert words[len(shown) - 1] == (tmp_path / "out" / f"{engine}.json").read_text().rstrip()
        assert not set("$") & set("".join(words))  # Compose and Kubernetes would replace it.
