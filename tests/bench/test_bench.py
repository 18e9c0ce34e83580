"""Test the verbs bench and profile, and the functions that they call."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from indexcache.bench import measure as measure_module
from indexcache.bench import run as bench_module
from indexcache.bench.floors import PARTS
from indexcache.bench.results import BenchResult, published_figures
from indexcache.bench.run import Grid, run_bench
from indexcache.bench.subject import open_subject
from indexcache.cli import main
from indexcache.cli.timing import batches, contexts, number
from indexcache.pattern import Pattern
from indexcache.shapes import rates_named, shape_of
from indexcache.spec import NamedPattern
from tests.support import refused

pytestmark = pytest.mark.usefixtures("one_thread")

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FLASH = shape_of("glm-4.7-flash-dsa")
KEYS = {"context", "full", "layers", "ttft_s", "decode_tok_s", "peak_gb", "parts_ms", "floor_ms"}
RUN = [
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--index-dtype",
    "auto",
    "--decode-tokens",
    "2",
    "--chunk",
    "64",
    "--layers",
    "4",
]


# -- words -----------------------------------------------------------------------------------------


def test_words_of_the_command_line():
    assert contexts(("10K,60K", "200000", "10000", "0.5M")) == (10_000, 60_000, 200_000, 500_000)
    for word in ("", "K", "-5", "1.5", "0", "1e3", "10Ki"):
        refused(lambda word=word: number(word), "number of tokens")
    assert batches("1, fill,4") == (1, "fill", 4)
    refused(lambda: batches("0"), "fill")


def test_published_figures_are_shipped():
    table = published_figures("glm-4.7-flash-dsa")
    assert table is not None
    assert table["ttft_s"]["all"] == [0.57, 3.38, 8.57, 19.5]
    assert table["decode_tok_s"]["1/4"][-1] == 86.0
    assert table["decode_total_tok_s"]["all"][-1] == 197
    assert all(
        len(v) == len(table["contexts"])
        for k in table
        if k != "contexts"
        for v in table[k].values()
    )
    assert published_figures("glm-5") is None


# -- bench -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject():
    return open_subject("tiny-random", layers=4, dtype="float32", device="cpu", index_dtype="auto")


def grid(*lengths: int, **more: Any) -> Grid:
    named = (NamedPattern("all", Pattern.full(4)), NamedPattern("1/4", Pattern("FSSS")))
    return Grid(
        **({"contexts": lengths, "patterns": named, "decode_tokens": 2, "chunk": 64} | more)
    )


def test_bench_and_its_files(tmp_path, capsys):
    out = tmp_path / "b"
    argv = [
        "bench",
        "tiny-random",
        "--contexts",
        "100,150",
        "--patterns",
        "all,1/2",
        "1/4+R2",
        "--out",
        str(out),
        "--batch",
        "1,2",
        "--json",
        *RUN,
    ]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    result = json.loads(shown.splitlines()[-1])
    assert result == json.loads((out / "bench.json").read_text())
    assert {"device", "date", "rows"} <= set(result)
    assert len(result["rows"]) == 2 * 3 * 2
    assert "Weights are random" in shown
    for row in result["rows"]:
        assert set(row) >= KEYS
        assert row["layers"] == 4
        assert row["peak_gb"] > 0
        assert set(row["floor_ms"]) == set(PARTS)
        assert (row["ttft_s"] is None) == (row["batch"] == 2)
        assert row["decode_total_tok_s"] == pytest.approx(
            row["batch"] * row["decode_tok_s"], rel=1e-3
        )
        if row["batch"] == 1:
            assert row["ttft_s"] > 0
            assert set(row["parts_ms"]) <= set(PARTS)
            assert {"index_topk", "attention", "linears", "mlp"} <= set(row["parts_ms"])
            assert 0 < row["indexer_share"] < 1
        if row["name"] == "all":
            assert row["speedup"]["decode"] == 1
    assert [r["full"] for r in result["rows"][:3]] == [4, 2, 1]
    for name in ("speedup.png", "indexer_share.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        (out / name).unlink()
    # A result file is shown and drawn again without measuring.
    assert main(["bench", str(out / "bench.json"), "--out", str(out)]) == 0
    assert (out / "speedup.png").exists()
    assert capsys.readouterr().out.splitlines()[:8] == shown.splitlines()[2:10]


def test_a_killed_bench_goes_on(subject, tmp_path, monkeypatch):
    real, calls = bench_module.measure, []

    def dying(subject, context, pattern, **more):
        calls.append((context, str(pattern)))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(subject, context, pattern, **more)

    monkeypatch.setattr(bench_module, "measure", dying)
    with pytest.raises(KeyboardInterrupt):
        run_bench(subject, grid(60, 90), tmp_path)
    before = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(r["context"], r["full"]) for r in before] == [(60, 4), (60, 1)]
    after = run_bench(subject, grid(60, 90), tmp_path).rows
    assert after[:2] == before
    assert calls[3:] == [(90, "FFFF"), (90, "FSSS")]
    run_bench(subject, grid(90, 60, 70), tmp_path)  # Only the new length is measured.
    assert calls[5:] == [(70, "FFFF"), (70, "FSSS")]
    refused(
        lambda: run_bench(subject, grid(60, decode_tokens=3), tmp_path),
        "decode_tokens was 2, now 3",
    )
    assert len(run_bench(subject, grid(60, decode_tokens=3), tmp_path, fresh=True).rows) == 2
    (tmp_path / "journal.jsonl").write_text("{}\n")
    refused(lambda: run_bench(subject, grid(60, decode_tokens=3), tmp_path), "changed by hand")


def test_parts_of_a_graph_are_those_that_were_captured(monkeypatch):
    """Marks of the capture count, those before it do not, and each replay gives new times."""
    from indexcache.bench.measure import GraphTimer
    from indexcache.models.timing import timed

    clock = {"now": 0.0}

    class Mark:
        def __init__(self, **flags: bool):
            assert flags == {"enable_timing": True, "external": True}

        def record(self) -> None:
            clock["now"] += 1
            self.at = clock["now"]

        def elapsed_time(self, other: Any) -> float:
            return (other.at - self.at) * clock.get("speed", 1)

    monkeypatch.setattr(torch.cuda, "Event", Mark)
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    with GraphTimer() as timer:
        with timed("attention"):
            pass
        capturing[0] = True
        for name in ("attention", "mlp", "attention"):
            with timed(name):
                pass
        capturing[0] = False
    assert timer.replayed() == {"attention": 2.0, "mlp": 1.0}
    clock["speed"] = 3
    assert timer.replayed() == {"attention": 6.0, "mlp": 3.0}


def test_requests_of_a_batch_have_different_tokens(subject, monkeypatch):
    """Equal requests would use the same experts, and a step would read too few weights."""
    from indexcache.bench import measure as module

    stepped, real = [], module.Decoder.step
    monkeypatch.setattr(
        module.Decoder,
        "step",
        lambda self, tokens: (stepped.append(tokens.tolist()), real(self, tokens))[1],
    )
    row = module.measure(subject, 50, Pattern.full(4), batch=3, decode_tokens=4, chunk=64)
    assert len(stepped) > 4
    assert all(len(set(tokens)) > 1 for tokens in stepped)
    assert row["decode_total_tok_s"] == pytest.approx(3 * row["decode_tok_s"], rel=1e-3)
    assert row["ttft_s"] is None


def test_out_of_memory_is_a_row(subject, tmp_path, monkeypatch, caplog):
    real = bench_module.measure

    def tight(subject, context, pattern, **more):
        if context == 90 and pattern.roles == "FFFF":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(subject, context, pattern, **more)

    monkeypatch.setattr(bench_module, "measure", tight)
    result = run_bench(subject, grid(60, 90), tmp_path)
    (bad,) = (r for r in result.rows if r.get("error"))
    assert bad["error"].startswith("Out of memory at 90 tokens, pattern all")
    assert bad["error"] in caplog.text
    assert [r["full"] for r in result.rows if r["context"] == 90] == [4, 1]
    from indexcache.report.speed import parts_table

    assert "failed" in result.table()
    assert len(parts_table(result.rows).splitlines()) == 2 + 3
    result.draw(tmp_path)
    monkeypatch.undo()
    # The next run measures the cell that failed.
    assert not any(r.get("error") for r in run_bench(subject, grid(60, 90), tmp_path).rows)


def test_published_figures_stand_beside_the_uncut_shape_only(subject):
    from dataclasses import replace

    rows = [
        {
            "context": 200_000,
            "pattern": p,
            "name": n,
            "full": p.count("F"),
            "layers": 47,
            "batch": 1,
            "asked": 1,
            "ttft_s": t,
            "decode_tok_s": 100.0,
            "decode_total_tok_s": 100.0,
            "parts_ms": {},
        }
        for n, p, t in (
            ("all", "F" * 47, 12.0),
            ("1/4", str(Pattern.uniform(47, 4)), 6.0),
            ("R", "F" + "R" * 46, 7.0),
        )
    ]
    uncut = replace(subject, name="glm-4.7-flash-dsa", shape=FLASH)
    full, quarter, pooled = bench_module._result(uncut, {}, rows).rows
    assert full["published"] == {"ttft_s": 19.5, "decode_tok_s": 58.0}
    assert quarter["published"] == {"ttft_s": 10.7, "decode_tok_s": 86.0}
    assert quarter["speedup"] == {"ttft": 2.0, "decode": 1.0}
    assert "published" not in pooled
    cut = replace(uncut, shape=shape_of("glm-4.7-flash-dsa", 10))
    assert not any("published" in r for r in bench_module._result(cut, {}, rows).rows)


def test_profile_of_a_checkpoint(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    argv = [
        "profile",
        "tiny",
        "--contexts",
        "200",
        "--pattern",
        "all",
        "--data",
        str(text),
        "--out",
        str(tmp_path),
        "--json",
        *RUN[:-2],
    ]
    assert main(argv) == 0
    out = capsys.readouterr().out
    (row,) = json.loads(out.splitlines()[-1])["rows"]
    assert (row["context"], row["full"]) == (200, 12)
    assert "prefill, ms (floor)" in out
    assert "decode, ms (floor)" in out
    assert "random" not in out.splitlines()[-2]
    assert json.loads((tmp_path / "profile.json").read_text())["rows"] == [row]


# -- refusals --------------------------------------------------------------------------------------


def said(capsys: Any, *argv: Any) -> str:
    assert main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    (line,) = (x for x in captured.err.splitlines() if x.startswith("indexcache: "))
    assert "Traceback" not in captured.err
    return line


def test_bad_input_gets_one_sentence(tmp_path, capsys, monkeypatch):
    short = ["--contexts", "100", *RUN]
    assert "named shape" in said(capsys, "bench", "glm-9", *RUN)
    assert "maximum is 8192" in said(capsys, "bench", "tiny-random", "--contexts", "9K", *RUN)
    assert "8 layers; 99" in said(capsys, "bench", "tiny-random", *short, "--layers", "99")
    assert "number of tokens" in said(capsys, "bench", "tiny-random", *short, "--contexts", "many")
    assert "has 3 layers" in said(capsys, "bench", "tiny-random", *short, "--patterns", "FSS")
    assert "for a GPU only" in said(capsys, "bench", "tiny-random", *short, "--batch", "fill")
    assert "the same name, 'all'" in said(
        capsys, "bench", "tiny-random", *short, "--patterns", "all,all"
    )
    assert "At least one token" in said(
        capsys, "bench", "tiny-random", *short, "--decode-tokens", "0"
    )
    assert "cuda:9" in said(capsys, "bench", "tiny-random", *short, "--device", "cuda:9")
    assert "is not a bench.json" in said(capsys, "bench", _written(tmp_path / "x.json", "[]"))
    assert "no tokenizer" in said(capsys, "profile", "tiny-random", *short, "--data", tmp_path)
    assert "needs --contexts" in said(capsys, "profile", "tiny")
    assert "Only a named shape" in said(
        capsys, "profile", "tiny", "--contexts", "100", "--layers", "2"
    )
    file = _written(tmp_path / "file", "")
    assert "file" in said(capsys, "bench", "tiny-random", *short, "--out", file)
    assert "file" in said(capsys, "bench", "tiny-random", *short, "--out", file / "below")
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "needs matplotlib" in said(
        capsys, "bench", "tiny-random", *short, "--out", tmp_path / "new"
    )
    assert not (tmp_path / "new" / "bench.json").exists()
    assert (
        main(
            [
                "bench",
                "tiny-random",
                *short,
                "--patterns",
                "all",
                "--out",
                str(tmp_path / "new"),
                "--no-plot",
            ]
        )
        == 0
    )


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_rows_whose_roles_choose_from_all_there_is_are_named():
    """Such a row is timed rightly, but it says nothing of what its pattern saves or costs."""
    result = BenchResult.read(RESULTS / "glm-4.7-flash-dsa_h200_one_request.json")
    assert "choose from all" not in result.report()
    first = result.rows[0] | {"context": 10_000}
    roles = "F" + "R" * (first["layers"] - 1)
    rows = [
        first | {"name": name, "pattern": pattern, "context": context}
        for name, pattern, context in (
            ("R", f"{roles}@8", 10_000),
            ("R", f"{roles}@8", 16_384),
            ("R", f"{roles}@8", 16_385),
            ("R4", f"{roles}@4", 10_000),
            ("S", roles.replace("R", "S"), 2_000),
            ("full", roles.replace("R", "F"), 2_000),
        )
    ]
    said = [x for x in replace(result, rows=rows).report().splitlines() if "choose from all" in x]
    assert len(said) == 2
    assert said[0].startswith("At 10K and 16384 the layers of R (16384 tokens) choose from all")
    assert said[1].startswith("At 2K the layers of S (2048 tokens)")


def test_a_named_shape_in_fp8():
    """The floors count one byte a weight, and with quantised inputs fp8 products."""
    floors = []
    for fp8 in ("dequantize", "keep", "both"):
        subject = open_subject("tiny-random", layers=2, dtype="float32", fp8=fp8)
        kinds = {p.dtype for p in subject.model.parameters()}
        assert (torch.float8_e4m3fn in kinds) == (fp8 != "dequantize")
        assert (f"fp8 {fp8}" in subject.identity) == (fp8 != "dequantize")
        subject = replace(
            subject, shape=shape_of("glm-4.7-flash-dsa", 2), rates=rates_named("H200")
        )
        floors.append(measure_module._floors(subject, 200_000, Pattern("FS"), 1))
    plain, keep, both = (f["floor_ms"]["mlp"] for f in floors)
    assert plain == keep > both
    plain, keep, both = (f["decode_floor_ms"]["mlp"] for f in floors)
    assert 0.6 * plain > keep == both > 0.4 * plain
