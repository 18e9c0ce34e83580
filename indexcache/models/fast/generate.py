"""Text from a prompt of any length, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.decode import Decoder, on_host
from indexcache.models.fast.prefill import CHUNK, prefill


@torch.no_grad()
def stream_tokens(
    model: nn.Module,
    ids: Sequence[int],
    *,
    most: int,
    temperature: float = 0.0,
    seed: int = 0,
    chunk: int = CHUNK,
    ends: Iterable[int] = (),
) -> Iterator[int]:
    """Up to `most` tokens after the prompt `ids`, one by one, until one of `ends` comes (which is not given out).

    Args:
        model: accelerated; the pattern in force is used.
        temperature: 0 takes the best token.

    Raises:
        ValueError: an empty prompt, or more tokens than the model's maximum.
    """
    context = int(model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
    if not ids:
        raise ValueError("The prompt is empty; generation needs at least one token.")
    if most < 1:
        raise ValueError(f"At least one new token is generated, not {most}.")
    if len(ids) + most > context:
        raise ValueError(
            f"The prompt of {len(ids)} tokens and {most} new ones are more than the model's maximum of {context}; "
            "shorten the prompt or give fewer with --max-new-tokens."
        )
    cache = FastCache(model, len(ids) + most)
    logits = prefill(
        model, torch.tensor([list(ids)]), cache, chunk=chunk, progress=len(ids) > chunk
    )
    decoder, stop = Decoder(model, cache), set(ends)
    for (token,) in on_host(
        islice(decoder.stream(logits, temperature=temperature, seed=seed), most)
    ):
        if token in stop:
            return
        yield token


def end_tokens(model: Any) -> set[int]:
    """The ids after which the model's configs say that a text ends."""
    found: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        ends = getattr(config, "eos_token_id", None)
        found |= {ends} if isinstance(ends, int) else set(ends or ())
    return found


def pieces(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as soon as it is settled: what ends in half a character waits for the rest."""
    held: list[int] = []
    known = 0  # tokens at the start of `held` whose text was given out; they stay, because what follows may depend on them
    for token in tokens:
        held.append(token)
        before, text = tokenizer.decode(held[:known]), tokenizer.decode(held)
        if len(text) > len(before) and not text.endswith("\ufffd"):
            yield text[len(before) :]
            held, known = held[known:], len(held) - known
    if rest := tokenizer.decode(held)[len(tokenizer.decode(held[:known])) :]:
        yield rest
