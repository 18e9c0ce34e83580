"""Check a search inside an engine against that of the model itself, its ties and its resuming."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from indexcache import SearchSettings, search, use_pattern
from indexcache.data import make_batches
from indexcache.models.lm import hidden_states, token_losses
from indexcache.searching.greedy import greedy
from tests.stand_ins import FakeLlm, engine_around, worker
from tests.support import documents


class ModelLlm(FakeLlm):
    """A stand-in for vLLM that computes the losses of a real model under the flipped pattern.

    The losses of all layers full do not repeat: they lie `noise` above and below the true ones.
    """

    def __init__(self, model, workers, noise=0.0):
        super().__init__(workers)
        self.model = model
        self.spread = noise
        self.evaluated = []

    def generate(self, prompts, sampling, use_tqdm):
        roles = "".join(w.indexcache_layers()["roles"] for w in self.workers)
        self.evaluated.append(roles)
        outputs = []
        for prompt in prompts:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            with torch.no_grad(), use_pattern(self.model, roles):
                losses = token_losses(self.model, hidden_states(self.model, ids), ids)[0]
            noise = self.spread * (-1) ** len(self.evaluated) if "S" not in roles else 0.0
            flat = SimpleNamespace(
                start_indices=[0, *range(len(losses))],
                token_ids=ids[0, 1:].tolist(),
                logprobs=[-float(x) + noise for x in losses],
            )
            outputs.append(SimpleNamespace(prompt_logprobs=flat))
        return outputs


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **kw: kw))


@pytest.fixture(scope="module")
def batches():
    return make_batches(documents(), length=64, sequences=2)


def engine_of_model(model, tmp_path, noise=0.0, stages=1):
    model.save_pretrained(tmp_path / "model")
    per = 6 // stages
    llm = ModelLlm(model, [worker(i, i * per, (i + 1) * per) for i in range(stages)], noise)
    engine = engine_around(llm, tmp_path / "model", model.config.index_topk)
    engine.facts |= {"vllm": "0.33.0"}
    return engine


def journal(folder):
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def test_a_search_in_an_engine_finds_what_the_model_itself_gives(glm, batches, tmp_path, vllm):
    settings = SearchSettings(keep=1 / 3)
    engine = engine_of_model(glm, tmp_path)
    found = search(engine, batches, tmp_path / "engine", settings)
    own = search(glm, batches, tmp_path / "own", settings)
    assert [str(p.pattern) for p in found.frontier] == [str(p.pattern) for p in own.frontier]
    for a, b in zip(found.frontier, own.frontier, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-5)
    assert {str(p.pattern) for p in found.uniform} == {
        "FSFSFS",
        "FSSSFS",
    }  # An engine runs no R layers.
    assert found.conditions.path == "vllm"
    first, *entries = journal(tmp_path / "engine")
    assert first == {"noise": 0.0}
    assert all(len(e["sums"]) == 2 for e in entries)
    # Two evaluations of all full and two of the effect come before the search.
    assert len(engine.llm.evaluated) == 4 + len(entries)


def test_a_resumed_search_runs_no_recorded_evaluation_again(glm, batches, tmp_path, vllm):
    settings = SearchSettings(keep=1 / 3, uniform=False)
    engine = engine_of_model(glm, tmp_path)
    result = search(engine, batches, tmp_path / "run", settings)
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "journal.jsonl").write_text("".join(lines[:8]) + lines[8][:5])
    (tmp_path / "run" / "result.json").unlink()
    recorded = {json.loads(line).get("pattern") for line in lines[:8]}
    engine.llm.evaluated.clear()
    again = search(engine, batches, tmp_path / "run", settings)
    assert again.to_json() == result.to_json()
    assert not recorded & set(engine.llm.evaluated)
    assert len(engine.llm.evaluated) == len(lines) - 8


def test_stages_of_the_engine_are_those_of_the_search(glm, batches, tmp_path, vllm):
    engine = engine_of_model(glm, tmp_path, stages=2)
    result = search(engine, batches, tmp_path / "run", SearchSettings(keep=1 / 3, uniform=False))
    assert str(result.pattern) == "FSSFSS"
    with pytest.raises(ValueError, match="--stages 3 does not fit vLLM, which runs 2"):
        search(engine, batches, tmp_path / "other", SearchSettings(stages=3))


def test_what_the_noise_hides_is_a_tie_and_is_said(glm, batches, tmp_path, vllm):
    engine = engine_of_model(glm, tmp_path, noise=2e-2)
    engine.check_effect = lambda batches, noise: None  # It would refuse so much noise.
    result = search(engine, batches, tmp_path / "run", SearchSettings(keep=1 / 6, uniform=False))
    assert result.noise > 0
    ties = [p for p in result.frontier if p.tied]
    assert ties
    assert all(p.flipped < min(p.tied) for p in ties)
    said = [e for e in journal(tmp_path / "run") if "tied" in e]
    assert [e["tied"] for e in said] == [list(p.tied) for p in ties]
    assert "tied" in result.to_json()["frontier"][1]


def test_greedy_takes_the_lowest_layer_within_the_noise():
    losses = {"FFFF": 1.0, "FSFF": 1.3, "FFSF": 1.1, "FFFS": 1.09}
    exact = list(greedy(lambda p: losses[str(p)], 4, 3))
    noisy = list(greedy(lambda p: losses[str(p)], 4, 3, noise=0.02))
    assert (exact[1].flipped, exact[1].tied) == (3, ())
    assert (noisy[1].flipped, noisy[1].tied) == (2, (3,))
    assert exact[1].margin == pytest.approx(0.01)
    assert noisy[1].margin == pytest.approx(-0.01)
