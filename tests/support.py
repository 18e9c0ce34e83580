"""Make small random models and texts, and check refusals, for the tests of several folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import numpy as np
import pytest
import torch

from indexcache.data import Document
from indexcache.models import families

PATTERNS = ["FSSFSS", "FFSSSS", "FSFRSS@2", "FRRFRR@2", "FSRSSF@3"]

# Modules are named by their model_type. Importing them would import triton before the kernel tests
# set TRITON_INTERPRET.
FAMILIES = sorted((m.name for m in iter_modules(families.__path__)), reverse=True)

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 16,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 512,
}


def refused(call: Any, *parts: str) -> None:
    """Expect that `call` is refused with one line that has all the parts."""
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
    """Make a random stock model in fp32 whose layers differ enough for selections to matter."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = getattr(transformers, CONFIG_MAPPING_NAMES[family])
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    torch.manual_seed(seed)
    made = model(config(**(SHAPE | changes))).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.2)
    return made


@contextmanager
def single_thread() -> Iterator[None]:
    """Compute on one thread.

    The models are so small that a second thread only waits, and two processes must find the same
    number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_checkpoint(folder: Path) -> Path:
    """Write a random GLM checkpoint with a character tokenizer into a folder, and return it."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    make_model("glm_moe_dsa").save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def relative(a, b):
    return float((a - b).norm() / b.norm())


def documents(count=6, length=200, vocabulary=SHAPE["vocab_size"], seed=0):
    rng = np.random.default_rng(seed)
    return [
        Document(rng.integers(0, vocabulary, length), f"d{i % 2}", f"doc{i}", f"{i:064x}")
        for i in range(count)
    ]


def stock_loss(model, pattern: str, batches) -> float:
    """Compute the loss of a stock model with `indexer_types`, without code of the package."""
    types = [{"F": "full", "S": "shared"}[c] for c in pattern]
    other = make_model("glm_moe_dsa", indexer_types=types)
    other.load_state_dict(model.state_dict(), strict=False)
    total = count = 0
    for batch in batches:
        for row in batch.ids:
            with torch.no_grad():
                out = torch.nn.functional.cross_entropy(
                    other(row[None]).logits[0, :-1].double(), row[1:], reduction="sum"
                )
            total += float(out)
            count += len(row) - 1
    return total / count
