"""Decoding step by step from a filled `FastCache`; on a GPU the step is one CUDA graph.

Everything a step reads lies in fixed tensors on the device: the tokens, the position of each sequence, the cache. Keys after a
sequence's position are not visible to it, so the operations run over the whole capacity. No step waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from indexcache.models.family import AnyModel, indexers, module_of
from indexcache.models.fast.cache import FastCache
from indexcache.models.timing import timed

WARMUP = 3  # steps before the capture: kernels are compiled and workspaces allocated in them


class Decoder:
    """Decoding of an accelerated model from a `FastCache` with a capacity, which `prefill` has filled.

    The pattern in force when a step is captured is the pattern of the graph; where it changes, the next step captures anew.

    Args:
        model: accelerated, on one device.
        cache: filled, not padded at the left; sequences may differ in length (`prefill(.., lengths=..)`).
        graph: replay a CUDA graph; None: where the model is on a GPU.

    Raises:
        ValueError: what the arguments rule out, a graph without a GPU.
    """

    def __init__(self, model: AnyModel, cache: FastCache, *, graph: bool | None = None):
        module = module_of(model)
        device = module.get_input_embeddings().weight.device
        if not isinstance(cache, FastCache):
            raise ValueError(f"A Decoder needs a FastCache, got {type(cache).__name__}.")
        if cache.capacity is None:
            raise ValueError("A Decoder needs a cache of fixed size: FastCache(model, capacity).")
        if cache.padded:
            raise ValueError(
                "A Decoder needs sequences that begin at position 0: give prefill the lengths, not padding at the left."
            )
        if not cache.layers[0].length:
            raise ValueError("This cache is empty: fill it with prefill first.")
        if graph and device.type != "cuda":
            raise ValueError(f"A CUDA graph needs a GPU, the model is on {device.type}.")
        if graph is not False and len({p.device for p in module.parameters()}) > 1:
            raise ValueError("A CUDA graph needs the model on one device; use graph=False.")
        self.module, self.cache = module, cache
        self.graph = device.type == "cuda" if graph is None else graph
        batch = len(cache.lengths)
        self.tokens_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.positions_B = torch.tensor(cache.lengths, dtype=torch.int64, device=device)
        self._lengths = cache.lengths
        self._captured: Any = None
        self._seen: list[Any] = []
        self._logits = torch.empty(0)

    def step(self, tokens_B: Tensor) -> Tensor:
        """Append one token to each sequence: int64 [B] -> logits [B, V] of the next, overwritten by the next step.

        Raises:
            ValueError: the cache is full, another shape, a pattern that needs indexer keys the cache does not hold.
        """
        if tokens_B.shape != self.positions_B.shape:
            raise ValueError(
                f"step takes one token for each of {len(self.positions_B)} sequences, got {tuple(tokens_B.shape)}."
            )
        lengths = self.cache.lengths
        assert self.cache.capacity is not None
        if max(lengths) >= self.cache.capacity:
            raise ValueError(f"The cache is full: it was made for {self.cache.capacity} tokens.")
        if lengths != self._lengths:  # the cache was changed by somebody else
            self.positions_B.copy_(torch.tensor(lengths))
        self.tokens_B1.copy_(tokens_B[:, None])
        if not self.graph:
            logits = self._forward()
        else:
            bound = self._bound()
            if self._captured is None or any(
                a is not b for a, b in zip(bound, self._seen, strict=True)
            ):
                self._capture()
                self._seen = bound
            self._captured.replay()
            logits = self._logits
        self.positions_B.add_(1)
        self.cache.advance()
        self._lengths = self.cache.lengths
        return logits

    def stream(
        self, logits_BV: Tensor, *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[Tensor]:
        """Tokens int64 [B] on the device, one a step and without end; the first is chosen from `logits_BV`.

        Args:
            logits_BV: of the last token in the cache, as `prefill` returned them.
            temperature: 0 takes the best token, otherwise one is drawn from softmax(logits / temperature).
        """
        if temperature < 0:
            raise ValueError(f"The temperature must not be negative, got {temperature}.")
        generator = torch.Generator(logits_BV.device).manual_seed(seed) if temperature else None
        while True:
            tokens = choose(logits_BV, temperature, generator)
            yield tokens
            logits_BV = self.step(tokens)

    def generate(
        self, logits_BV: Tensor, count: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Tensor:
        """`count` tokens after the prefill that gave `logits_BV`: int64 [B, count]. Arguments as in `stream`."""
        if count < 1:
            raise ValueError(f"count must be positive, got {count}.")
        tokens = self.stream(logits_BV, temperature=temperature, seed=seed)
        return torch.stack([next(tokens) for _ in range(count)], dim=1)

    def _bound(self) -> list[Any]:
        """What a graph is bound to, by identity: the role of each layer, and where the cache lies."""
        roles = [m.__dict__.get("forward") for m in indexers(self.module) if m is not None]
        return roles + [
            held for layer in self.cache.layers for held in (layer.latents, layer.indexer_keys)
        ]

    @torch.no_grad()
    def _forward(self) -> Tensor:
        with self.cache.at(self.positions_B):
            out = self.module.model(
                self.tokens_B1, None, self.positions_B[:, None], self.cache, use_cache=True
            )
        with timed("head"):
            return self.module.get_output_embeddings()(out.last_hidden_state[:, -1])

    def _capture(self) -> None:
        """A step writes the same values at the same positions however often it runs: the warm-up leaves no trace."""
        self._captured, self._logits = None, torch.empty(0)  # free the old graph's memory first
        device = self.positions_B.device
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUP):
                    self._forward()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._forward()
        self._captured, self._logits = graph, logits


def on_host(tokens: Iterator[Tensor]) -> Iterator[list[int]]:
    """The tokens int64 [B] of a stream as lists. The first is read at once; after it the next step is begun before a token is read, so
    that the device does not wait for the host. A consumer that stops early has run one step more than it read."""
    held: tuple[Tensor, Any] | None = None
    for i, drawn in enumerate(tokens):
        if held is not None:
            yield _read(*held)
        if i == 0:
            yield drawn.tolist()
        elif drawn.is_cuda:
            copy = torch.empty_like(drawn, device="cpu", pin_memory=True).copy_(
                drawn, non_blocking=True
            )
            held = copy, torch.cuda.current_stream(drawn.device).record_event()
        else:
            held = drawn, None
    if held is not None:
        yield _read(*held)


def _read(copy: Tensor, done: Any) -> list[int]:
    if done is not None:
        done.synchronize()
    return copy.tolist()


def choose(
    logits_BV: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """int64 [B]: the best tokens, or a draw from softmax(logits / temperature). Stays on the device (torch.multinomial may not)."""
    if not temperature:
        return logits_BV.argmax(-1)
    chances = (logits_BV.float() / temperature).softmax(-1)
    return (chances / torch.empty_like(chances).exponential_(generator=generator)).argmax(-1)
