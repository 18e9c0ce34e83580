"""A small random Llama and what the recipe makes of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.recipes.support import DIGEST, LLAMA

RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2"


@pytest.fixture(scope="module")
def recipe_on_path():
    sys.path.insert(0, str(RECIPE))
    yield
    sys.path.remove(str(RECIPE))


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(
                0, 1.0 if "norm" in name else 0.1
            )  # norm weights as in the real one: of any sign, some all but zero
        model.model.embed_tokens.weight.normal_(0, 0.02)  # eps of the first norm counts beside it
    return model


@pytest.fixture(scope="module")
def text():
    return torch.randint(
        0, LLAMA["vocab_size"], (2, 96), generator=torch.Generator().manual_seed(1)
    )


@pytest.fixture(scope="module")
def rewritten(llama, text):
    """(state, settings)"""
    from rewrite import attention_inputs, backbone, settings, start

    c, weights = settings(LLAMA, topk=16), llama.state_dict()
    return backbone(weights, c) | start(weights, c, attention_inputs(llama, text)), c


@pytest.fixture(scope="module")
def saved(rewritten, tiny, tmp_path_factory):
    from rewrite import save

    folder = tmp_path_factory.mktemp("rewritten")
    save(*rewritten, tiny.tokenizer, folder, torch.float32, DIGEST)
    return folder
