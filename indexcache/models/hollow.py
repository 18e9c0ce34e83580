"""Make a model of which this process has the indexers alone, and gets the rest from another.

Of several processes that share a model's weights only one needs to read them all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from indexcache.models.loading import DTYPES, Model, describe, open_weights
from indexcache.models.reader import Reader
from indexcache.models.soundness import check_weights
from indexcache.models.stream.loading import skeleton
from indexcache.pattern import Pattern


def load_hollow(path: str | Path, *, dtype: str, trust_remote_code: bool = False) -> Model:
    """Load the indexers of a checkpoint on the host, with zeros for all other weights.

    The zeros take no memory before they are written. See `models.loading.load`.

    Raises:
        ValueError: as `load` does; of the weights only names, shapes and indexers are looked at.
    """
    facts = describe(path)
    folder = Path(facts["path"])
    weights = open_weights(facts)
    try:
        module: Any = skeleton(facts, weights, DTYPES[dtype], trust_remote_code)
        stored = weights.check(module)
        for name, tensor in module.state_dict().items():
            value = torch.zeros(tensor.shape, dtype=tensor.dtype)
            if ".self_attn.indexer." in name:
                value = weights.read(stored[name], dtype=tensor.dtype)
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner).load_state_dict({leaf: value}, strict=False, assign=True)
    finally:
        weights.close()
    if module.config.tie_word_embeddings:
        module.tie_weights()
    rotary = module.model.rotary_emb
    module.model.rotary_emb = type(rotary)(module.config)
    check_weights(module, f"{folder}: ", selecting=True)
    return Model(module.eval(), Reader(folder), folder, Pattern(facts["native_pattern"]))
