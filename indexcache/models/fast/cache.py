"""Cache latents and indexer keys on the fast path.

Each layer has one tensor of latents, and indexer keys if it runs its indexer. Stock caches grow by
concatenation, which copies all cached tokens at every chunk, and they store the latent apart from
its rotary key, although attention reads both as one row. Here both lie in one preallocated tensor
and are written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from indexcache.models.family import AnyModel, decoder_layers, module_of
from indexcache.models.patch import state_of

GROWTH = 1.5
"""A cache without a capacity grows by at least this factor."""
BLOCK = 256
"""A cache without a capacity has room for a multiple of this number of tokens."""
HALFWAY = (
    "The layers of this cache hold different numbers of tokens, as after a pass that failed "
    "halfway; start a new one."
)


class FastLayer(CacheLayerMixin):
    """One layer of a `FastCache`.

    Tensors are allocated at the first write, with the dtype and device of the values. B is the
    batch, C the capacity, c the width of a latent, r that of its rotary key, D that of an indexer
    key.

    Attributes:
        latents: [B, C, c + r], the latent and the rotary key of each token.
        indexer_keys: [B, C, D], e4m3 or a float dtype; None if the layer was always shared.
        indexer_scales: fp32 [B, C], only beside e4m3 keys.
        length: number of tokens that have latents.
        indexed: number of tokens that have indexer keys.
        width: c, the width of the latent without the rotary key.
        positions: int64 [B] on the device, where each sequence writes its token, while a `Decoder`
            runs a step; otherwise None.
        ran_indexer: whether the indexer ran in the last step of a `Decoder`.
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
        self.width = 0
        self.length = self.indexed = 0
        self.positions: Tensor | None = None
        self.ran_indexer = False

    def store(self, latent_BSc: Tensor, rotary_BSr: Tensor) -> Tensor:
        """Append tokens, and return the latents of all tokens [B, T, c + r] as a view.

        In a step of a `Decoder`, T is the capacity.

        Raises:
            ValueError: another batch size, width or dtype than before, or the cache is full.
        """
        batch, new, width = latent_BSc.shape
        start, end = self.length, self.length + new
        latents = self.room(batch, new, width, rotary_BSr.shape[-1], latent_BSc)
        if self.positions is not None:
            _scatter(latents[..., : self.width], self.positions, latent_BSc)
            _scatter(latents[..., self.width :], self.positions, rotary_BSr)
            return latents
        latents[:, start:end, : self.width] = latent_BSc
        latents[:, start:end, self.width :] = rotary_BSr
        self.length = end
        return latents[:, :end]

    def room(self, batch: int, new: int, width: int, rotary: int, like: Tensor) -> Tensor:
        """Return the latents [B, >= T, c + r] with room for new tokens, which the caller writes.

        In a step of a `Decoder` that is all; otherwise the caller counts them.

        Raises:
            ValueError: as `store`.
        """
        if batch != self.batch_size:
            raise ValueError(
                f"This cache is for a batch of {self.batch_size}, got {batch} sequences; make one "
                f"with batch={batch}."
            )
        self.width = width
        width += rotary
        self.latents = latents = self._allocated(self.latents, self.length + new, (width,), like)
        if latents.shape[-1] != width:
            raise ValueError(
                f"This cache holds {latents.shape[-1]} values a token, got {width}; start a new "
                "cache for this model."
            )
        if latents.dtype != like.dtype:
            raise ValueError(
                f"This cache holds {latents.dtype}, the model gives {like.dtype}; start a new "
                "cache."
            )
        self.ran_indexer = False
        return latents

    def store_index(
        self, keys_BSD: Tensor, scales_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Append the indexer keys of tokens whose latents were stored just before.

        Returns:
            The keys [B, T, D] and the scales [B, T] or None of all tokens, as views. In a step of
            a `Decoder`, T is the capacity.

        Raises:
            ValueError: earlier tokens have no keys, or have keys of another dtype.
        """
        new = keys_BSD.shape[1]
        keys = self.room_for_keys(new, keys_BSD, scales_BS)
        end = self.length if self.positions is None else self.length + new
        for cached, new_values in ((keys, keys_BSD), (self.indexer_scales, scales_BS)):
            if cached is None or new_values is None:
                continue
            if self.positions is not None:
                _scatter(cached, self.positions, new_values)
            else:
                cached[:, self.indexed : end] = new_values
        if self.positions is not None:
            return keys, self.indexer_scales
        self.indexed = end
        return keys[:, :end], None if self.indexer_scales is None else self.indexer_scales[:, :end]

    def room_for_keys(self, new: int, like: Tensor, like_scales: Tensor | None) -> Tensor:
        """Return the indexer keys [B, >= T, D] with room for new tokens, which the caller writes.

        The scales have room then too. In a step of a `Decoder` that is all.

        Raises:
            ValueError: as `store_index`.
        """
        end = self.length if self.positions is None else self.length + new
        if self.indexed != end - new:
            raise ValueError(
                "A layer runs its indexer now, but it was shared while this cache was filled: the "
                f"indexer keys of {end - new - self.indexed} cached tokens are missing; start a "
                "new cache after switching the pattern."
            )
        self.indexer_keys = keys = self._allocated(self.indexer_keys, end, (like.shape[-1],), like)
        if keys.dtype != like.dtype:
            raise ValueError(
                f"This cache holds indexer keys in {keys.dtype}, got {like.dtype}; start a new "
                "one for another index_dtype."
            )
        if like_scales is not None:
            self.indexer_scales = self._allocated(self.indexer_scales, end, (), like_scales)
        self.ran_indexer = self.positions is not None
        return keys

    def advance(self) -> None:
        """Count the token that each sequence wrote in a step of a `Decoder`."""
        self.length += 1
        self.indexed += int(self.ran_indexer)

    def _allocated(
        self, cached: Tensor | None, tokens: int, width: tuple[int, ...], like: Tensor
    ) -> Tensor:
        """Return `cached` if it has room for `tokens`, else a larger copy of it."""
        self.check_capacity(tokens)
        if cached is not None and cached.shape[1] >= tokens:
            return cached
        size = self.capacity
        if size is None:
            size = max(tokens, int(GROWTH * (0 if cached is None else cached.shape[1])))
            size = -(-size // BLOCK) * BLOCK
        with torch.inference_mode(False):  # Tensors of that mode cannot be written to after it.
            larger = like.new_zeros(self.batch_size, size, *width)
        if cached is not None:
            larger[:, : cached.shape[1]] = cached
        return larger

    def check_capacity(self, tokens: int) -> None:
        """Raise ValueError if the cache was made for fewer than `tokens` tokens."""
        if self.capacity is not None and tokens > self.capacity:
            raise ValueError(
                f"The cache is full: it was made for {self.capacity} tokens, {tokens} are needed."
            )

    # The methods below are the interface that transformers requires of a cache layer.

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
        """Return the latents as transformers shows them, [B, 1, T, c]."""
        return None if self.latents is None else self.latents[:, None, : self.length, : self.width]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Return the rotary keys as transformers shows them, [B, 1, T, r]."""
        return None if self.latents is None else self.latents[:, None, : self.length, self.width :]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: `store` allocates."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append latents [B, 1, S, c] and rotary keys [B, 1, S, r]; return those of all tokens.

        Raises:
            ValueError: the keys have several heads, so they are no latents.
        """
        if key_states.shape[1] != 1:
            raise ValueError(
                "A FastCache holds latents; stock transformers of this version caches expanded "
                "keys: use accelerate(model)."
            )
        self.store(key_states[:, 0], value_states[:, 0])
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Append indexer keys [B, S, D]; return those of all tokens, [B, T, D]."""
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
        self._change_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_rows(lambda x: x.repeat_interleave(repeats, dim=0))
        self.batch_size *= repeats

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_rows(lambda x: x[indices.to(x.device)])
        self.batch_size = len(indices)

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("latents", "indexer_keys", "indexer_scales"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(_fp8_as_bytes(tensor)).view(tensor.dtype))


class _Owner(ref):
    """A weak reference to the model of a cache. Copies of the cache share it."""

    def __copy__(self) -> _Owner:
        return self

    def __deepcopy__(self, _memo: Any) -> _Owner:
        return self

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise ValueError(
            "A FastCache belongs to its model in this process and cannot be pickled or saved; use "
            "a DynamicCache made with config=model.config, or fill a new one."
        )


class FastCache(Cache):
    """The latents of all layers, and the indexer keys of the layers that run their indexer.

    It goes wherever transformers takes a cache, on an accelerated model. It refuses to be continued
    under a pattern that needs indexer keys it does not hold. docs/fast-path.md says how much
    memory it takes.

    Args:
        model: an accelerated model; `accelerate` says in which dtype indexer keys are cached.
        capacity: max number of tokens of a sequence, allocated at the first write. None grows as
            needed; a `Decoder` needs a capacity.
        batch: number of sequences.

    Attributes:
        padded: whether a sequence has padding, which an attention mask hid.

    Raises:
        ValueError: the model is not accelerated, or the capacity or the batch is below 1.
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
        self._model = _Owner(module_of(model))
        self.capacity = capacity
        self.padded = False
        # Number of tokens that each sequence lacks to the longest; None if all are equally long.
        self._shortfalls: list[int] | None = None

    @property
    def lengths(self) -> list[int]:
        """Return the number of cached tokens of each sequence."""
        longest = self.layers[0].length
        return [longest - n for n in self._shortfalls or [0] * self.layers[0].batch_size]

    @property
    def pattern(self) -> str | None:
        """Return which layers have indexer keys of all tokens: F for those, S for the others.

        Both F and R layers have them. None while the cache is empty.
        """
        if not self.layers[0].length:
            return None
        return "".join("F" if layer.indexed == layer.length else "S" for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Return the number of bytes allocated."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self.layers
            for tensor in (layer.latents, layer.indexer_keys, layer.indexer_scales)
            if tensor is not None
        )

    def set_lengths(self, lengths: list[int]) -> None:
        """Declare that row b holds only its first lengths[b] tokens.

        A `Decoder` overwrites the values after them.
        """
        longest = self.layers[0].length
        assert max(lengths) == longest and len(lengths) == self.layers[0].batch_size
        self._shortfalls = [longest - n for n in lengths] if min(lengths) < longest else None

    def check_model(self, model: AnyModel) -> None:
        """Raise ValueError if this cache was made for another model."""
        if self._model() is not module_of(model):
            raise ValueError(
                "This FastCache was made for another model; make one with FastCache(model)."
            )

    def check_room(self, tokens: int) -> None:
        """Check, before a forward pass of all sequences, that `tokens` more can be written.

        Raises:
            ValueError: the cache has too small a capacity, its sequences differ in length, or an
                earlier pass failed after it had filled some layers.
        """
        if self.layers[0].positions is not None:
            return
        if self._shortfalls is not None:
            raise ValueError(
                "The sequences of this cache have different lengths: continue it with a Decoder, "
                "or start a new one."
            )
        if len({layer.length for layer in self.layers}) > 1:
            raise ValueError(HALFWAY)
        self.layers[0].check_capacity(self.layers[0].length + tokens)

    @contextmanager
    def writing_at(self, positions_B: Tensor) -> Iterator[None]:
        """Let each sequence write one token at its position inside the context.

        The tokens are not counted: `advance` does that.

        Args:
            positions_B: int64 [B], on the device.
        """
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
        self.padded, self._shortfalls = False, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_shortfalls(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_shortfalls(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._shortfalls is not None:
            self._shortfalls = [n for n in self._shortfalls for _ in range(repeats)]

    def _select_shortfalls(self, rows: Tensor) -> None:
        if self._shortfalls is not None:
            self._shortfalls = [self._shortfalls[i] for i in rows.tolist()]


def _scatter(cached_BT: Tensor, positions_B: Tensor, new_BS: Tensor) -> None:
    """Set cached[b, positions[b]] = new[b, 0] without reading the positions on the host."""
    cached, new = _fp8_as_bytes(cached_BT), _fp8_as_bytes(new_BS)
    index = positions_B.view(-1, *[1] * (new.dim() - 1)).expand_as(new)
    cached.scatter_(1, index, new.to(cached.dtype))


def _fp8_as_bytes(x: Tensor) -> Tensor:
    """Return a view of fp8 values as bytes, which every operation of torch can move."""
    return x.view(torch.uint8) if x.element_size() == 1 else x
