"""Check evaluations inside vLLM over stand-ins: layers of each rank, and losses by formula."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from indexcache.data import Batch
from indexcache.engines.vllm import engine as module
from indexcache.engines.vllm.engine import (
    DocumentLosses,
    check_read_back,
    engine_arguments,
    noise_of,
)
from indexcache.engines.vllm.ids import repeatable_topk
from indexcache.engines.vllm.settings import VllmSettings
from indexcache.engines.vllm.sharing import check_sharing
from indexcache.pattern import Pattern
from tests.stand_ins import FakeLlm, engine, engine_around, worker
from tests.support import refused


@pytest.mark.parametrize("kind", [{}, {"old": True}, {"nested": True}], ids=str)
def test_a_rank_runs_what_it_was_told(kind):
    rank = worker(**kind)
    assert rank.indexcache_layers()["roles"] == "FFFFFF"
    answer = rank.indexcache_set_pattern("FSSFSS")
    assert answer["roles"] == "FSSFSS"
    assert (answer["first"], answer["end"], answer["without_indexer"]) == (0, 6, [])
    assert rank.indexcache_set_pattern("FFFFFF")["roles"] == "FFFFFF"


@pytest.mark.parametrize(
    ("kind", "roles", "message"),
    [
        ({}, "FSS", "each of 6 layers"),
        ({}, "FRRFRR", "one of F and S"),
        ({"first": 3, "rank": 1}, "FSSSFS", "Layer 3 is the first on rank 1"),
        ({"without": (2,)}, "FSFFSS", "Layer 2 has no indexer"),
    ],
)
def test_a_rank_refuses_what_it_cannot_run_and_changes_nothing(kind, roles, message):
    rank = worker(**kind)
    before = rank.indexcache_layers()
    with pytest.raises(ValueError, match=message):
        rank.indexcache_set_pattern(roles)
    assert rank.indexcache_layers() == before


def test_a_vllm_without_the_switch_is_refused():
    rank = worker()
    for item in rank.model_runner.model.model.layers:
        del item.self_attn.skip_topk
    with pytest.raises(ValueError, match="no skip_topk"):
        rank.indexcache_set_pattern("FSSFSS")


@pytest.mark.parametrize("values", [6, 1, None], ids=["ties", "all equal", "no ties"])
def test_ids_do_not_depend_on_the_order_of_threads(values):
    """Rows with ties at, above and below the last place, fillers, and a start that is not 0."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(64, 40, generator=generator)
    if values is not None:
        scores = (scores * values).floor()
    scores[1], scores[2] = 0.0, torch.arange(40).float()
    starts = torch.arange(64, dtype=torch.int32) % 5
    ends = starts + 3 + torch.arange(64, dtype=torch.int32) % 33
    k = 8

    def kernel(scores, starts, ends, out, seed):
        """Select as vLLM does: the places of equal scores, and the order, are left to chance."""
        chance = torch.Generator().manual_seed(seed)
        out.fill_(-1)
        for row, (a, b) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            order = torch.randperm(b - a, generator=chance)
            best = order[scores[row, a:b][order].argsort(descending=True, stable=True)][:k]
            out[row, : len(best)] = best[torch.randperm(len(best), generator=chance)]

    runs = []
    for seed in range(3):
        ids = torch.zeros(64, k, dtype=torch.int32)
        repeatable_topk(kernel)(scores, starts, ends, ids, seed)
        runs.append(ids.tolist())
    assert runs[0] == runs[1] == runs[2]
    for row, (a, b) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        seen = scores[row, a:b].tolist()
        want = sorted(sorted(range(b - a), key=lambda i: (-seen[i], i))[:k])
        assert runs[0][row] == want + [-1] * (k - len(want))


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    stand_in = SimpleNamespace(SamplingParams=lambda **kw: kw)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)


def batches(sequences=3, length=9):
    ids = torch.arange(sequences * length).view(sequences, length)
    return [Batch(ids, "text", tuple("abc"[:sequences]), ())]


def test_losses_are_added_up_by_document():
    e = engine()
    assert (e.layers, e.stages, e.without_indexer) == (6, (0, 3), ())
    losses = e.losses(Pattern("FSSFSF"), batches())
    assert losses.sums == pytest.approx([8 * 2.3] * 3)
    assert losses.tokens.tolist() == [8, 8, 8]
    assert losses.mean == pytest.approx(2.3)


