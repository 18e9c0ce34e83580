"""Read vLLM's own lists of log-probabilities, and look for the names that are asked of it."""

import ast
import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from indexcache.engines.vllm.scores import read_scores

from .code import ROOT, tree

pytestmark = pytest.mark.skipif(
    not (ROOT / "vllm" / "logprobs.py").exists(), reason="make test-engines fetches the wheels"
)


def test_vllms_flat_lists_become_arrays(monkeypatch):
    spec = importlib.util.spec_from_file_location("vllm_logprobs", ROOT / "vllm" / "logprobs.py")
    theirs = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, theirs)  # Its dataclasses look themselves up.
    spec.loader.exec_module(theirs)
    rng = np.random.default_rng(0)
    scores = np.log(rng.dirichlet(np.ones(9), 7))
    ids = rng.integers(0, 9, 8).tolist()
    flat = theirs.create_prompt_logprobs(flat_logprobs=True)
    top = np.argsort(-scores)[:, :3]
    tokens = np.concatenate([np.array(ids[1:])[:, None], top], 1)
    for row, values in zip(tokens, np.take_along_axis(scores, tokens, 1), strict=True):
        theirs.append_logprobs_for_next_position(
            flat, row.tolist(), values.tolist(), [None] * 4, 1, 3
        )
    read = read_scores(SimpleNamespace(prompt_logprobs=flat), ids, top=3)
    assert read.own == pytest.approx(scores[range(7), ids[1:]])
    assert (read.top == top).all()
    assert read.top_scores == pytest.approx(np.take_along_axis(scores, top, 1))


def test_vllm_has_the_names_that_are_asked_of_it():
    def fields(module, owner):
        found = [n for n in tree(module).body if isinstance(n, ast.ClassDef) and n.name == owner]
        return {n.target.id for n in found[0].body if isinstance(n, ast.AnnAssign)}

    asked = {"temperature", "max_tokens", "prompt_logprobs", "flat_logprobs", "detokenize"}
    assert asked | {"prompt_logprob_token_ids"} <= fields(
        "vllm/sampling_params.py", "SamplingParams"
    )
    assert "max_logprobs" in fields("vllm/config/model.py", "ModelConfig")
    assigned = {n.attr for n in ast.walk(tree("vllm/outputs.py")) if isinstance(n, ast.Attribute)}
    assert {"prompt_logprobs", "prompt_token_id_logprobs"} <= assigned
