"""Check evidence from vLLM over a stand-in that runs a real model, beside this package's own."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from indexcache import evaluate
from indexcache.data import make_batches
from indexcache.engines.vllm.scores import coarse_kl, read_scores
from indexcache.evals.gate import judge
from indexcache.models.seam import use_pattern
from tests.stand_ins import TorchLlm, engine_around, worker
from tests.support import documents, make_model

PATTERNS = {"half": "FSFFSF", "one a stage": "FSSFSS", "same": "FFFFFF"}


def make(folder, vocabulary):
    model = make_model("glm_moe_dsa", vocab_size=vocabulary)
    model.config.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of 64 tokens: the 63 likeliest and the rest are all of them."""
    folder = tmp_path_factory.mktemp("model")
    return make(folder, 64), folder


@pytest.fixture(scope="module")
def batches():
    return make_batches(documents(40, 90, vocabulary=64), length=32, sequences=36, batch=4)


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **kw: kw))


def engine(model, folder, *, stages=((0, 3), (3, 6)), version="0.33.0", topk=8, **kind):
    workers = [worker(rank, *span) for rank, span in enumerate(stages)]
    llm = TorchLlm(model, workers, **kind)
    made = engine_around(llm, folder, topk, model.config.vocab_size)
    made.facts |= {"vllm": version, "ids_sorted": True}
    return made


def direct_kl(model, pattern, batches, top=None):
    """Compute KL(all full || pattern) per token over the `top` likeliest tokens and the rest."""
    total = count = 0
    for batch in batches:
        with torch.no_grad():
            p = model(batch.ids).logits[:, :-1].double().softmax(-1)
            with use_pattern(model, pattern):
                q = model(batch.ids).logits[:, :-1].double().softmax(-1)
        if top is not None:
            ids = p.topk(top, -1).indices
            p, q = (
                torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, True)], -1)
                for x in (p, q)
            )
        total += float((p * (p / q).log()).sum())
        count += p[..., 0].numel()
    return total / count


def test_evidence_is_that_of_the_packages_own_path(model, batches):
    made = engine(*model)
    found, own = evaluate(made, PATTERNS, batches), evaluate(model[0], PATTERNS, batches)
    for mine, theirs in zip(found.rows + found.positions, own.rows + own.positions, strict=True):
        assert (mine.name, mine.where, mine.tokens) == (theirs.name, theirs.where, theirs.tokens)
        for key in ("loss", "delta_loss", "ci_low", "ci_high", "kl", "agreement", "beyond"):
            value = getattr(theirs, key)
            expected = value if value is None else pytest.approx(value, rel=2e-4, abs=2e-6)
            assert getattr(mine, key) == expected, key
    assert found.rows[0].kl > 0.01
    facts = found.to_json()
    assert (facts["path"], facts["noise"], facts["kl_ids"]) == ("vllm", 0, 63)
    assert facts["engine"]["vllm"] == "0.33.0"
    assert not facts["rows"][0]["within_noise"]
    assert "equal bit for bit" in found.table()
    assert "lower bound of the KL" in found.table()
    # All layers full come after the patterns of every batch, too.
    assert made.llm.patterns[-1] == "FFFFFF"


def test_the_kl_is_a_lower_bound_over_63_tokens(tmp_path, batches):
    large = make(tmp_path, 200)
    found = evaluate(engine(large, tmp_path), "FSSFSS", batches[:2]).overall[0]
    assert found.kl == pytest.approx(direct_kl(large, "FSSFSS", batches[:2], 63), rel=1e-3)
    assert found.kl < direct_kl(large, "FSSFSS", batches[:2])


def test_another_baseline_has_the_noise_of_all_full(model, batches):
    made = engine(*model, noise=1e-3)
    few = batches[:4]
    found = evaluate(made, "FSSFSS", few, against="FSFFSF")
    own = evaluate(model[0], "FSSFSS", few, against="FSFFSF").overall[0]
    row = found.overall[0]
    assert row.delta_loss == pytest.approx(own.delta_loss, abs=1e-3)
    assert made.llm.patterns[-4:] == ["FSFFSF", "FSSFSS", "FFFFFF", "FFFFFF"]
    # Two draws differ by 1.4e-3 at each token, of which there are 16 times 31: 1e-4, up to chance.
    assert 3e-5 < found.noise < 3e-4
    assert row.noise == found.noise
    # The KL of two draws e of noise on the logits is half the variance of their difference.
    assert found.noise_kl == pytest.approx(1e-3**2, rel=0.1)
    assert f"and their KL is {found.noise_kl:.1e}" in found.table()
    total = sum((r.noise * r.tokens) ** 2 for r in found.rows if r.where != "all")
    assert total == pytest.approx((found.noise * row.tokens) ** 2)
    assert found.to_json()["rows"][0]["noise"] == found.noise


