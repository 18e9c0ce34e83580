"""The cache of the fast path: one tensor of latents a layer, and indexer keys where a layer runs its indexer.

Stock caches grow by concatenation, which copies everything held at every chunk, and hold the latent apart from its rotary
key, which attention reads as one row. Here both lie in one preallocated tensor and are written in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from indexcache.models.family import AnyModel, decoder_layers, module_of
from indexcache.models.patch import state_of

GROWTH = 1.5  # of a cache without a capacity, and at least
BLOCK = 256  # tokens


class FastLayer(CacheLayerMixin):
    """One layer of a `FastCache`. Tensors are allocated at the first write, with the dtype and device of what is written.

    Attributes:
        latents: [B, C, c + r], the latent and the rotary key of each token.
        indexer_keys: [B, C, D], e4m3 or a float dtype; None where the layer was shared so far.
        indexer_scales: fp32 [B, C] beside e4m3 keys.
        length, indexed: tokens that have latents, and tokens that have indexer keys.
        positions: int64 [B] on the device while a `Decoder` runs: where each sequence writes its token.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, batch: int, capacity: int | None):
        self.batch_size, self.capacity = batch, capacity
        self.latents: Tensor | None = None
        self.indexer_keys: Tensor | None = None
        self.indexer_scales: Tensor | None = None
        self.width = 0  # of the latent without the rotary key
        self.length = self.indexed = 0
        self.positions: Tensor | None = None
        self.ran_indexer = False  # in the last step of a Decoder

    def store(self, latent_BSc: Tensor, rotary_BSr: Tensor) -> Tensor:
        """Append, and return the latents of all tokens [B, T, c + r], a view; in decoding, of the whole capacity."""
        batch, new, self.width = latent_BSc.shape
        if batch != self.batch_size:
            raise ValueError(
                f"This cache is for a batch of {self.batch_size}, got {batch} sequences; make one with batch={batch}."
            )
        start, end = self.length, self.length + new
        width = self.width + rotary_BSr.shape[-1]
        self.latents = latents = self._room(self.latents, end, (width,), latent_BSc)
        if latents.shape[-1] != width:
            raise ValueError(
                f"This cache holds {latents.shape[-1]} values a token, got {width}; start a new cache for this model."
            )
        self.ran_indexer = False
        if self.positions is not None:
            _scatter(latents[..., : self.width], self.positions, latent_BSc)
            _scatter(latents[..., self.width :], self.positions, rotary_BSr)
            return latents
        latents[:, start:end, : self.width] = latent_BSc
        latents[:, start:end, self.width :] = rotary_BSr
        self.length = end
        return latents[:, :end]

    def store_index(
        self, keys_BSD: Tensor, scales_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Append indexer keys, after `store` of the same tokens; the keys and scales of all tokens, as views.

        Raises:
            ValueError: tokens before these have no keys, or keys of another dtype.
        """
        new = keys_BSD.shape[1]
        end = self.length if self.positions is None else self.length + new
        if self.indexed != end - new:
            raise ValueError(
                f"A layer runs its indexer now, but it was shared while this cache was filled: the indexer keys of "
                f"{end - new - self.indexed} cached tokens are missing; start a new cache after switching the pattern."
            )
        self.indexer_keys = keys = self._room(
            self.indexer_keys, end, (keys_BSD.shape[-1],), keys_BSD
        )
        if keys.dtype != keys_BSD.dtype:
            raise ValueError(
                f"This cache holds indexer keys in {keys.dtype}, got {keys_BSD.dtype}; start a new one for another index_dtype."
            )
        if scales_BS is not None:
            self.indexer_scales = self._room(self.indexer_scales, end, (), scales_BS)
        for held, given in ((keys, keys_BSD), (self.indexer_scales, scales_BS)):
            if held is None or given is None:
                continue
            if self.positions is not None:
                _scatter(held, self.positions, given)
            else:
                held[:, self.indexed : end] = given
        if self.positions is not None:
            self.ran_indexer = True
            return keys, self.indexer_scales
        self.indexed = end
        return keys[:, :end], None if self.indexer_scales is None else self.indexer_scales[:, :end]

    def advance(self) -> None:
        """Count the token that each sequence wrote in a step of a `Decoder`."""
        self.length += 1
        self.indexed += int(self.ran_indexer)

    def _room(
        self, held: Tensor | None, tokens: int, width: tuple[int, ...], like: Tensor
    ) -> Tensor:
        """`held`, or a larger copy of it, with room for `tokens`."""
        if self.capacity is not None and tokens > self.capacity:
            raise ValueError(
                f"The cache is full: it was made for {self.capacity} tokens, {tokens} are needed."
            )
        if held is not None and held.shape[1] >= tokens:
            return held
        size = self.capacity
        if size is None:
            size = max(tokens, int(GROWTH * (0 if held is None else held.shape[1])))
            size = -(-size // BLOCK) * BLOCK
        larger = torch.zeros(self.batch_size, size, *width, dtype=like.dtype, device=like.device)
        if held is not None:
            larger[:, : held.shape[1]] = held
        return larger

    # -- what transformers asks of a layer

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self.latents is not None

    @property
    def is_indexer_initialized(self) -> bool:
        return self.indexer_keys is not None

    @property
    def indexer_cumulative_length(self) -> int:
        return self.indexed

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """The latents as transformers shows them, [B, 1, T, c]."""
        return None if self.latents is None else self.latents[:, None, : self.length, : self.width]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """The rotary keys as transformers shows them, [B, 1, T, r]."""
        return None if self.latents is None else self.latents[:, None, : self.length, self.width :]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: `store` allocates."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Transformers' way in: latents [B, 1, S, c] and rotary keys [B, 1, S, r] -> those of all tokens."""
        if key_states.shape[1] != 1:
            raise ValueError(
                "A FastCache holds latents; stock transformers of this version caches expanded keys: use accelerate(model)."
            )
        self.store(key_states[:, 0], value_states[:, 0])
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Transformers' way in for indexer keys [B, S, D] -> those of all tokens."""
        return self.store_index(indexer_key_states)[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.capacity is None else self.capacity

    def reset(self) -> None:
        self.length = self.indexed = 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the tokens to remove as a negative number, got {tokens_to_remove}."
            )
        self.length = max(self.length + tokens_to_remove, 0)
        self.indexed = min(self.indexed, self.length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))
        self.batch_size *= repeats

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda x: x[indices.to(x.device)])
        self.batch_size = len(indices)

    def _rows(self, change: Any) -> None:
        for name in ("latents", "indexer_keys", "indexer_scales"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, change(_movable(held)).view(held.dtype))


