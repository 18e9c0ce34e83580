"""Read what vLLM says of a prompt's tokens into arrays, and compare two such answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FLOOR = 1e-6
"""Probability below which the rest of a vocabulary is not told from none: fp32 log-probabilities
add up to one no closer."""


@dataclass(frozen=True)
class PromptScores:
    """The log-probabilities of one sequence of T tokens, in nats, from its second token on.

    Attributes:
        own: those of the tokens that came, float64 [T - 1].
        top: the most likely tokens, the likeliest first, int32 [T - 1, n].
        top_scores: their log-probabilities, float64 [T - 1, n].
        given: those of the tokens that were asked for, float64 [T - 1, m]; None if none were.
    """

    own: np.ndarray
    top: np.ndarray
    top_scores: np.ndarray
    given: np.ndarray | None = None


def read_scores(
    output: Any, ids: Sequence[int], asked: np.ndarray | None = None, *, top: int = 0
) -> PromptScores:
    """Read one `RequestOutput` of vLLM whose `prompt_logprobs` are flat.

    Its lists hold, for each token but the first, the token itself and then the most likely ones.

    Args:
        output: what vLLM answered.
        ids: the tokens of the prompt.
        asked: the tokens whose log-probabilities were asked for, [T - 1, m].
        top: the number of most likely tokens that was asked for.

    Raises:
        ValueError: vLLM answered other tokens than those of the prompt, or not all that was asked.
    """
    flat, rows = output.prompt_logprobs, len(ids) - 1
    if hasattr(flat, "start_indices"):
        begin = flat.start_indices[1] if rows else 0
        tokens = np.asarray(flat.token_ids[begin:], dtype=np.int32)
        scores = np.asarray(flat.logprobs[begin:], dtype=np.float64)
    else:  # A version without flat ones; its rows begin with the token itself, too.
        firsts = [next(iter(row.items())) for row in flat[1:]]
        tokens = np.array([token for token, _ in firsts], dtype=np.int32)
        scores = np.array([entry.logprob for _, entry in firsts], dtype=np.float64)
    width = len(tokens) // max(rows, 1)
    whole = width and len(tokens) == rows * width == len(scores)
    if not whole or not np.array_equal(tokens[::width], np.asarray(ids[1:])):
        raise ValueError("vLLM gave log-probabilities of other tokens than those of the prompt.")
    if width <= top:
        raise ValueError(
            f"vLLM gave {width - 1} of the {top} most likely tokens of every position that it was "
            "asked for."
        )
    tokens, scores = tokens.reshape(rows, width), scores.reshape(rows, width)
    given = None
    if asked is not None:
        given = getattr(output, "prompt_token_id_logprobs", None)
        if given is None or given.shape != asked.shape:
            raise ValueError(
                f"vLLM gave no log-probabilities of the {asked.shape[1]} tokens a position that it "
                "was asked for."
            )
        given = np.asarray(given, dtype=np.float64)
    return PromptScores(scores[:, 0], tokens[:, 1:], scores[:, 1:], given)


def coarse_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Compute KL(p || q) over some tokens and the rest of the vocabulary as one.

    It is a lower bound of the KL over all tokens, and equal to it where the rest is one token.

    Args:
        p: log-probabilities in nats of different tokens, [T, n].
        q: those of the same tokens in another distribution, [T, n].

    Returns:
        Nats, float64 [T]. No term is below zero, so rounding cannot make a sum negative.
    """
    rest_p, rest_q = (np.maximum(1 - np.exp(x).sum(-1), FLOOR) for x in (p, q))
    ones = np.exp(p) * (p - q) - np.exp(p) + np.exp(q)
    rest = rest_p * np.log(rest_p / rest_q) - rest_p + rest_q
    return np.maximum(ones, 0).sum(-1) + np.maximum(rest, 0)