def test_what_is_within_the_noise_is_said_to_be_so(model, batches):
    found = evaluate(engine(*model, noise=0.05), {"last": "FFFFFS", "one": "FSSFSS"}, batches[:4])
    by = {(r.name, r.where): r for r in found.rows}
    within = [key for key, r in by.items() if abs(r.delta_loss) <= r.noise]
    assert 0 < len(within) < 3
    assert {name for name, _ in within} == {"last"}
    assert [key for key, r in by.items() if r.within_noise] == within
    where = ", ".join(where for _, where in within)
    assert f"Within it, and so not to be told from nothing: last on {where}." in found.table()
    rows = json.loads(json.dumps(found.to_json()))["rows"]
    assert [(r["name"], r["domain"]) for r in rows if r["within_noise"]] == within


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0"])
def test_without_scores_of_given_tokens_there_is_no_kl(model, batches, version):
    """It is so before 0.32, and with vLLM's older runner, which refuses them."""
    made = engine(*model, version=version)
    answer = made.llm.answer

    def refusing(roles, prompt, sampling):
        if "prompt_logprob_token_ids" in sampling:
            raise RuntimeError("prompt_logprob_token_ids requires the V2 model runner")
        assert sampling["prompt_logprobs"] <= 1  # vLLM's own limit may be 20.
        return answer(roles, prompt, sampling)

    made.llm.answer = refusing
    found = evaluate(made, PATTERNS, batches[:3])
    own = evaluate(model[0], PATTERNS, batches[:3])
    for mine, theirs in zip(found.overall, own.overall, strict=True):
        assert (mine.kl, mine.agreement) == (None, theirs.agreement)
        assert mine.delta_loss == pytest.approx(theirs.delta_loss, abs=2e-6)
    table = found.table()
    reason = "0.32 and later can" if version == "0.31.0" else "requires the V2 model runner"
    assert f"There is no KL: vLLM {version}" in table
    assert reason in table
    assert "nan" not in table
    assert (found.to_json()["rows"][0]["kl"], found.to_json()["kl_ids"]) == (None, 0)
    with pytest.raises(ValueError, match="'same' is the baseline"):
        judge(found, 0.01, allow_blind=True)


@pytest.mark.parametrize(
    ("kind", "pattern", "message"),
    [
        ({}, "FRRFRR", "the engine knows only F and S"),
        ({}, "FSSSSF", "A pipeline stage begins at layer 3"),
        ({}, "FSSF", "The pattern has 4 layers"),
        ({"effect": False}, "FSSFSS", "no effect in this vLLM"),
    ],
)
def test_what_cannot_be_compared_is_refused(model, batches, kind, pattern, message):
    made = engine(*model, **kind)
    with pytest.raises(ValueError, match=message):
        evaluate(made, pattern, batches[:2])
    assert bool(made.llm.patterns) == bool(kind)


def test_every_rank_reads_every_pattern_back(model, batches):
    made = engine(*model)
    batches = batches[:1]
    obey = made.llm.workers[1].indexcache_set_pattern
    made.llm.workers[1].indexcache_set_pattern = lambda roles: obey(
        "FSSFSF" if roles == "FSFFSS" else roles
    )
    with pytest.raises(ValueError, match="Rank 1 of vLLM runs FSF in layers 3 to 5"):
        evaluate(made, "FSFFSS", batches)


def flat(tokens, scores, width):
    starts = [0, *range(0, len(tokens), width)]
    return SimpleNamespace(start_indices=starts, token_ids=tokens, logprobs=scores)


def test_flat_lists_become_arrays():
    output = SimpleNamespace(
        prompt_logprobs=flat([4, 9, 5, 5, 7, 8], [-1.0, -0.5, -0.7, -0.7, -0.2, -3.0], 2)
    )
    with pytest.raises(ValueError, match="other tokens"):
        read_scores(output, [3, 4, 5, 6])
    output.prompt_logprobs.token_ids[4] = 6
    read = read_scores(output, [3, 4, 5, 6])
    assert read.own.tolist() == [-1.0, -0.7, -0.2]
    assert (read.top.tolist(), read.top_scores[:, 0].tolist()) == (
        [[9], [5], [8]],
        [-0.5, -0.7, -3.0],
    )
    with pytest.raises(ValueError, match="1 of the 2 most likely"):
        read_scores(output, [3, 4, 5, 6], top=2)
    with pytest.raises(ValueError, match="of the 2 tokens"):
        read_scores(output, [3, 4, 5, 6], np.zeros((3, 2), np.int32))
    output.prompt_token_id_logprobs = np.full((3, 2), -1, np.float32)
    assert read_scores(output, [3, 4, 5, 6], np.zeros((3, 2), np.int32)).given.shape == (3, 2)
    output.prompt_token_id_logprobs = np.full((2, 2), -1, np.float32)
    with pytest.raises(ValueError, match="of the 2 tokens"):
        read_scores(output, [3, 4, 5, 6], np.zeros((3, 2), np.int32))
    output.prompt_logprobs.logprobs.pop()
    with pytest.raises(ValueError, match="other tokens"):
        read_scores(output, [3, 4, 5, 6])


def test_a_kl_over_buckets():
    rng = np.random.default_rng(0)
    p, q = (np.log(rng.dirichlet(np.full(20, 0.3), 50)) for _ in range(2))
    exact = (np.exp(p) * (p - q)).sum(-1)
    assert coarse_kl(p, q) == pytest.approx(exact, abs=1e-4)  # There is no rest.
    order = np.argsort(-p)[:, :19]
    p19, q19 = (np.take_along_axis(x, order, -1) for x in (p, q))
    assert coarse_kl(p19, q19) == pytest.approx(exact, abs=1e-4)  # The rest is one token.
    few = coarse_kl(p19[:, :5], q19[:, :5])
    assert (few <= exact + 1e-9).all()
    assert few.mean() < 0.9 * exact.mean()
    rounded = p19.astype(np.float32).astype(np.float64)
    assert np.abs(coarse_kl(p19, rounded)).max() < 1e-9
    assert not coarse_kl(p19, p19).any()
