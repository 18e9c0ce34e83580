"""Check benchmarks/vllm_backend.py over a stand-in of vLLM: what is read, what is refused."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import vllm_backend
from benchmarks.vllm_backend import INDEXER, OURS, RECORDED, VLLM, Recorded
from indexcache.engines.vllm import selecting
from tests.stand_ins import install_modules

K, CHUNK, PREFIX = 4, 8, "layers.0.self_attn.indexer.k_cache"


@pytest.fixture
def vllm(monkeypatch):
    """Stand in for vLLM's modules; its indexer selects the last K positions, the last first.

    The plugin's finder is forgotten afterwards.
    """
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    seen = SimpleNamespace(steps={})

    def sparse_attn_indexer(hidden_states, k_cache_prefix, topk_indices_buffer):
        step = seen.steps.get(k_cache_prefix)
        for chunk in step.prefill.chunks if step is not None and step.prefill else []:
            rows = chunk.token_end - chunk.token_start
            last = chunk.first + torch.arange(rows, dtype=torch.int32)[:, None]
            ids = last - torch.arange(K, dtype=torch.int32)
            topk_indices_buffer[chunk.token_start : chunk.token_end] = ids.clamp_min(-1)

    parts = {
        "vllm": {"__version__": "0.33.0", "SamplingParams": SimpleNamespace},
        "vllm.forward_context": {
            "get_forward_context": lambda: SimpleNamespace(attn_metadata=seen.steps)
        },
        "vllm.models": {},
        "vllm.models.deepseek_v32": {},
        selecting.USER: {"sparse_attn_indexer": sparse_attn_indexer},
    }
    install_modules(monkeypatch, parts)
    seen.module = sys.modules[selecting.USER]
    return seen


def pieces(first, last, at=()):
    """Make the metadata of a step from position `first` to `last`, scored in pieces."""
    ends = [*at, last]
    return SimpleNamespace(
        prefill=SimpleNamespace(
            chunks=[
                SimpleNamespace(
                    first=begin,
                    token_start=begin - first,
                    token_end=end - first,
                    total_seq_lens=last,
                    num_reqs=1,
                )
                for begin, end in zip([first, *at], ends, strict=True)
            ]
        )
    )


def test_recorded_ids_replace_those_of_the_indexer(vllm):
    recorded = Recorded()
    vllm_backend.install(recorded, VLLM)
    recorded.table = torch.arange(40 * K, dtype=torch.int32).view(40, K)
    buffer = torch.full((CHUNK, K), -7, dtype=torch.int32)
    vllm.steps[PREFIX] = pieces(16, 22, at=(19,))
    vllm.module.sparse_attn_indexer(None, PREFIX, buffer)
    assert buffer[5].tolist() == [21, 20, 19, 18]
    recorded.on = True
    vllm.module.sparse_attn_indexer(None, k_cache_prefix=PREFIX, topk_indices_buffer=buffer)
    assert torch.equal(buffer[:6], recorded.table[16:22])
    assert bool((buffer[6:] == -7).all()) and recorded.rows == 6
    for step in (None, SimpleNamespace(prefill=None)):  # start-up, and decoding
        vllm.steps[PREFIX] = step
        vllm.module.sparse_attn_indexer(None, PREFIX, buffer)
    assert recorded.rows == 6
    vllm.steps[PREFIX] = pieces(16, 22)
    vllm.steps[PREFIX].prefill.chunks[0].num_reqs = 2
    with pytest.raises(ValueError, match="one request at a time"):
        vllm.module.sparse_attn_indexer(None, PREFIX, buffer)


def test_our_selection_stays_before_the_recorded_ids(vllm, monkeypatch):
    """The backend's own installation, which comes later, must not put itself behind them."""
    order = []

    def named(name, function):
        def call(*args, **kwargs):
            order.append(name)
            return function(*args, **kwargs)

        call.__wrapped__ = function
        return call

    monkeypatch.setattr(selecting, "selecting", lambda stock: named("selecting", stock))
    recorded = Recorded()
    vllm_backend.install(recorded, OURS)
    selecting.install()
    vllm.module.sparse_attn_indexer(None, PREFIX, torch.zeros(1, K))
    assert order == ["selecting"]


