"""What the README shows is run, and what it says of the results is in the files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from indexcache.cli import main
from indexcache.records import read_json

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```sh demo\n(.*?)```", README, re.S)
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert [c[1] for c in commands] == ["inspect", "search", "evaluate", "overlap", "export"]
    for program, *arguments in commands:
        assert program == "indexcache"
        assert main(arguments) == 0, capsys.readouterr().err
    assert (tmp_path / "runs" / "export" / "vllm.txt").exists()
    assert (tmp_path / "runs" / "overlap" / "overlap.png").exists()


def test_readme_table_is_the_measured_one():
    rows = [
        r
        for r in read_json(ROOT / "benchmarks" / "results" / "demo_tiny.json")["rows"]
        if r["domain"] == "all"
    ]
    shown = re.findall(
        r"^\| ([^|]+): `(\w+(?:@\d+)?)` \| (\d+) of 12 \| ([\d.]+) \| ([+-][\d.]+) \| \[(\S+), (\S+)\]",
        README,
        re.M,
    )
    assert len(shown) == len(rows) == 9
    for row, (name, pattern, full, loss, delta, low, high) in zip(rows, shown, strict=True):
        assert (name, pattern, int(full)) == (row["name"], row["pattern"], row["full"])
        for text, key in (
            (loss, "loss"),
            (delta, "delta_loss"),
            (low, "ci_low"),
            (high, "ci_high"),
        ):
            assert float(text) == pytest.approx(row[key], abs=6e-5)


def test_readme_third_layer_is_the_measured_one():
    found = read_json(ROOT / "benchmarks" / "results" / "tiny_third_layer.json")
    demo = read_json(ROOT / "benchmarks" / "results" / "demo_tiny.json")
    assert found["baseline"] == next(p["pattern"] for p in demo["frontier"] if p["full"] == 3)
    deltas = [r["delta_loss"] for r in found["rows"]]
    assert len(deltas) == 9
    assert all(r["ci_low"] > 0 for r in found["rows"])
    assert f"lose {min(deltas):.3f} to {max(deltas):.3f} nats more" in README


def test_readme_example_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(block, "README.md", "exec"), {})
    assert "torch.Size([1, 256, 4096])" in capsys.readouterr().out


def test_long_context_example_runs(capsys):
    (block,) = re.findall(
        r"```python\n(.*?)```",
        (ROOT / "docs" / "long-context.md").read_text(encoding="utf-8"),
        re.S,
    )
    exec(compile(block, "long-context.md", "exec"), {})
    assert "torch.Size([1, 500, 4096])" in capsys.readouterr().out


def test_long_context_table_is_the_measured_one():
    text = (ROOT / "docs" / "long-context.md").read_text(encoding="utf-8")
    for row in read_json(ROOT / "benchmarks" / "results" / "tiny_cpu.json")["rows"]:
        line = (
            f"| {row['context']:,} | {row['path']} | {row['seconds']:.1f} | {row['peak_mb']:,} MB |"
        )
        assert line in text, line


def test_speed_tables_are_the_results():
    result = read_json(ROOT / "benchmarks/results/glm-4.7-flash-dsa_h100.json")
    published, long = (
        result["published"],
        (ROOT / "docs/long-context.md").read_text(encoding="utf-8"),
    )
    rows = sorted(
        (r for r in result["rows"] if r["name"] in ("all", "1/2", "1/4")),
        key=lambda r: (r["context"], -r["full"]),
    )
    assert len(rows) == 12
    for r in rows:
        at, name = published["contexts"].index(r["context"]), r["name"]
        first, rate = published["ttft_s"][name][at], published["decode_tok_s"][name][at]
        gains = [r["speedup"][what] for what in ("ttft", "decode")]
        line = (
            f"| {r['context'] // 1000}K | {name} ({r['full']}/{r['layers']}) | {r['ttft_s']:.3g} ({first}) | {gains[0]:.2f} "
            f"| {r['decode_tok_s']:.0f} ({rate}) | {gains[1]:.2f} | {r['added_gb']:.2f} |"
        )
        assert line in long
        short = f"{r['ttft_s']:.2f}" if r["ttft_s"] < 9.9 else f"{r['ttft_s']:.1f}"
        line = f"| {r['context'] // 1000}K | {name} | {short} ({first}) | {r['decode_tok_s']:.0f} ({rate + 1e-9:.0f}) |"
        assert line in README or name == "1/2"


def test_peer_and_batch_tables_are_the_results():
    long = (ROOT / "docs/long-context.md").read_text(encoding="utf-8")
    for r in (rows := read_json(ROOT / "benchmarks/results/vllm_h100.json")["rows"]):
        first, rate = r["peer_ttft_s"] / r["ttft_s"], r["decode_tok_s"] / r["peer_decode_tok_s"]
        line = f"| {r['context'] // 1000}K | {r['name']} ({r['full']}/47; {r['peer_full']}/47) "
        mark = "*" if r["peer_compiled"] else ""
        line += f"| {r['ttft_s']:.3g} | {r['peer_ttft_s']:.3g}{mark} | {first:.2f}{mark} "
        line += f"| {r['decode_tok_s']:.0f} | {r['peer_decode_tok_s']:.0f} | {rate:.2f} |"
        assert line in long
        assert min(first, rate) > 1
    assert len(rows) == 8
    full, quarter = (
        next(r for r in rows if r["context"] == 200_000 and r["name"] == name)
        for name in ("all", "1/4")
    )
    assert (
        f"at 200K: {full['peer_ttft_s']:.1f} s with all layers full and {quarter['peer_ttft_s']:.1f} s with one in four, "
        f"where this took {full['ttft_s']:.1f} and {quarter['ttft_s']:.1f}; {full['peer_decode_tok_s']:.0f} and "
        f"{quarter['peer_decode_tok_s']:.0f} tokens/s where this decoded {full['decode_tok_s']:.0f} and "
        f"{quarter['decode_tok_s']:.0f}."
    ) in README
    h200 = read_json(ROOT / "benchmarks/results/glm-4.7-flash-dsa_h200.json")["rows"]
    filled = [r for r in h200 if r["batch"] > 1]
    for r in filled:
        known = r["published"]["decode_total_tok_s"]
        line = (
            f"| {r['batch']} x 200K | {r['name']} ({r['full']}/47) | {r['decode_total_tok_s']:.0f} ({known}) "
            f"| {r['speedup']['decode']:.2f} | {r['cache_gb']:.0f} GB | {r['peak_gb']:.0f} GB |"
        )
        assert line in long
    assert len(filled) == 2
    all_full, quarter = (r["decode_total_tok_s"] for r in filled)
    assert (
        f"on an H200: {all_full:.0f} tokens/s with all layers full, {quarter:.0f} with one in four"
        in README
    )
    pools, full = (
        next(r for r in h200 if r["batch"] == 1 and r["name"] == name) for name in ("1/8+R", "all")
    )
    assert f"{pools['ttft_s']:.1f} s where all full take {full['ttft_s']:.1f}" in long
    assert (
        f"{pools['decode_tok_s']:.0f} tokens/s where all full decode {full['decode_tok_s']:.0f}"
        in long
    )


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), (path.name, target)


def test_the_rewriting_is_as_exact_as_its_readme_says():
    *each, total = read_json(ROOT / "benchmarks/results/smollm2_check.json")["rows"]
    text = (ROOT / "recipes/smollm2/README.md").read_text(encoding="utf-8")
    assert len(each) == total["documents"] == 20
    assert min(r["agreement"] for r in each) == 1.0
    assert (
        f"by {total['relative']:.1e} (relative; {max(r['relative'] for r in each):.1e} in the worst".replace(
            "e-0", "e-"
        )
        in text
    )
    assert f"all {total['tokens']:,} positions" in text
    assert f"is {total['perplexity_llama']:.4f} for both" in text.replace("\n", " ")
    assert f"{total['perplexity_dsa']:.4f}" == f"{total['perplexity_llama']:.4f}"
