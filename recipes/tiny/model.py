"""The tiny DSA model as its recipe trains it, with the names and arithmetic of GlmMoeDsa.

This model and train.py stay until tiny is trained again. Then transformers' own model and
`indexcache.distilling` take their place.

All three ways through the attention of a layer have the same weights:

  dense    Causal attention over everything, for pre-training and as the warm-up's target.
  warm-up  Dense attention, and the KL of the indexer to it, averaged over the heads
           (DeepSeek-V3.2, equation 3).
  sparse   Attention over the indexer's top-k, gathered from the latents, and the KL over the
           selected set (DeepSeek-V3.2, equation 4).

Shapes: B sequences, T tokens, H heads, D head dims, K selected ids, C latent, R RoPE dims, J index
heads. The MoE computes every expert and weights the result, which is faster than routing at this
size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 384,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "first_k_dense_replace": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "index_topk": 32,
    "index_head_dim": 32,
    "index_n_heads": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        normed = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def rotate(x_BTHR: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Apply interleaved RoPE. The rotated pairs come out as two halves, as in transformers."""
    a, b = x_BTHR[..., 0::2], x_BTHR[..., 1::2]
    cos, sin = cos_TP[:, None].to(a.dtype), sin_TP[:, None].to(a.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Indexer(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.heads = c["index_n_heads"]
        self.dim = c["index_head_dim"]
        self.rope = c["qk_rope_head_dim"]
        self.wq_b = linear(c["q_lora_rank"], self.heads * self.dim)
        self.wk = linear(c["hidden_size"], self.dim)
        self.k_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.weights_proj = linear(c["hidden_size"], self.heads)

    def forward(
        self, x: Tensor, q_resid: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute q [B, T, J, D], k [B, T, D] and w [B, T, J], fp32 with both scales in it."""
        q = self.wq_b(q_resid).unflatten(-1, (self.heads, self.dim))
        k = self.k_norm(self.wk(x).float()).to(x.dtype)[:, :, None]
        q = torch.cat([rotate(q[..., : self.rope], cos, sin), q[..., self.rope :]], -1)
        k = torch.cat([rotate(k[..., : self.rope], cos, sin), k[..., self.rope :]], -1)
        w = F.linear(x.float(), self.weights_proj.weight.float())
        return q, k[:, :, 0], w * self.heads**-0.5 * self.dim**-0.5


def causal(scores_BTS: Tensor) -> Tensor:
    """Set the scores of the future to -inf."""
    t, s = scores_BTS.shape[-2:]
    future = torch.ones(t, s, dtype=torch.bool, device=scores_BTS.device).triu(1)
    return scores_BTS.masked_fill(future, -torch.inf)


def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Compute I[t, s] = sum_j w[t, j] relu(q[t, j] . k[s]), fp32 [B, T, T], -inf for the future."""
    logits = F.relu(torch.einsum("btjd,bsd->btjs", q, k)).float()
    return causal(torch.einsum("btjs,btj->bts", logits, w))


def kl_divergence(target: Tensor, log_q: Tensor) -> Tensor:
    """Compute the mean KL(target || q) over the tokens; zeros of the target add nothing."""
    terms = target * (target.clamp_min(1e-30).log() - log_q)
    return torch.where(target > 0, terms, 0.0).sum(-1).mean()


class Attention(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.heads = h = c["num_attention_heads"]
        self.nope = c["qk_nope_head_dim"]
        self.rope = c["qk_rope_head_dim"]
        self.v = c["v_head_dim"]
        self.latent = c["kv_lora_rank"]
        self.topk = c["index_topk"]
        self.q_a_proj = linear(c["hidden_size"], c["q_lora_rank"])
        self.q_a_layernorm = RMSNorm(c["q_lora_rank"], 1e-6)
        self.q_b_proj = linear(c["q_lora_rank"], h * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = linear(c["hidden_size"], self.latent + self.rope)
        self.kv_a_layernorm = RMSNorm(self.latent, 1e-6)
        self.kv_b_proj = linear(self.latent, h * (self.nope + self.v))
        self.o_proj = linear(h * self.v, c["hidden_size"])
        self.indexer = Indexer(c)
        self.scale = (self.nope + self.rope) ** -0.5

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor):
        """Project x to the latent of the queries, the queries, the latent and the rotary key."""
        q_resid = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_resid).unflatten(-1, (self.heads, self.nope + self.rope))
        q = torch.cat([q[..., : self.nope], rotate(q[..., self.nope :], cos, sin)], -1)
        latent, k_rot = self.kv_a_proj_with_mqa(x).split([self.latent, self.rope], -1)
        return q_resid, q, self.kv_a_layernorm(latent), rotate(k_rot[:, :, None], cos, sin)

    def dense(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        _, q, latent, k_rot = self.qkv(x, cos, sin)
        k, v = self.expand(latent, k_rot)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, is_causal=True, scale=self.scale
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def expand(self, latent: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Expand the latent to keys and values, both [B, H, T, D]."""
        kv = self.kv_b_proj(latent).unflatten(-1, (self.heads, self.nope + self.v))
        k = torch.cat([kv[..., : self.nope], k_rot.expand(-1, -1, self.heads, -1)], -1)
        return k.transpose(1, 2), kv[..., self.nope :].transpose(1, 2)

    def warmup_loss(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the indexer's KL to the dense attention, and which share of it the top-k keeps.

        Both are means over the tokens. No gradient flows to x.
        """
        with torch.no_grad():
            q_resid, q, latent, k_rot = self.qkv(x, cos, sin)
            k, _ = self.expand(latent, k_rot)
            p = 0
            for h in range(self.heads):
                logits = (q[:, :, h] @ k[:, h].transpose(-1, -2)).float() * self.scale
                p = p + causal(logits).softmax(-1)
            p = p / self.heads
        scores = index_scores(*self.indexer(x, q_resid, cos, sin))
        kl = kl_divergence(p, scores.log_softmax(-1))
        with torch.no_grad():
            kept = p.gather(-1, scores.topk(min(self.topk, x.shape[1]), -1).indices).sum(-1).mean()
        return kl, kept

    def sparse(self, x: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None, with_kl: bool):
        """Attend over a selection.

        Args:
            ids: the selection of a source layer, int64 [B, T, K]; None runs the indexer.
            with_kl: whether to compute the KL of the indexer to the attention over its selection.

        Returns:
            The output, the selection, and the KL or None.
        """
        q_resid, q, latent, k_rot = self.qkv(x, cos, sin)
        index = self.indexer(x.detach(), q_resid.detach(), cos, sin) if ids is None else None
        if ids is None:
            with torch.no_grad():
                ids = index_scores(*index).topk(min(self.topk, x.shape[1]), -1).indices
        future = ids > torch.arange(x.shape[1], device=x.device)[:, None]
        rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
        keys = torch.cat([latent, k_rot[:, :, 0]], -1)[rows, ids]  # [B, T, K, C + R]
        weight = self.kv_b_proj.weight.to(x.dtype).view(self.heads, -1, self.latent)
        w_k, w_v = weight.split([self.nope, self.v], 1)
        absorbed = torch.einsum("bthn,hnc->bthc", q[..., : self.nope], w_k)
        query = torch.cat([absorbed, q[..., self.nope :]], -1)
        logits = torch.einsum("bthc,btkc->bthk", query, keys).float() * self.scale
        p = logits.masked_fill(future[:, :, None], -torch.inf).softmax(-1)
        out = torch.einsum("bthk,btkc->bthc", p.to(x.dtype), keys[..., : self.latent])
        out = self.o_proj(torch.einsum("bthc,hvc->bthv", out, w_v).flatten(2))
        kl = None
        if with_kl and index is not None:
            iq, ik, iw = index
            picked = F.relu(torch.einsum("btjd,btkd->btjk", iq, ik[rows, ids])).float()
            scores = torch.einsum("btjk,btj->btk", picked, iw).masked_fill(future, -torch.inf)
            kl = kl_divergence(p.detach().mean(2), scores.log_softmax(-1))
        return out, ids, kl


class MLP(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.gate_proj = linear(dim, inner)
        self.up_proj = linear(dim, inner)
        self.down_proj = linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.experts = c["num_experts_per_tok"]
        self.scale = c["routed_scaling_factor"]
        self.weight = nn.Parameter(torch.empty(c["n_routed_experts"], c["hidden_size"]))
        self.register_buffer("e_score_correction_bias", torch.zeros(c["n_routed_experts"]))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the weight of each expert, fp32 [.., E]; it is zero for those not routed to."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        experts = (scores + self.e_score_correction_bias).topk(self.experts, -1).indices
        w = torch.zeros_like(scores).scatter(-1, experts, scores.gather(-1, experts))
        return w / (w.sum(-1, keepdim=True) + 1e-20) * self.scale


class Experts(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        e, i, d = c["n_routed_experts"], c["moe_intermediate_size"], c["hidden_size"]
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, i))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        gate, up = torch.einsum("btd,eid->btei", x, self.gate_up_proj.to(x.dtype)).chunk(2, -1)
        inner = F.silu(gate) * up * w[..., None].to(x.dtype)
        return torch.einsum("btei,edi->btd", inner, self.down_proj.to(x.dtype))


class MoE(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        inner = c["moe_intermediate_size"] * c["n_shared_experts"]
        self.gate = Router(c)
        self.experts = Experts(c)
        self.shared_experts = MLP(c["hidden_size"], inner)
        self.register_buffer("load", torch.zeros(c["n_routed_experts"]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        w = self.gate(x)
        if self.training:
            self.load.copy_((w.detach() > 0).float().mean((0, 1)))
        return self.experts(x, w) + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, c: dict, moe: bool):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MoE(c) if moe else MLP(c["hidden_size"], c["intermediate_size"])
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mode: str, share: Tensor | None):
        """Return x after the layer, the ids of its selection or None, and its KL or None."""
        h = self.input_layernorm(x)
        if mode == "dense":
            out, ids, kl = self.self_attn.dense(h, cos, sin), None, None
        else:
            out, ids, kl = self.self_attn.sparse(h, cos, sin, share, mode == "sparse")
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), ids, kl


class Tiny(nn.Module):
    def __init__(self, c: dict = CONFIG):
        super().__init__()
        self.c = c
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.model.layers = nn.ModuleList(
            [Layer(c, i >= c["first_k_dense_replace"]) for i in range(c["num_hidden_layers"])]
        )
        self.model.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        for name, p in self.named_parameters():
            if p.dim() > 1:
                std = 0.02 if "embed" in name else p.shape[-1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                    std /= (2 * c["num_hidden_layers"]) ** 0.5
                nn.init.normal_(p, std=std)

    def angles(self, length: int, device) -> tuple[Tensor, Tensor]:
        r = self.c["qk_rope_head_dim"]
        theta = self.c["rope_parameters"]["rope_theta"]
        inverse = theta ** (-torch.arange(0, r, 2, device=device).float() / r)
        angle = torch.arange(length, device=device).float()[:, None] * inverse
        return angle.cos(), angle.sin()

    def forward(self, ids_BT: Tensor, mode: str = "dense", pattern: str | None = None):
        """Compute fp32 logits [B, T, V], and the KL summed over the indexers.

        Args:
            mode: "dense", "sparse", or "plain", which is sparse without the KL.
            pattern: F or S for each layer in the sparse modes; None is all F.
        """
        x = self.model.embed_tokens(ids_BT)
        cos, sin = self.angles(ids_BT.shape[1], ids_BT.device)
        kl, ids = x.new_zeros(()), None
        for i, layer in enumerate(self.model.layers):
            share = ids if pattern is not None and pattern[i] == "S" else None
            x, ids, kl_of_layer = layer(x, cos, sin, mode, share)
            kl = kl if kl_of_layer is None else kl + kl_of_layer
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        return logits.float(), kl

    def warmup(self, ids_BT: Tensor):
        """Run the backward pass of each indexer's KL, layer by layer.

        Returns:
            The KL summed over the layers, and the share of attention that each selection keeps.
        """
        cos, sin = self.angles(ids_BT.shape[1], ids_BT.device)
        with torch.no_grad():
            x = self.model.embed_tokens(ids_BT)
        total, kept = 0.0, []
        for layer in self.model.layers:
            kl, share = self.distil(layer, x, cos, sin)
            if torch.is_grad_enabled():
                kl.backward()
            total = total + kl.detach()
            kept.append(share)
            with torch.no_grad():
                x, _, _ = layer(x, cos, sin, "dense", None)
        return total, torch.stack(kept)

    @staticmethod
    def distil(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor):
        with torch.no_grad():
            h = layer.input_layernorm(x)
        return layer.self_attn.warmup_loss(h, cos, sin)

    @torch.no_grad()
    def balance(self, rate: float = 1e-3) -> None:
        """Lower the bias of overloaded experts, which balances them without an auxiliary loss."""
        for layer in self.model.layers:
            if isinstance(layer.mlp, MoE):
                load = layer.mlp.load
                layer.mlp.gate.e_score_correction_bias += rate * (load.mean() - load).sign()
