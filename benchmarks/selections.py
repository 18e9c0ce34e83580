"""Record selections of a trained DSA model, for timing kernels on ids like those of real text.

    python -m benchmarks.selections [--out FILE]

In text, neighbouring queries share many ids, and the cost of attention depends on how many. This
runs the packaged `tiny` (k = 32) over 2,048 tokens of its held-out text and keeps the ids of the
last 1,024 queries. There k is at least 1.6 % of the keys, as 2,048 is of 131,072. It writes int16
tensors to a safetensors file and packs that by xz (FILE.xz): `topk.LAYER` [1024, 32] of three
layers, and `pool.10` [1024, 256].

`tile` makes ids for long contexts from them: it copies the text, and each id appears in every copy.
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save
from torch import Tensor

from indexcache.bench.recorded import read_tensors

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "data" / "tiny_selections.safetensors"
TEXT = ROOT / "indexcache" / "assets" / "text" / "heldout.jsonl"
LENGTH = 2048
QUERIES = 1024
LAYERS = (4, 8, 10)
POOL_LAYER = 10
POOL = 8  # A pool has this many times k ids.


def union(ids_SK: Tensor, group: int) -> float:
    """Return the mean size of the union of `group` neighbouring queries' ids, in units of k."""
    queries, k = ids_SK.shape
    ids = ids_SK[: queries // group * group].reshape(-1, group * k).sort(dim=-1).values
    sizes = (ids[:, 1:] != ids[:, :-1]).sum(-1) + 1
    return float(sizes.float().mean()) / k


def tile(ids_SK: Tensor, k: int, keys: int, queries: int) -> Tensor:
    """Make int32 [queries, k], ascending, from ids of a text of LENGTH tokens.

    The ids of copy j are those of the text plus j * LENGTH. Rows repeat.

    Raises:
        ValueError: the copies are longer than `keys`.
    """
    copies = k // ids_SK.shape[1]
    if copies * LENGTH > keys:
        raise ValueError(f"{copies} copies of {LENGTH} tokens are more than {keys} keys.")
    rows = ids_SK.to(torch.int32).repeat(-(-queries // len(ids_SK)), 1)[:queries]
    shift = torch.arange(copies, dtype=torch.int32, device=rows.device) * LENGTH
    return (rows[:, None, :] + shift[None, :, None]).reshape(queries, -1).contiguous()


def load(name: str) -> Tensor:
    """Read a recorded tensor, `topk.LAYER` or `pool.LAYER`."""
    return read_tensors(FILE)[name]


def record() -> dict[str, Tensor]:
    """Run `tiny` over its held-out text and return the selections and pools of LAYERS."""
    import indexcache as ic
    from indexcache import ops
    from indexcache.data import load_documents
    from indexcache.models.lm import hidden_states

    recorded: dict[str, Tensor] = {}
    layers = iter(range(1000))
    index_topk = ops.index_topk

    def recording(*arguments: Any, **options: Any) -> ops.Selection:
        layer = next(layers)
        if layer in LAYERS:
            q, k, w, scale, topk, offset = arguments[:6]
            wide = index_topk(q, k, w, scale, topk, offset, pool=POOL * topk)
            for name, ids in (("topk", wide.ids), ("pool", wide.pool)):
                assert ids is not None
                if name == "pool" and layer != POOL_LAYER:
                    continue
                recorded[f"{name}.{layer}"] = ids[0, -QUERIES:].to(torch.int16).contiguous()
        return index_topk(*arguments, **options)

    model = ic.load("tiny")
    documents = load_documents(TEXT, model.encode, model.config.vocab_size)
    ids = torch.cat([torch.as_tensor(d.ids) for d in documents])[None, :LENGTH].long()
    with (
        mock.patch.object(ops, "index_topk", recording),
        ic.accelerate(model.module),
        torch.no_grad(),
    ):
        hidden_states(model.module, ids)
    return recorded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FILE, help="safetensors file to write")
    out = parser.parse_args().out
    recorded = record()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(f"{out.name}.xz").write_bytes(lzma.compress(save(recorded)))
    for name, ids in recorded.items():
        sizes = " ".join(f"{union(ids, group):.2f}" for group in (2, 3, 4, 8))
        print(f"{name} {tuple(ids.shape)} union of 2, 3, 4, 8: {sizes}")


if __name__ == "__main__":
    main()