class Llm:
    """A stand-in of vLLM with four layers, whose steps of CHUNK tokens write the buffer."""

    def __init__(self, vllm, implementation):
        self.vllm = vllm
        self.calls = 0
        attention = {
            role: SimpleNamespace(
                indexer=object() if role == "F" else None, impl=type(implementation, (), {})()
            )
            for role in "FS"
        }
        layers = [SimpleNamespace(self_attn=attention[role]) for role in "FSFS"]
        buffer = torch.full((CHUNK, K), -1, dtype=torch.int32)
        self.model = SimpleNamespace(
            model=SimpleNamespace(layers=layers, topk_indices_buffer=buffer)
        )

    def prefill(self, length):
        for first in range(0, length, CHUNK):
            self.vllm.steps[PREFIX] = pieces(first, min(first + CHUNK, length))
            for layer in self.model.model.layers:
                if layer.self_attn.indexer is not None:
                    buffer = self.model.model.topk_indices_buffer
                    self.vllm.module.sparse_attn_indexer(None, PREFIX, buffer)

    def request(self, prompt, count):
        self.prefill(len(prompt))
        return [0.5 + 0.01 * i for i in range(count)], list(range(count))

    def generate(self, prompts, params, use_tqdm):
        (text,) = (p["prompt_token_ids"] for p in prompts)
        self.prefill(len(text))
        self.calls += 1
        read = float(self.model.model.topk_indices_buffer.float().mean())
        value = -2.0 - 1e-4 * self.calls - 1e-9 * read
        flat = SimpleNamespace(
            start_indices=[0, *range(len(text) - 1)],
            token_ids=text[1:],
            logprobs=[value] * (len(text) - 1),
        )
        return [SimpleNamespace(prompt_logprobs=flat)]


