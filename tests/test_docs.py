"""Run what README and docs show, and compare their tables with the result files."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from docs import tables
from docs.tables import large, registry
from indexcache.cli import main
from indexcache.data import shipped_text

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = {"MODEL": "tiny", "TEXT": str(shipped_text("heldout"))}
QUICK = {  # Flags that are set, or set anew, so that a shown command is quick.
    "search": {"--length": "256", "--sequences": "3", "--no-uniform": None},
    "evaluate": {"--length": "256", "--sequences": "6"},
    "distill": {"--length": "256", "--steps": "1", "--eval-every": "0"},
}


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page whose info string is `language`."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


def commands(block: str) -> list[list[str]]:
    """Return the arguments of every indexcache command of a block."""
    lines = block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [w[1:] for w in words if w and w[0] == "indexcache"]


def test_the_tables_of_streaming_appear_with_their_file(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "RESULTS", tmp_path)
    assert large.stream_measured() == large.stream_hours() == large.NOT_MEASURED
    layer = {"layer": 0, "kind": "dense, F", "candidates": 20, "seconds": 9.96, "tflops": 401.2}
    measured: dict[str, Any] = {
        "device": "NVIDIA H200",
        "shape": "deepseek-v3.2",
        "layers_timed": 1,
        "tokens": 131072,
        "rows": [layer | {"read_gb_s": 5.256, "wait_share": 0.0312}],
        "peak_device_gb": 49.6,
        "peak_host_gb": 138.2,
        "projected_hours": {"61 to 15": 11.26, "78 to 20": 15.0},
    }
    (tmp_path / large.STREAMED).write_text(json.dumps(measured))
    line = "| 0: dense, F | 20 | 10.0 | 401 | 5.26 | 3.1% |"
    assert large.stream_measured().splitlines()[2:] == [line]
    more = {"forecast_hours": {"61 to 15": 9.0}, "disk_gb_s": 1.494}
    more |= {"forecast": {"device_gb": 51.0, "host_gb": 140}}
    for extra, said in (({}, ("", "")), (more, ("9.0 h", "51 GB"))):
        (tmp_path / large.STREAMED).write_text(json.dumps(measured | extra))
        rows = large.stream_hours().splitlines()[2:]
        assert rows[0] == f"| 61 to 15 full, one GPU | 11.3 h | {said[0]} |"
        assert rows[1] == "| 78 to 20 full, one GPU | 15.0 h |  |"
        assert rows[2] == f"| peak device memory of this run | 50 GB | {said[1]} |"
        assert len(rows) == 4 + ("disk_gb_s" in extra)
    assert rows[4] == "| the disk alone, past the page cache | 1.49 GB/s |  |"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_tables_are_made_from_the_result_files(path):
    text = path.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run python -m docs.tables"


def test_every_table_is_shown():
    shown = {name for p in PAGES for _, name, _ in tables.MARKED.findall(p.read_text("utf-8"))}
    assert shown == set(tables.TABLES)


def test_readme_commands_run_and_print_what_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "README.md", "sh demo")
    (shown,) = blocks(ROOT / "README.md", "text")
    assert [c[0] for c in commands(block)] == ["search", "evaluate", "export"]
    printed = []
    for arguments in commands(block):
        assert main(arguments) == 0, capsys.readouterr().err
        printed += capsys.readouterr().out.splitlines()
    for line in shown.splitlines():
        assert line.rstrip() in [p.rstrip() for p in printed]
    assert (tmp_path / "runs" / "export" / "vllm.txt").exists()


def test_readme_fits_a_screen_or_two():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def quick(verb: str, flags: list[str]) -> list[str]:
    """Return the arguments of a command with placeholders filled and its quick flags set."""
    flags = [NAMES.get(word, word) for word in flags]
    for flag, value in QUICK.get(verb, {}).items():
        if flag in flags and value is not None:
            flags[flags.index(flag) + 1] = value
        elif flag not in flags:
            flags += [flag] if value is None else [flag, value]
    return [verb, *flags]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_blocks_of_a_page_run_in_order(path, tmp_path, monkeypatch, capsys):
    """Run blocks marked `sh` and `python`; MODEL stands for tiny, TEXT for the shipped text."""
    monkeypatch.chdir(tmp_path)
    text = path.read_text(encoding="utf-8")
    for kind, block in re.findall(r"^```(sh|python)\n(.*?)^```", text, re.S | re.M):
        if kind == "python":
            exec(compile(block, path.name, "exec"), {})
            assert capsys.readouterr().out
            continue
        for verb, *flags in commands(block):
            assert main(quick(verb, flags)) == 0, (verb, flags, capsys.readouterr().err)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_commands_for_a_gpu_are_understood(path, tmp_path, monkeypatch, capsys):
    """Blocks marked `sh gpu` need a GPU or hours; their flags are parsed, nothing runs."""
    from indexcache.cli import build_app

    for block in blocks(path, "sh gpu"):
        assert commands(block)
        for arguments in commands(block):
            build_app().parse_args(arguments, exit_on_error=False, print_error=False)


def test_every_block_is_of_a_kind_that_is_tested():
    kinds = {"sh", "sh gpu", "sh demo", "sh install", "python", "text", "toml", "yaml", ""}
    for path in PAGES:
        for kind in re.findall(r"^```(.+)$", path.read_text(encoding="utf-8"), re.M):
            assert kind in kinds, (path.name, kind)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)]*)?\)", text):
        if "://" in target:
            continue
        page = path.parent / target if target else path
        assert page.exists(), (path.name, target)
        if anchor:
            titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
            assert anchor[1:] in [
                re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles
            ]


def test_no_file_is_named_that_the_repository_does_not_have():
    for path in PAGES:
        for name in re.findall(r"`((?:[\w-]+/)+[\w.-]+\.\w+)`", path.read_text(encoding="utf-8")):
            if not name.startswith(("runs/", "transformers/")):
                homes = (ROOT, ROOT / "indexcache", ROOT / "indexcache" / "ops")
                assert any((home / name).exists() for home in homes), (path.name, name)
