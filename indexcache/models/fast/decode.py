"""Decode step by step from a filled `FastCache`; on a GPU a step is one CUDA graph.

Everything that a step reads lies in fixed tensors on the device: the tokens, the position of each
sequence, the cache. Keys after a sequence's position are invisible to it, so the operations run
over the whole capacity. No step waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from indexcache.models.family import AnyModel, indexers, input_device, module_of
from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.frozen import Frozen
from indexcache.models.patch import state_of
from indexcache.models.scopes import seam_here
from indexcache.models.timing import timed

CAPTURE_STEPS = 3
"""Number of steps before a graph is captured; they compile kernels and allocate workspaces."""


class Decoder:
    """A decoder of an accelerated model, over a `FastCache` that `prefill` has filled.

    A graph keeps the pattern that was in force when it was captured, and the modules as they were.
    When the pattern changes, or a hook, an adapter or other weights come, the next step captures
    anew.

    Args:
        model: an accelerated model, on one device.
        cache: a filled cache with a capacity, filled without padding. Its sequences may differ in
            length (`prefill(.., lengths=..)`).
        graph: whether to replay a CUDA graph; None means yes for a model that lies on
            one GPU as a whole.

    Raises:
        ValueError: the cache is of another kind, empty, padded, or has no capacity; a graph is
            asked for without a GPU, or for a model on several devices.
    """

    def __init__(self, model: AnyModel, cache: FastCache, *, graph: bool | None = None):
        module = module_of(model)
        device = input_device(module.get_input_embeddings())
        if not isinstance(cache, FastCache):
            raise ValueError(f"A Decoder needs a FastCache, got {type(cache).__name__}.")
        if cache.capacity is None:
            raise ValueError("A Decoder needs a cache of fixed size: FastCache(model, capacity).")
        if cache.padded:
            raise ValueError(
                "A Decoder needs sequences that begin at position 0 and have no padding between: "
                "give prefill the lengths, not an attention mask."
            )
        if not cache.layers[0].length:
            raise ValueError("This cache is empty: fill it with prefill first.")
        if graph and device.type != "cuda":
            raise ValueError(f"A CUDA graph needs a GPU, the model is on {device.type}.")
        whole = all(p.device == device for p in module.parameters())
        if graph and not whole:
            raise ValueError("A CUDA graph needs the model on one device; use graph=False.")
        self.module, self.cache = module, cache
        self.graph = (device.type == "cuda" and whole) if graph is None else graph
        batch = len(cache.lengths)
        with torch.inference_mode(False):  # Tensors of that mode cannot be written to after it.
            self.tokens_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self.positions_B = torch.tensor(cache.lengths, dtype=torch.int64, device=device)
        self._lengths = cache.lengths
        self._graph: Any = None
        self._graph_inputs: list[Any] = []
        self._graph_modules: Frozen | None = None
        self._graph_logits = torch.empty(0)

    def step(self, tokens_B: Tensor) -> Tensor:
        """Append one token to each sequence.

        Args:
            tokens_B: int64 [B].

        Returns:
            Logits [B, V] of the next token, in the model's dtype. The next step overwrites them.

        Raises:
            ValueError: the cache is full, the tokens have another shape, or the pattern needs
                indexer keys that the cache does not hold.
        """
        if tokens_B.shape != self.positions_B.shape:
            raise ValueError(
                f"step takes one token for each of {len(self.positions_B)} sequences, got "
                f"{tuple(tokens_B.shape)}."
            )
        lengths = self.cache.lengths
        assert self.cache.capacity is not None
        if max(lengths) >= self.cache.capacity:
            raise ValueError(f"The cache is full: it was made for {self.cache.capacity} tokens.")
        if lengths != self._lengths:  # The cache was changed between steps.
            self.positions_B.copy_(torch.tensor(lengths))
        self.tokens_B1.copy_(tokens_B[:, None])
        if not self.graph:
            logits = self._forward()
        else:
            inputs = self._current_inputs()
            if (
                self._graph is None
                or any(a is not b for a, b in zip(inputs, self._graph_inputs, strict=True))
                or self._changed()
            ):
                self._capture()
                self._graph_inputs = inputs
                self._graph_modules = Frozen(self.module.named_modules(), weights=True)
            self._graph.replay()
            logits = self._graph_logits
        self.positions_B.add_(1)
        self.cache.advance()
        self._lengths = self.cache.lengths
        return logits

    def stream(
        self, logits_BV: Tensor, *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[Tensor]:
        """Yield tokens int64 [B] on the device, one a step and without end.

        Args:
            logits_BV: logits of the last token in the cache, as `prefill` returns them; the first
                token is taken from them.
            temperature: 0 takes the best token; otherwise a token is drawn from
                softmax(logits / temperature).
            seed: random seed for sampling.

        Raises:
            ValueError: the temperature is negative, or the cache is full.
        """
        if temperature < 0:
            raise ValueError(f"The temperature must not be negative, got {temperature}.")
        generator = torch.Generator(logits_BV.device).manual_seed(seed) if temperature else None
        while True:
            tokens = sample(logits_BV, temperature, generator)
            yield tokens
            logits_BV = self.step(tokens)

    def generate(
        self, logits_BV: Tensor, count: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Tensor:
        """Return `count` tokens of each sequence, int64 [B, count]; arguments as in `stream`.

        Raises:
            ValueError: `count` is below 1, or as in `stream`.
        """
        if count < 1:
            raise ValueError(f"count must be positive, got {count}.")
        tokens = self.stream(logits_BV, temperature=temperature, seed=seed)
        return torch.stack([next(tokens) for _ in range(count)], dim=1)

    def _current_inputs(self) -> list[Any]:
        """Return the objects that a graph depends on by identity: roles and tensors of layers."""
        roles = [m.__dict__.get("forward") for m in indexers(self.module) if m is not None]
        return [
            seam_here(state_of(self.module)),
            *roles,
            *(x for layer in self.cache.layers for x in (layer.latents, layer.indexer_keys)),
        ]

    def _changed(self) -> str | None:
        """Return the name of a module that has changed since the graph was captured."""
        return None if self._graph_modules is None else self._graph_modules.changed()

    @torch.no_grad()
    def _forward(self) -> Tensor:
        with self.cache.writing_at(self.positions_B):
            out = self.module.model(
                self.tokens_B1, None, self.positions_B[:, None], self.cache, use_cache=True
            )
        with timed("head"):
            return self.module.get_output_embeddings()(out.last_hidden_state[:, -1])

    def _capture(self) -> None:
        """Capture a step.

        A step that runs again writes the same values at the same positions, so the steps before the
        capture change nothing.
        """
        self._graph = None
        self._graph_logits = torch.empty(0)  # This frees the memory of the old graph.
        device = self.positions_B.device
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(CAPTURE_STEPS):
                    self._forward()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._forward()
        self._graph, self._graph_logits = graph, logits


def on_host(tokens: Iterator[Tensor]) -> Iterator[list[int]]:
    """Yield the tokens int64 [B] of a stream as lists.

    The first token is read at once. After it, the next step is begun before a token is read, so
    that the device does not wait for the host. A consumer that stops early has run one step more
    than it read.
    """
    pending: tuple[Tensor, Any] | None = None
    for i, drawn in enumerate(tokens):
        if pending is not None:
            yield _read(*pending)
        if i == 0:
            yield drawn.tolist()
        elif drawn.is_cuda:
            copy = torch.empty_like(drawn, device="cpu", pin_memory=True)
            copy.copy_(drawn, non_blocking=True)
            pending = copy, torch.cuda.current_stream(drawn.device).record_event()
        else:
            pending = drawn, None
    if pending is not None:
        yield _read(*pending)


def _read(copy: Tensor, copied: Any) -> list[int]:
    if copied is not None:
        copied.synchronize()
    return copy.tolist()


def sample(
    logits_BV: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Return the best tokens, or a draw from softmax(logits / temperature), as int64 [B].

    A draw is the token with the largest quotient of its probability and an exponential variate.
    torch.multinomial may wait for the device; this does not.
    """
    if not temperature:
        return logits_BV.argmax(-1)
    probabilities = (logits_BV.float() / temperature).softmax(-1)
    variates = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / variates).argmax(-1)