@pytest.fixture
def small(monkeypatch):
    """Make everything that `engine` measures small enough for a CPU."""
    table = torch.arange(60, dtype=torch.int32)[:, None] - 2 * torch.arange(K, dtype=torch.int32)
    changes = {
        "CONTEXTS": (20, 30),
        "WARM": (24,),
        "CHUNK": CHUNK,
        "CHECKED": 20,
        "NEW_TOKENS": 12,
        "TEXT_LENGTH": 16,
        "SHAPE": {"index_topk": K},
        "recorded_table": lambda length: table,
        "request": lambda llm, prompt, count: llm.request(prompt, count),
    }
    for name, value in changes.items():
        monkeypatch.setattr(vllm_backend, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")


def measured(vllm, monkeypatch, folder, heads=(16,), implementations=()):
    """Run `engine` of both, and return the lines."""
    file = folder / "rows.jsonl"
    stock = vllm.module.sparse_attn_indexer
    for n in heads:
        for who, implementation in (vllm_backend.IMPLEMENTATIONS | dict(implementations)).items():
            vllm.module.sparse_attn_indexer = stock
            llm = Llm(vllm, implementation)
            options = {}

            def start(freq, count, llm=llm, options=options, **given):
                options.update(given)
                return llm, llm.model

            monkeypatch.setattr(vllm_backend, "start", start)
            monkeypatch.setattr(selecting, "selecting", lambda indexer: indexer)
            vllm_backend.engine(who, n, file, 1000)
            backend = {"attention_config": {"backend": "CUSTOM"}}
            assert options == (backend if who == OURS else {})
    return [json.loads(line) for line in file.read_text().splitlines()]


BEFORE = {
    "vllm": "0.33.0",
    "device": "NVIDIA H200",
    "note": "n",
    "rows": [
        {"context": 20, "heads": 20, "selections": "random", "who": "vllm"},
        {"context": 20, "heads": 16, "selections": "recorded", "who": "vllm", "ttft_s": 9.0},
    ],
}


def test_an_engine_is_measured_and_joined(vllm, small, monkeypatch, tmp_path, capsys):
    lines = measured(vllm, monkeypatch, tmp_path)
    kinds = [(line["kind"], line.get("selections")) for line in lines if line["who"] == VLLM]
    assert kinds.count(("time", RECORDED)) == kinds.count(("time", INDEXER)) == 4
    assert kinds.count(("loss", INDEXER)) == 5 and kinds[-1] == ("done", None)
    result = vllm_backend.joined(lines, BEFORE)
    rows = result["rows"]
    assert rows[0] == BEFORE["rows"][0] and result["note"] == "n"
    assert len(rows) == 1 + 2 * 2 * 2
    expected = {
        "context": 20,
        "heads": 16,
        "full": 2,
        "pattern": "FSFS",
        "selections": RECORDED,
        "who": VLLM,
        "ttft_s": 0.5,
        "decode_tok_s": 100.0,
        "ttft_runs_s": [0.5, 0.5],
        "decode_runs_tok_s": [100.0, 100.0],
    }
    assert rows[1] == expected
    assert [row["selections"] for row in result["losses"]] == [RECORDED, INDEXER]
    assert result["losses"][0]["noise"] == pytest.approx(8e-4, rel=0.1)
    assert vllm_backend.joined(lines, result) == result
    said = vllm_backend.shares(rows)
    assert len(said) == 4 and "0.500 of 0.500 s = 1.000" in said[0]
    results = tmp_path / "results.json"
    results.write_text(json.dumps(BEFORE))
    command = ["vllm_backend", "join", str(tmp_path / "rows.jsonl"), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", command)
    vllm_backend.main()
    assert json.loads(results.read_text()) == json.loads(json.dumps(result))
    assert "16 heads, recorded, 20" in capsys.readouterr().out


def test_time_that_runs_out_leaves_out_the_rest(vllm, small, monkeypatch, tmp_path):
    llm = Llm(vllm, "FlashAttnMLASparseImpl")
    monkeypatch.setattr(vllm_backend, "start", lambda *_: (llm, llm.model))
    vllm_backend.engine(VLLM, 16, tmp_path / "rows.jsonl", -1)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["engine", "check", "check", "done"]


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("engine", {"implementation": "FlashMLA"}, "ran FlashMLA"),
        ("engine", {"device": "NVIDIA H100"}, "H100"),
        ("check", {"unique": 3}, "failed its check"),
        ("check", {"max": 20}, "failed its check"),
        ("check", {"copied": 19.0}, "failed its check"),
        ("check", {"selections": "other"}, "failed its check|no check"),
        ("time", {"different_tokens": 2}, "repeats itself"),
        ("loss", {"loss": 2.1}, "more than vLLM's noise"),
        ("loss", {"selections": "other"}, "losses of"),
    ],
)
def test_what_join_refuses(vllm, small, monkeypatch, tmp_path, kind, change, said):
    lines = measured(vllm, monkeypatch, tmp_path)
    for line in lines:
        if line["kind"] == kind and line["who"] == OURS:
            line.update(change)
    with pytest.raises(ValueError, match=said):
        vllm_backend.joined(lines, BEFORE)


def test_recorded_ids_over_a_context(monkeypatch):
    """Each query reads k different tokens that it can see, or all of them."""
    monkeypatch.setattr(vllm_backend, "SHAPE", {"index_topk": 64})
    table = vllm_backend.recorded_table(3000, "cpu")
    assert table.shape == (3000, 64) and table.dtype == torch.int32
    position = torch.arange(3000)[:, None]
    assert bool((table <= position).all())
    whole = table[64:]
    assert bool((whole[:, 1:] > whole[:, :-1]).all()) and bool((whole >= 0).all())
    assert table[2].tolist() == [0, 1, 2] + [-1] * 61