def test_the_gates_see_noise_and_a_flag_without_effect():
    e = engine(noise=1e-4)
    noise = e.noise(batches())
    assert noise == pytest.approx(2 * 1e-4 / 3**0.5)
    e.check_effect(batches(), noise)
    dead = engine(effect=False)
    assert dead.noise(batches()) == 0
    with pytest.raises(ValueError, match="no effect in this vLLM"):
        dead.check_effect(batches(), 0.0)
    with pytest.raises(ValueError, match="too much noise to tell"):
        e.check_effect(batches(), 0.1)


def test_a_rank_that_runs_another_pattern_stops_the_run():
    e = engine()
    e.llm.workers[1].indexcache_set_pattern = lambda roles: worker(1, 3, 6).indexcache_set_pattern(
        "FSSFFF"
    )
    with pytest.raises(ValueError, match="Rank 1 of vLLM runs FFF in layers 3 to 5"):
        e.losses(Pattern("FSSFSS"), batches())
    assert e.llm.calls == 0
    with pytest.raises(ValueError, match="No rank"):
        check_read_back(Pattern("FS"), [])


def test_a_vllm_that_stops_at_work_is_named(monkeypatch):
    e = engine()
    monkeypatch.setattr(e.llm, "generate", lambda *_, **__: 1 / 0)
    refused(lambda: e.losses(Pattern("FSSFSS"), batches()), "ran FSSFSS (division by zero)")


def test_other_tokens_than_the_prompts_are_refused(monkeypatch):
    e = engine()
    generate = e.llm.generate

    def other(*args, **kwargs):
        outputs = generate(*args, **kwargs)
        outputs[1].prompt_logprobs.token_ids[3] += 1
        return outputs

    monkeypatch.setattr(e.llm, "generate", other)
    with pytest.raises(ValueError, match="other tokens"):
        e.losses(Pattern("FFFFFF"), batches())


def test_r_layers_are_refused():
    with pytest.raises(ValueError, match="F and S layers only"):
        engine().losses(Pattern("FRRFRR"), batches())


def test_ranks_must_be_one_model():
    llm = FakeLlm([worker(0, 0, 2), worker(1, 3, 6)])
    with pytest.raises(ValueError, match="not one model"):
        engine_around(llm)
    config = {"index_topk": 2, "vocab_size": 8, "num_hidden_layers": 9}
    ranks = FakeLlm([worker(0, 0, 3), worker(1, 3, 6)]).collective_rpc("indexcache_layers")
    with pytest.raises(ValueError, match="not one model of 9 layers"):  # A stage is missing.
        module.engine_of(ranks, llm, "m", config)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        {"index_topk_pattern": "FSSFSS"},
        {"index_topk_freq": 3, "index_skip_topk_offset": None},
        {"index_topk_freq": 4, "indexer_types": ["full", "shared"] * 3},
    ],
)
def test_all_indexers_are_loaded_whatever_the_config_says(tmp_path, keys, nested):
    names = {f"model.layers.{i}.self_attn.indexer.wk.weight": torch.zeros(1) for i in range(5)}
    save_file(names, tmp_path / "model.safetensors")

    def overrides(keys, given=None):
        config = {"num_hidden_layers": 6, **keys}
        config = {"text_config": config} if nested else config
        (tmp_path / "config.json").write_text(json.dumps(config))
        return config, module.every_indexer(tmp_path, config, given)

    config, found = overrides(keys, {"a": 1})
    assert found.pop("a") == 1
    text = config["text_config"] | found["text_config"] if nested else config | found
    assert str(check_sharing({"text_config": text} if nested else text)) == "FFFFFS"
    assert overrides({})[1] == {}
    assert overrides({"index_topk_pattern": "FFFFFS"})[1] == {}


def test_tensor_parallel_ranks_hold_the_same_layers():
    llm = FakeLlm([worker(0), worker(1)])
    e = engine_around(llm)
    assert (e.layers, e.stages, e.facts["ranks"]) == (6, (0,), 2)


