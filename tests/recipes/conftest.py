"""A small random Llama and what the recipe makes of it."""

from __future__ import annotations

import pytest
import torch

from recipes.smollm2.rewrite import attention_inputs, backbone, save, settings, start
from tests.recipes.support import DIGEST, LLAMA


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # The norms of SmolLM2 have weights of any sign too, and some are nearly zero.
            p.normal_(0, 1.0 if "norm" in name else 0.1)
        # The eps of the first norm counts beside embeddings of this size.
        model.model.embed_tokens.weight.normal_(0, 0.02)
    return model


@pytest.fixture(scope="module")
def text():
    return torch.randint(
        0, LLAMA["vocab_size"], (2, 96), generator=torch.Generator().manual_seed(1)
    )


@pytest.fixture(scope="module")
def rewritten(llama, text):
    """Rewrite the Llama; returns weights and settings."""
    c = settings(LLAMA, topk=16)
    weights = llama.state_dict()
    return backbone(weights, c) | start(weights, c, attention_inputs(llama, text)), c


@pytest.fixture(scope="module")
def saved(rewritten, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewritten")
    save(*rewritten, tiny.tokenizer, folder, torch.float32, DIGEST)
    return folder
