"""Check and time the products of one token (`indexcache.ops.step`), for benchmarks/ops.py.

The shape is that of GLM-4.7-Flash. Several layers with weights of their own run one after the other
in a CUDA graph, so that weights come from memory and not from the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Report, milliseconds, need, relative
from indexcache.ops import step
from indexcache.shapes import Rates

HIDDEN, QUERY, LATENT, ROPE = 2048, 768, 512, 64
HEADS, NOPE, VALUE = 20, 192, 256
INNER, EXPERTS, CHOSEN = 1536, 64, 4
KEYS, TOPK = 200_000, 2048
LAYERS = 8
EPS = 1e-5


def normal(*shape: int, scale: float = 0.02) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale


class Layer:
    """Random weights of a layer, and the calls of a step."""

    def __init__(self) -> None:
        self.first = [normal(QUERY, HIDDEN), normal(LATENT + ROPE, HIDDEN)]
        self.q_b = normal(HEADS * (NOPE + ROPE), QUERY)
        self.kv_b = normal(HEADS, NOPE + VALUE, LATENT)
        self.o = normal(HIDDEN, HEADS * VALUE)
        self.router = torch.randn(EXPERTS, HIDDEN, device="cuda") * 0.02
        self.bias = torch.zeros(EXPERTS, device="cuda")
        self.experts = normal(EXPERTS, 2 * INNER, HIDDEN), normal(EXPERTS, HIDDEN, INNER)
        self.shared = normal(INNER, HIDDEN), normal(INNER, HIDDEN), normal(HIDDEN, INNER)
        self.norms = [(torch.ones_like(normal(n)), EPS) for n in (HIDDEN, QUERY, LATENT)]

    def project(self, x: Tensor, rope: Any, position: Tensor, latents: Tensor, by: str) -> Tensor:
        out, _ = step.products(x, self.first, norm=self.norms[0], normed=True, backend=by)
        q, _ = step.products(out[:QUERY], [self.q_b], norm=self.norms[1], normed=True, backend=by)
        w_k = self.kv_b[:, :NOPE]
        q = q.view(HEADS, -1)
        arguments = (q, w_k, out[QUERY:], self.norms[2], rope, position, latents)
        return step.absorb(*arguments, backend=by)

    def attend(self, q: Tensor, latents: Tensor, ids: Tensor, by: str) -> Tensor:
        return step.attend(q, latents, ids, 0.06, self.kv_b[:, NOPE:], backend=by)

    def output(self, values: Tensor, x: Tensor, by: str) -> Tensor:
        return step.products(values, [self.o], add=x, backend=by)[0]

    def feed(self, x: Tensor, by: str) -> Tensor:
        options: dict[str, Any] = {"dtype": torch.float32, "normed": True, "backend": by}
        logits, y = step.products(x, [self.router], norm=self.norms[0], **options)
        assert y is not None
        arguments = (x, y, logits, self.bias, *self.experts, self.shared, CHOSEN, True, 1.8)
        return step.experts(*arguments, backend=by)


def one_token(report: Report, rates: Rates) -> None:
    """Check and time the parts of a layer that reads a selection, and all of them in a row."""
    layers = [Layer() for _ in range(LAYERS)]
    angle = torch.randn(ROPE // 2, device="cuda").repeat(2)
    rope = angle.cos().bfloat16(), angle.sin().bfloat16()
    position = torch.tensor([KEYS - 1], device="cuda")
    latents = normal(KEYS, LATENT + ROPE, scale=1.0)
    ids = torch.randperm(KEYS, device="cuda")[:TOPK].int()
    x, values = normal(HIDDEN, scale=1.0), normal(HEADS * VALUE, scale=1.0)
    q = normal(HEADS, LATENT + ROPE, scale=1.0)

    def whole(layer: Layer, x: Tensor, by: str) -> Tensor:
        q = layer.project(x, rope, position, latents, by)
        return layer.feed(layer.output(layer.attend(q, latents, ids, by), x, by), by)

    def times(call: Callable[[Layer, Tensor], Tensor]) -> float:
        def run() -> None:
            y = x
            for layer in layers:
                out = call(layer, y)
                y = out if out.shape == x.shape else y

        return milliseconds(run, graph=True) / LAYERS

    weight = 2 * HIDDEN * INNER
    n_bytes = {
        "projections": 2 * (HIDDEN * (QUERY + LATENT + ROPE) + HEADS * QUERY * (NOPE + ROPE)),
        "attention": 2 * (TOPK * (LATENT + ROPE) + HEADS * VALUE * LATENT),
        "output": 2 * HIDDEN * HEADS * VALUE,
        "experts": 4 * EXPERTS * HIDDEN + 3 * weight * (1 + CHOSEN),
    }
    n_bytes["projections"] += 2 * HEADS * NOPE * LATENT
    calls: dict[str, Callable[[Layer, Tensor, str], Tensor]] = {
        "projections": lambda w, x, by: w.project(x, rope, position, latents, by),
        "attention": lambda w, _x, by: w.attend(q, latents, ids, by),
        "output": lambda w, x, by: w.output(values, x, by),
        "experts": lambda w, x, by: w.feed(x, by),
        "a layer": whole,
    }
    n_bytes["a layer"] = sum(n_bytes.values())
    for name, call in calls.items():
        error = relative(call(layers[0], x, "triton"), call(layers[0], x, "torch"))
        need(error < 1e-2, f"{name} of one token is off by {error}")
        ms = times(lambda w, x, call=call: call(w, x, "triton"))
        floor = n_bytes[name] / rates.hbm * 1e3
        report.row("one token", f"{name} H={HEADS} {CHOSEN} of {EXPERTS}", ms, floor_ms=floor)