def test_noise_is_two_standard_errors():
    tokens = np.array([100, 100])
    a, b = (DocumentLosses(np.array(s), tokens) for s in ([200.0, 210.0], [203.0, 206.0]))
    assert noise_of(a, b) == pytest.approx(2 * 5 / 200)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("gpu_memory_utilization=0.5", {"gpu_memory_utilization": 0.5}),
        ("--kv-cache-dtype=fp8", {"kv_cache_dtype": "fp8"}),
        ("trust_remote_code=true", {"trust_remote_code": True}),
        ('hf_overrides={"a": 1}', {"hf_overrides": {"a": 1}}),
    ],
)
def test_engine_arguments_are_names_and_values(given, expected):
    assert engine_arguments([given]) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nothing", "NAME=VALUE"),
        ("=3", "NAME=VALUE"),
        ("enforce-eager=false", "enforce_eager cannot be chosen"),
        ("max_num_seqs=8", "cannot be chosen"),
        ("model=other", "cannot be chosen"),
        ('speculative_config={"method": "mtp"}', "measures the model alone"),
        ("spec-method=mtp", "measures the model alone"),
        ("logprobs_mode=processed_logits", "raw_logprobs"),
        ("load-format=dummy", "random numbers"),
        ("tensor_parallel_size=2", "a flag of its own, --tensor-parallel-size"),
        ("pipeline-parallel-size=2", "a flag of its own, --pipeline-parallel-size"),
        ("hf_token=hf_secret", "^(?!.*secret).*set HF_TOKEN"),
        ('hf_overrides={"index_topk_freq": 4}', "index_topk_freq would leave indexers out"),
        ('hf_overrides={"text_config": {"indexer_types": []}}', "indexer_types would leave"),
    ],
)
def test_engine_arguments_that_would_make_a_wrong_number_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        engine_arguments([given])


def test_an_engine_argument_is_given_once():
    with pytest.raises(ValueError, match="dtype is given twice"):
        engine_arguments(["dtype=bfloat16", "--dtype=float16"])


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("indexcache_layers", "vLLM stopped while it looked for the layers' switches .a rank died"),
        ("indexcache_sort_ids", "vLLM stopped while it began to sort the selected ids"),
        ("nobody", "No rank of vLLM answered"),
        ("import", "vLLM could not start .* .undefined symbol"),
    ],
)
def test_a_start_that_fails_behind_the_first_step_is_one_sentence(
    tmp_path, monkeypatch, fails, message
):
    class Llm(FakeLlm):
        def collective_rpc(self, method, args=()):
            if method == fails:
                raise RuntimeError("a rank died")
            return [] if fails == "nobody" else super().collective_rpc(method, args)

    def load(name):
        if fails == "import":
            raise ImportError("undefined symbol")
        return SimpleNamespace(LLM=lambda **_k: Llm([worker()]))

    config = {"num_hidden_layers": 6, "index_topk": 2, "vocab_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(module, "check_installed", lambda: None)
    monkeypatch.setattr(module.importlib, "import_module", load)
    with pytest.raises(ValueError, match=message):
        module.start(str(tmp_path), VllmSettings(), length=64)


def test_without_vllm_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vLLM is not installed here: run `pip install"):
        module.start("folder", VllmSettings(), length=64)


RANK = """
import json, sys
sys.path.insert(0, {root!r})
from tests.stand_ins import worker
rank = int(sys.argv[1])
w = worker(rank, 3 * rank, 3 * rank + 3)
for line in sys.stdin:
    try:
        print(json.dumps(w.indexcache_set_pattern(line.strip())), flush=True)
    except ValueError as error:
        print(json.dumps({{"error": str(error)}}), flush=True)
"""


def test_two_processes_read_the_same_pattern_back(request):
    code = RANK.format(root=str(request.config.rootpath))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]

    class Llm(FakeLlm):
        def collective_rpc(self, method, args=()):
            if method != "indexcache_set_pattern":
                return super().collective_rpc(method, args)
            for rank in ranks:
                print(args[0], file=rank.stdin, flush=True)
            answers = [json.loads(rank.stdout.readline()) for rank in ranks]
            errors = [a["error"] for a in answers if "error" in a]
            if errors:
                raise ValueError(errors[0])
            return answers

    llm = Llm([worker(0, 0, 3), worker(1, 3, 6)])
    e = engine_around(llm)
    try:
        e.set_pattern(Pattern("FSFFSS"))
        with pytest.raises(ValueError, match="Layer 3 is the first on rank 1"):
            e.set_pattern(Pattern("FSFSSS"))
        ranks[1].kill()
        refused(lambda: e.set_pattern(Pattern("FSFFSS")), "vLLM stopped while it switched")
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
