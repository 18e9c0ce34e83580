"""Small random models of both families, and the packaged tiny model."""

from __future__ import annotations

import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from exporting import broken, deepseek, glm_folder, sharded  # noqa: F401 - fixtures

SHAPE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "index_topk": 8, "index_head_dim": 16, "index_n_heads": 16, "first_k_dense_replace": 3, "max_position_embeddings": 512,
}  # fmt: skip


def refused(call: Any, *parts: str) -> None:
    """`call` is refused with one line that has all the parts."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    one_line(caught.value, *parts)


def one_line(error: ValueError, *parts: str) -> None:
    message = str(error)
    assert type(error) is ValueError
    assert message
    assert "\n" not in message
    for part in parts:
        assert part in message


def make_model(family: str, seed: int = 0, **changes):
    """A random stock model (fp32, eval) whose layers differ enough for selections to matter."""
    import transformers as t

    config, model = {
        "glm_moe_dsa": (t.GlmMoeDsaConfig, t.GlmMoeDsaForCausalLM),
        "deepseek_v32": (t.DeepseekV32Config, t.DeepseekV32ForCausalLM),
    }[family]
    torch.manual_seed(seed)
    made = model(config(**(SHAPE | changes))).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.2)
    return made


@pytest.fixture(scope="session", params=["glm_moe_dsa", "deepseek_v32"])
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="session")
def glm():
    return make_model("glm_moe_dsa")


@pytest.fixture(scope="session")
def ids():
    return torch.randint(0, SHAPE["vocab_size"], (2, 96), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tiny():
    from indexcache.models.loading import load_model

    return load_model("tiny")


@pytest.fixture(scope="module")
def one_thread():
    """For modules of models so small that a second thread only waits, and where two processes must find the same number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random GLM checkpoint with a character tokenizer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    make_model("glm_moe_dsa").save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder
