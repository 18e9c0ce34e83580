"""Selections of a trained DSA model, for timing kernels on ids whose neighbours share what neighbours in text share.

    python benchmarks/selections.py [--out FILE]

Runs the packaged `tiny` (k = 32) over 2,048 tokens of its held-out text and keeps the ids of the last 1,024 queries: a share of
1.6 % of the keys and more, like 2,048 of 131,072. Writes safetensors, int16: `topk.LAYER` [1024, 32], `pool.LAYER` [1024, 256].
`tile` makes ids for long contexts of them: each id stands for its likes in as many copies of the text as are needed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FILE = ROOT / "benchmarks" / "data" / "tiny_selections.safetensors"
LENGTH, QUERIES, LAYERS, WIDER = 2048, 1024, (4, 8, 10), 8


def union(ids_SK: Tensor, group: int) -> float:
    """Mean size of the union of `group` neighbouring queries' ids, in units of k."""
    whole = (
        ids_SK[: len(ids_SK) // group * group]
        .reshape(-1, group * ids_SK.shape[1])
        .sort(dim=-1)
        .values
    )
    return float(((whole[:, 1:] != whole[:, :-1]).sum(-1) + 1).float().mean()) / ids_SK.shape[1]


def tile(ids_SK: Tensor, k: int, keys: int, queries: int) -> Tensor:
    """int32 [queries, k], ascending: the ids of copy j are those of the text plus j * LENGTH; rows repeat."""
    copies = k // ids_SK.shape[1]
    if copies * LENGTH > keys:
        raise ValueError(f"{copies} copies of {LENGTH} tokens are more than {keys} keys.")
    rows = ids_SK.to(torch.int32).repeat(-(-queries // len(ids_SK)), 1)[:queries]
    shift = torch.arange(copies, dtype=torch.int32, device=rows.device) * LENGTH
    return (rows[:, None, :] + shift[None, :, None]).reshape(queries, -1).contiguous()


def load(name: str) -> Tensor:
    with safe_open(FILE, "pt") as file:
        return file.get_tensor(name)


def record() -> dict[str, Tensor]:
    from indexcache import accelerate, load, ops
    from indexcache.data import load_documents
    from indexcache.models.lm import hidden_states

    found: dict[str, Tensor] = {}
    select, turn = ops.index_topk, iter(range(1000))

    def recording(
        q: Tensor,
        k: Tensor,
        w: Tensor,
        scale: Tensor | None,
        topk: int,
        offset: Any,
        *rest: Any,
        **options: Any,
    ):
        layer = next(turn)
        if layer in LAYERS:
            selection = select(q, k, w, scale, topk, offset, pool=WIDER * topk)
            for name, ids in (("topk", selection.ids), ("pool", selection.pool)):
                found[f"{name}.{layer}"] = ids[0, -QUERIES:].to(torch.int16).contiguous()
        return select(q, k, w, scale, topk, offset, *rest, **options)

    loaded = load("tiny")
    text = ROOT / "indexcache" / "assets" / "text" / "heldout.jsonl"
    documents = load_documents(text, loaded.encode, loaded.config.vocab_size)
    ids = torch.cat([torch.as_tensor(d.ids) for d in documents])[None, :LENGTH].long()
    ops.index_topk = recording
    try:
        with accelerate(loaded.module), torch.no_grad():
            hidden_states(loaded.module, ids)
    finally:
        ops.index_topk = select
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FILE)
    out = parser.parse_args().out
    found = record()
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, out)
    for name, ids in found.items():
        print(
            name,
            tuple(ids.shape),
            "union of 2, 3, 4, 8:",
            *(f"{union(ids, g):.2f}" for g in (2, 3, 4, 8)),
        )


if __name__ == "__main__":
    main()
