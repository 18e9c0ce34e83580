"""Named shapes, floors, and the verbs bench and profile."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from indexcache.bench import run as bench_module
from indexcache.bench.floors import PARTS, decode_floor, prefill_floor
from indexcache.bench.measure import open_subject
from indexcache.bench.run import Grid, published, run_bench
from indexcache.cli import main
from indexcache.cli.timing import NAMED, batches, contexts, number, patterns
from indexcache.models.random import random_model
from indexcache.pattern import Pattern
from indexcache.shapes import (
    DEVICES,
    SHAPES,
    Rates,
    Shape,
    count_pairs,
    peak_of,
    rates_named,
    reachable_of,
    read_shape,
    shape_config,
    shape_of,
)
from tests.support import refused

pytestmark = pytest.mark.usefixtures("one_thread")

H100 = rates_named("H100")
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


# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_counts_of_weights_are_those_of_the_model(name):
    import transformers

    config = shape_config(name, 5)
    shape = Shape.of(config)
    kind = config.pop("model_type")
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind, **config)
        )
    held = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1}
    assert shape.weights == sum(held.values())
    layer = {
        n.removeprefix("model.layers.4."): c
        for n, c in held.items()
        if n.startswith("model.layers.4.")
    }
    assert shape.indexer_weights == sum(c for n, c in layer.items() if "indexer" in n)
    assert shape.attention_weights == sum(
        c for n, c in layer.items() if "self_attn" in n and "indexer" not in n
    )
    assert shape.experts * shape.expert_weights == sum(
        c for n, c in layer.items() if "experts" in n and "shared" not in n
    )


def test_named_shapes_have_the_sizes_that_are_known():
    assert FLASH.weights == pytest.approx(30.1e9, rel=0.01)
    assert shape_of("glm-5").weights == pytest.approx(744e9, rel=0.01)
    assert shape_of("deepseek-v3.2").weights == pytest.approx(672e9, rel=0.01)
    assert FLASH.cache_bytes(47) == 47 * (576 * 2 + 132)
    assert FLASH.cache_bytes(12, index_dtype="bf16") == 47 * 576 * 2 + 12 * 256
    assert ", ".join(SHAPES) == NAMED


def test_random_models_are_seeded_and_whole():
    config = shape_config("tiny-random", 3)
    model, again, other = (random_model(config, dtype="bfloat16", seed=seed) for seed in (1, 1, 2))
    states = [m.state_dict() for m in (model, again, other)]
    assert all(torch.equal(a, states[1][n]) for n, a in states[0].items())
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])
    fp32 = [
        *type(model)._keep_in_fp32_modules,
        *type(model)._keep_in_fp32_modules_strict,
    ]  # from 5.24 on the routers too
    assert "indexer.weights_proj" in fp32
    for name, p in model.named_parameters():
        if p.dim() > 1:
            assert p.float().std() == pytest.approx(0.02, rel=0.1), name
        else:
            assert torch.equal(
                p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)
            ), name
        assert p.dtype == (
            torch.float32 if any(part in name for part in fp32) else torch.bfloat16
        ), name
    stock: Any = type(model)(model.config)
    assert torch.equal(model.model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq)
    assert model(torch.arange(50)[None]).logits.isfinite().all()


def test_a_cut_shape_of_the_other_family_runs():
    config = shape_config("deepseek-v3.2", 2)
    small = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 16,
        "vocab_size": 99,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
    }
    assert (
        random_model(config | small, dtype="float32")(torch.arange(40)[None])
        .logits.isfinite()
        .all()
    )


def test_shapes_that_are_none(tmp_path):
    refused(lambda: shape_config("glm-9"), "glm-9", "glm-4.7-flash-dsa")
    refused(lambda: shape_config("tiny-random", 9), "has 8 layers")
    refused(lambda: shape_of("tiny", 2), "--layers")
    refused(lambda: read_shape(tmp_path / "no.json"), "no.json", "named shape")
    refused(lambda: Shape.of(SHAPES["glm-5"] | {"kv_lora_rank": None}), "kv_lora_rank", "None")
    refused(lambda: random_model(SHAPES["glm-5"] | {"model_type": "llama"}), "llama")
    refused(lambda: random_model(SHAPES["glm-5"]), "1487.8 GB", "--layers")
    refused(lambda: random_model(SHAPES["tiny-random"], device="cuda:7"), "cuda:7")
    assert shape_of("tiny").layers == 12


# -- floors -----------------------------------------------------------------------------------------------------------


def test_floors_are_the_figures_that_were_derived_by_hand():
    """One H100, 200K tokens, one request: per layer 113 ms of scores and 22 ms of attention; 1.73 s of linears in all; whole
    prefill 8.1 s all full and 4.2 s at 1/4; decoding 8.8 microseconds an indexer, 339 and 378 tokens/s."""
    full, quarter = Pattern.full(47), Pattern.uniform(47, 4)
    floor = prefill_floor(FLASH, 200_000, full, H100)
    assert floor["index_topk"] / 47 == pytest.approx(113, rel=0.01)
    assert prefill_floor(FLASH, 200_000, full, H100, index_dtype="bf16")[
        "index_topk"
    ] / 47 == pytest.approx(207, rel=0.01)
    assert floor["attention"] / 47 == pytest.approx(22.4, rel=0.01)
    assert (floor["linears"] + floor["mlp"] + floor["indexer"]) / 1e3 == pytest.approx(
        1.73, rel=0.01
    )
    assert sum(floor.values()) / 1e3 == pytest.approx(8.1, rel=0.02)
    assert sum(prefill_floor(FLASH, 200_000, quarter, H100).values()) / 1e3 == pytest.approx(
        4.2, rel=0.02
    )
    step = decode_floor(FLASH, 200_000, full, H100)
    assert step["index_topk"] / 47 == pytest.approx(8.8e-3, rel=0.01)
    assert 1e3 / sum(step.values()) == pytest.approx(339, rel=0.02)
    assert 1e3 / sum(decode_floor(FLASH, 200_000, quarter, H100).values()) == pytest.approx(
        378, rel=0.05
    )


def test_floors_of_scores_are_the_scores_that_are_needed():
    """Counted query by query: a row with at most k keys needs none, R scores its pool only."""
    shape = shape_of("tiny-random")
    k, peak = shape.topk, 2 * shape.index_heads * shape.index_dim / H100.fp8 * 1e3
    for length in (1, k, k + 1, 500):
        assert count_pairs(length, k) == sum(min(t, k) for t in range(1, length + 1))
        for roles, each in (("FSSSSSSS", [length]), ("FRSSSSSS@2", [length, 2 * k])):
            wanted = sum(min(t, most) for most in each for t in range(k + 1, length + 1)) * peak
            slow = Rates("x", H100.fp8, H100.bf16, 1e30, 1.0, 0.0)  # no bound by memory
            assert prefill_floor(shape, length, Pattern(roles), slow)[
                "index_topk"
            ] == pytest.approx(wanted)
    one = decode_floor(shape, 500, Pattern("FRSSSSSS@2"), H100)["index_topk"]
    assert one == pytest.approx((500 + 2 * k) * (shape.index_dim + 4) / H100.hbm * 1e3)
    assert decode_floor(shape, k, Pattern.full(8), H100)["index_topk"] == 0


def test_decoding_more_requests_reads_more_experts_and_the_rest_of_the_weights_once():
    one, many = (decode_floor(FLASH, 60_000, Pattern.full(47), H100, batch=b) for b in (1, 4))
    assert one["linears"] == many["linears"]
    assert many["attention"] == pytest.approx(4 * one["attention"])
    assert many["index_topk"] == pytest.approx(4 * one["index_topk"])
    assert many["mlp"] / one["mlp"] == pytest.approx(3.0, abs=0.3)
    h200 = decode_floor(FLASH, 60_000, Pattern.full(47), rates_named("h200"))
    assert sum(h200.values()) == pytest.approx(sum(one.values()) * 3.02 / 4.3)
    assert tuple(one) == tuple(prefill_floor(FLASH, 10, Pattern.full(47), H100)) == PARTS
    refused(lambda: rates_named("A100"), "A100", "H100, H200")


def test_one_table_holds_peaks_and_reachable_rates():
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12 > H100.bf16 == 790e12
    assert peak_of("NVIDIA B200") == 2250e12
    assert peak_of("NVIDIA T4") is None
    assert reachable_of("NVIDIA H200") is DEVICES["H200"].reachable
    assert reachable_of("NVIDIA H100 PCIe") is None
    assert reachable_of("NVIDIA B200") is None


# -- words ------------------------------------------------------------------------------------------------------------


def test_words_of_the_command_line():
    assert contexts(("10K,60K", "200000", "10000", "0.5M")) == (10_000, 60_000, 200_000, 500_000)
    for word in ("", "K", "-5", "1.5", "0", "1e3", "10Ki"):
        refused(lambda word=word: number(word), "number of tokens")
    assert batches("1, fill,4") == (1, "fill", 4)
    refused(lambda: batches("0"), "fill")
    found = dict(patterns(("all,1/2", "1/4+R4", "half=FSFSFSFS", "uniform:4:2"), 8))
    assert {n: str(p) for n, p in found.items()} == {
        "all": "FFFFFFFF",
        "1/2": "FSFSFSFS",
        "1/4+R4": "FRRRFRRR@4",
        "half": "FSFSFSFS",
        "uniform:4:2": "FFSSSFSS",
    }


def test_published_figures_are_shipped():
    table = published("glm-4.7-flash-dsa")
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
    assert published("glm-5") is None


# -- bench ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject():
    return open_subject("tiny-random", layers=4, dtype="float32", device="cpu", index_dtype="auto")


def grid(*lengths: int, **more: Any) -> Grid:
    named = (("all", Pattern.full(4)), ("1/4", Pattern("FSSS")))
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
    assert (
        main(["bench", str(out / "bench.json"), "--out", str(out)]) == 0
    )  # shown and drawn again, nothing measured
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
    after = run_bench(subject, grid(60, 90), tmp_path)["rows"]
    assert after[:2] == before
    assert calls[3:] == [(90, "FFFF"), (90, "FSSS")]
    run_bench(subject, grid(90, 60, 70), tmp_path)  # more lengths later
    assert calls[5:] == [(70, "FFFF"), (70, "FSSS")]
    refused(
        lambda: run_bench(subject, grid(60, decode_tokens=3), tmp_path),
        "decode_tokens was 2, now 3",
    )
    assert len(run_bench(subject, grid(60, decode_tokens=3), tmp_path, fresh=True)["rows"]) == 2
    (tmp_path / "journal.jsonl").write_text("{}\n")
    refused(lambda: run_bench(subject, grid(60, decode_tokens=3), tmp_path), "changed by hand")


def test_parts_of_a_graph_are_those_that_were_captured(monkeypatch):
    """With a stand-in for CUDA: marks of the capture count, those before it do not, and each replay is read anew."""
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


def test_requests_of_a_batch_say_different_things(subject, monkeypatch):
    """Equal requests would meet the same experts, and a step would read too few weights."""
    from indexcache.bench import measure as module

    given, real = [], module.Decoder.step
    monkeypatch.setattr(
        module.Decoder,
        "step",
        lambda self, tokens: (given.append(tokens.tolist()), real(self, tokens))[1],
    )
    row = module.measure(subject, 50, Pattern.full(4), batch=3, decode_tokens=4, chunk=64)
    assert len(given) > 4
    assert all(len(set(tokens)) > 1 for tokens in given)
    assert row["decode_total_tok_s"] == pytest.approx(3 * row["decode_tok_s"], rel=1e-3)
    assert row["ttft_s"] is None


def test_out_of_memory_is_a_row(subject, tmp_path, monkeypatch, capsys):
    real = bench_module.measure

    def tight(subject, context, pattern, **more):
        if context == 90 and pattern.roles == "FFFF":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(subject, context, pattern, **more)

    monkeypatch.setattr(bench_module, "measure", tight)
    result = run_bench(subject, grid(60, 90), tmp_path)
    (bad,) = (r for r in result["rows"] if r.get("error"))
    assert bad["error"].startswith("Out of memory at 90 tokens, pattern all")
    assert bad["error"] in capsys.readouterr().err
    assert [r["full"] for r in result["rows"] if r["context"] == 90] == [4, 1]
    from indexcache.report.speed import draw_speedups, parts, speeds

    assert "failed" in speeds(result["rows"])
    assert len(parts(result["rows"]).splitlines()) == 2 + 3
    draw_speedups(result["rows"], tmp_path / "x.png")
    monkeypatch.undo()
    assert not any(
        r.get("error") for r in run_bench(subject, grid(60, 90), tmp_path)["rows"]
    )  # measured when run again


def test_published_figures_stand_beside_the_whole_shape_only(subject):
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
    whole = replace(subject, name="glm-4.7-flash-dsa", shape=FLASH)
    full, quarter, pooled = bench_module._result(whole, {}, rows)["rows"]
    assert full["published"] == {"ttft_s": 19.5, "decode_tok_s": 58.0}
    assert quarter["published"] == {"ttft_s": 10.7, "decode_tok_s": 86.0}
    assert quarter["speedup"] == {"ttft": 2.0, "decode": 1.0}
    assert "published" not in pooled
    cut = replace(whole, shape=shape_of("glm-4.7-flash-dsa", 10))
    assert not any("published" in r for r in bench_module._result(cut, {}, rows)["rows"])


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


# -- refusals ---------------------------------------------------------------------------------------------------------


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
    assert "have the name 'all'" in said(
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