class FastCache(Cache):
    """Latents of all layers, and indexer keys of those that run their indexer in the pattern under which it is filled.

    It goes wherever transformers takes a cache, on an accelerated model. It refuses to be continued under a pattern
    that needs indexer keys it does not hold.

    Args:
        model: an accelerated model; `accelerate` says how indexer keys are kept.
        capacity: most tokens of a sequence, allocated at the first write; None grows as needed (a `Decoder` wants a capacity).
        batch: sequences.

    Raises:
        ValueError: a model that is not accelerated, a capacity or batch below 1.
    """

    layers: list[FastLayer]  # type: ignore[assignment]

    def __init__(self, model: AnyModel, capacity: int | None = None, batch: int = 1):
        if not state_of(module_of(model)).accelerated:
            raise ValueError(
                "A FastCache is for an accelerated model: call accelerate(model) first."
            )
        if (capacity is not None and capacity < 1) or batch < 1:
            raise ValueError(
                f"A FastCache has a capacity and a batch of at least 1, got {capacity} and {batch}."
            )
        super().__init__(layers=[FastLayer(batch, capacity) for _ in decoder_layers(model)])
        self.capacity = capacity
        self.padded = False  # a sequence begins with padding
        self._behind: list[int] | None = (
            None  # how many tokens each sequence is shorter than the longest
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens held of each sequence."""
        longest = self.layers[0].length
        return [longest - n for n in self._behind or [0] * self.layers[0].batch_size]

    @property
    def pattern(self) -> str | None:
        """F for each layer whose indexer keys are all held (the layer was F or R), S for the others; None while empty."""
        if not self.layers[0].length:
            return None
        return "".join("F" if layer.indexed == layer.length else "S" for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        held = (
            t
            for layer in self.layers
            for t in (layer.latents, layer.indexer_keys, layer.indexer_scales)
            if t is not None
        )
        return sum(t.numel() * t.element_size() for t in held)

    def set_lengths(self, lengths: list[int]) -> None:
        """Say that row b holds only its first lengths[b] tokens: what lies after them is overwritten by a `Decoder`."""
        longest = self.layers[0].length
        assert max(lengths) == longest and len(lengths) == self.layers[0].batch_size
        self._behind = [longest - n for n in lengths] if min(lengths) < longest else None

    def check_room(self, tokens: int) -> None:
        """Before a forward pass of the whole batch: raises ValueError where `tokens` more do not fit, or the sequences differ in length."""
        if self.layers[0].positions is not None:
            return
        if self._behind is not None:
            raise ValueError(
                "The sequences of this cache have different lengths: continue it with a Decoder, or start a new one."
            )
        if self.capacity is not None and self.layers[0].length + tokens > self.capacity:
            raise ValueError(
                f"The cache is full: it was made for {self.capacity} tokens, {self.layers[0].length + tokens} are needed."
            )

    @contextmanager
    def at(self, positions_B: Tensor) -> Iterator[None]:
        """One token a sequence is written at `positions_B` (int64 [B], on the device); nothing is counted, see `advance`."""
        try:
            for layer in self.layers:
                layer.positions = positions_B
            yield
        finally:
            for layer in self.layers:
                layer.positions = None

    def advance(self) -> None:
        """Count the token that each sequence wrote at its position."""
        for layer in self.layers:
            layer.advance()

    def reset(self) -> None:
        super().reset()
        self.padded, self._behind = False, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._choose(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._choose(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._behind is not None:
            self._behind = [n for n in self._behind for _ in range(repeats)]

    def _choose(self, rows: Tensor) -> None:
        if self._behind is not None:
            self._behind = [self._behind[i] for i in rows.tolist()]


def _scatter(held_BT: Tensor, positions_B: Tensor, given_BS: Tensor) -> None:
    """held[b, positions[b]] = given[b, 0], without a look at the positions."""
    held, given = _movable(held_BT), _movable(given_BS)
    index = positions_B.view(-1, *[1] * (given.dim() - 1)).expand_as(given)
    held.scatter_(1, index, given.to(held.dtype))


def _movable(x: Tensor) -> Tensor:
    """Bytes in place of fp8, which few operations of torch move."""
    return x.view(torch.uint8) if x.element_size() == 1 else x
