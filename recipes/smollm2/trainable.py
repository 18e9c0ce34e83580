"""Give SmolLM2 as GlmMoeDsa weights that an optimiser can move, with the same function.

    python -m recipes.smollm2.trainable DELTA --out work/smollm2/trainable [--wheel FILE]

`rewrite` switches the two inner norms off with inputs of size 1e-9, which no optimiser can move.
Here a constant does it. Both latents are `PADS` wider than what they hold, and the biases of their
projections (`attention_bias`) make the additional dimensions `CONSTANT`. That is so large that it
alone decides the root mean square: the norm divides by a constant, which its weight W multiplies
back. Beyond the norm the additional dimensions are zero, by weights of zero.

    RMSNorm([v, C .. C]) * [W .. W, 0 .. 0] = [v, 0 .. 0] * W / (C sqrt(pads / dims))

All projections hold entries of ordinary size then, also those of the values and of q_a_proj, which
starts as the identity. C and W are far larger than a step of Adam, so they stay as they are; zeros
behind a norm's weight of zero get gradients of exactly zero, as the heads' parts without RoPE do. A
head may learn to read the keys of other groups, which SmolLM2 cannot: all arms of a comparison may.
vLLM's DSA layers have no such biases and do not load this form.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.smollm2.apply_delta import build, read_delta
from recipes.smollm2.rewrite import ALPHA, GAIN, load_llama, power_of_two, save
from recipes.smollm2.weights import download

PADS = 64
"""Number of dimensions that the latent of the queries has more."""
CONSTANT = 2.0**15
"""Value of the additional dimensions; every float format holds it."""


def gain(dims: int, pads: int) -> tuple[float, float]:
    """Return a norm's weight, a power of two, and the factor that the norm then multiplies by."""
    size = CONSTANT * math.sqrt(pads / dims)
    weight = 2.0 ** math.floor(math.log2(size))
    return weight, weight / size


def trainable(
    state: dict[str, Tensor], c: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Change the weights and settings that `rewrite` has made into those of this form.

    Args:
        state: all weights in fp32, with or without indexers.
        c: the keyword arguments of GlmMoeDsaConfig.
    """
    rotary = c["qk_rope_head_dim"]
    new = c | {
        "attention_bias": True,
        "q_lora_rank": c["q_lora_rank"] + PADS,
        "kv_lora_rank": power_of_two(rotary + 1),
    }
    kv_pads = new["kv_lora_rank"] - rotary
    q_weight, q_gain = gain(new["q_lora_rank"], PADS)
    kv_weight, kv_gain = gain(new["kv_lora_rank"], kv_pads)
    out = dict(state)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}.self_attn"
        wide = F.pad(state[f"{at}.q_a_proj.weight"] / ALPHA, (0, 0, 0, PADS))
        out[f"{at}.q_a_proj.weight"] = wide
        out[f"{at}.q_a_proj.bias"] = _last(wide.shape[0], PADS, 0.0, CONSTANT)
        out[f"{at}.q_a_layernorm.weight"] = _last(wide.shape[0], PADS, q_weight, 0.0)
        readers = [f"{at}.q_b_proj.weight", f"{at}.indexer.wq_b.weight"]
        for name in readers:  # These read the latent of the queries.
            if name in state:
                out[name] = F.pad(state[name] * (GAIN / q_gain), (0, PADS))
        joint = state[f"{at}.kv_a_proj_with_mqa.weight"]
        values, keys = joint.split([c["kv_lora_rank"], rotary])
        values = F.pad(values[:rotary] * (GAIN / ALPHA / kv_gain), (0, 0, 0, kv_pads))
        out[f"{at}.kv_a_proj_with_mqa.weight"] = torch.cat([values, keys])
        bias = _last(len(values), kv_pads, 0.0, CONSTANT)
        out[f"{at}.kv_a_proj_with_mqa.bias"] = F.pad(bias, (0, rotary))
        out[f"{at}.kv_a_layernorm.weight"] = _last(len(values), kv_pads, kv_weight, 0.0)
        spread = state[f"{at}.kv_b_proj.weight"][:, :rotary]
        out[f"{at}.kv_b_proj.weight"] = F.pad(spread, (0, kv_pads))
        out[f"{at}.o_proj.bias"] = torch.zeros(c["hidden_size"])
    return out, new


def _last(dims: int, count: int, first: float, last: float) -> Tensor:
    """Return a vector of `first`, whose last `count` entries are `last`."""
    vector = torch.full((dims,), first)
    vector[dims - count :] = last
    return vector


def write(delta: Path, wheel: Path, out: Path, dtype: str) -> None:
    """Write the checkpoint with the indexers of a delta of all layers, and the tokenizer.

    Raises:
        ValueError: the delta has not the indexers of all layers, or is of another model.
    """
    if "S" in (pattern := read_delta(delta)[1]["pattern"]):
        raise ValueError(f"{delta}: want the indexers of all layers, not those of {pattern}.")
    llama, settings_of_llama, tokenizer, digest = load_llama(wheel)
    state, c, _ = build(delta, llama.state_dict(), settings_of_llama, digest)
    save(*trainable(state, c), tokenizer, out, getattr(torch, dtype), digest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("delta", type=Path, help="Indexers of all layers, packed or not.")
    parser.add_argument("--out", type=Path, required=True, help="Write the checkpoint here.")
    parser.add_argument("--wheel", type=Path, help="Without it the wheel is downloaded.")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    o = parser.parse_args()
    write(o.delta, o.wheel or download(o.out.resolve().parent), o.out, o.dtype)


if __name__ == "__main__":
    from indexcache.cli import guarded  # Functions of this module need no command line.

    sys.exit(guarded(main))
