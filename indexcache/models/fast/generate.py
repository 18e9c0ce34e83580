"""Generate text from a prompt of any length, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from tokenizers.decoders import DecodeStream

from indexcache.models.family import AnyModel, DsaModule, input_device, module_of
from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.decode import Decoder, on_host
from indexcache.models.fast.prefill import CHUNK, prefill
from indexcache.models.patch import state_of


def new_tokens(
    model: AnyModel,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterable[int]:
    """Continue the prompt `ids` until an end token of the model, which is not returned.

    An accelerated model decodes as in `stream_tokens`; any other runs transformers' `generate`.
    Arguments and errors are those of `stream_tokens`.
    """
    module, ends = module_of(model), end_tokens(model)
    if state_of(module).accelerated:
        return stream_tokens(
            module,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            ends=ends,
        )
    _check_request(module, ids, max_new_tokens, temperature)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    device = input_device(module.get_input_embeddings())
    prompt = torch.tensor([list(ids)], device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        output = module.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            **sampling,
        )
    tokens = output[0, len(ids) :].tolist()
    return tokens[:-1] if tokens[-1] in ends else tokens


@torch.no_grad()
def stream_tokens(
    model: AnyModel,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    chunk: int = CHUNK,
    ends: Iterable[int] = (),
) -> Iterator[int]:
    """Yield tokens after the prompt `ids`, until one of `ends` comes, which is not yielded.

    Args:
        model: an accelerated model; the pattern in force applies.
        ids: token ids of the prompt.
        max_new_tokens: max number of tokens to yield.
        temperature, seed: see `Decoder.stream`.
        chunk: tokens of the prompt in a forward pass.
        ends: tokens that end the text.

    Raises:
        ValueError: the prompt is empty, `max_new_tokens` is below 1, the temperature is negative,
            or the model's context is too short for both.
    """
    _check_request(module_of(model), ids, max_new_tokens, temperature)
    cache = FastCache(model, len(ids) + max_new_tokens)
    logits = prefill(
        model, torch.tensor([list(ids)]), cache, chunk=chunk, progress=len(ids) > chunk
    )
    drawn = Decoder(model, cache).stream(logits, temperature=temperature, seed=seed)
    ends = set(ends)
    for (token,) in on_host(islice(drawn, max_new_tokens)):
        if token in ends:
            return
        yield token


def _check_request(
    module: DsaModule, ids: Sequence[int], max_new_tokens: int, temperature: float
) -> None:
    context = int(module.config.max_position_embeddings)
    size = module.get_input_embeddings().weight.shape[0]
    check_prompt(ids, max_new_tokens, temperature, context=context, vocabulary=size)


def check_prompt(
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    *,
    context: int,
    vocabulary: int,
) -> None:
    """Raise ValueError for a generation that a model cannot do; see `stream_tokens`.

    Args:
        context: the largest number of tokens of a sequence.
        vocabulary: number of tokens that the model knows.
    """
    if not ids:
        raise ValueError("The prompt is empty; generation needs at least one token.")
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise ValueError(
            f"The prompt has a token {max(ids)}, but the model has {vocabulary} tokens: the "
            "tokenizer belongs to another model."
        )
    if max_new_tokens < 1:
        raise ValueError(f"At least one new token is generated, not {max_new_tokens}.")
    if not temperature >= 0:
        raise ValueError(f"The temperature must not be negative, got {temperature}.")
    if len(ids) + max_new_tokens > context:
        raise ValueError(
            f"The prompt of {len(ids)} tokens and {max_new_tokens} new ones are more than the "
            f"model's maximum of {context}; shorten the prompt or ask for fewer new tokens."
        )


def end_tokens(model: AnyModel) -> set[int]:
    """Return the ids after which a text ends, according to the model's configs."""
    module = module_of(model)
    ids: set[int] = set()
    for config in (module.config, getattr(module, "generation_config", None)):
        ends = getattr(config, "eos_token_id", None)
        ids |= {ends} if isinstance(ends, int) else set(ends or ())
    return ids


def stream_text(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of `tokens` as soon as no later token can change it.

    A token that ends within a character waits for the next one. A tokenizer without a backend of
    the `tokenizers` library gives its text as one piece at the end.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield tokenizer.decode(list(tokens))
        return
    decoder = DecodeStream(skip_special_tokens=False)
    ids: list[int] = []
    characters = 0
    for token in tokens:
        ids.append(token)
        if text := decoder.step(backend, token):
            characters += len(text)
            yield text
    if incomplete := backend.decode(ids, skip_special_tokens=False)[characters:]:
        yield incomplete
