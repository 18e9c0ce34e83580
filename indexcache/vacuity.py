"""Say what the roles of a pattern can lose on a text, and refuse text on which they lose nothing.

A layer differs from a full one only where its choice is smaller than the context: an S layer at
queries with more than k tokens of context, an R layer at queries with more than its pool of c k.
Anywhere else all roles compute the same, and a verdict says nothing. Context counts within the
query's own document: joined documents have nothing to do with each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from indexcache.pattern import Pattern

MIN_SHARE_BEYOND = 0.75
"""Min share of the positions of a sequence that lie beyond k, so it has at least 4 k tokens."""

MIN_OWN_BEYOND = 0.5
"""Min share of the queries, in every domain, with more context in their own document than k, and
than the pool where a pattern has R layers. Between this and the default, a pool of a quarter of the
context, figures flatter R, so the pool's share is printed beside them."""

DEFAULT_LENGTH = 1024
"""Least number of tokens of a sequence where no length is given."""


class Sequences(Protocol):
    """What is asked of a batch of `indexcache.data`."""

    @property
    def ids(self) -> Any:
        """Token ids, int64 [B, T]."""

    @property
    def domain(self) -> str:
        """The kind of text."""

    @property
    def own_context(self) -> Any:
        """Number of tokens of the own document up to and including each token, int64 [B, T]."""

    @property
    def plain(self) -> bool:
        """Whether the losses of all tokens count."""

    @property
    def counted(self) -> Any:
        """Whether the loss of each token counts, bool [B, T]."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of their context that queries can choose from, within their own documents.

    Attributes:
        size: number of tokens that they choose, k, or may choose from, the pool.
        beyond: share of the queries whose context exceeds the size.
        mean: the effective sparsity: mean over the queries of min(size, context) / context.
        longest: the size over the longest context, at most 1.
    """

    size: int
    beyond: float
    mean: float
    longest: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{_percent(self.mean)} of a query's context on average, {_percent(self.longest)} of "
            f"the longest; {_percent(self.beyond)} of the queries see more"
        )


def pool_of(pattern: Pattern, topk: int) -> int | None:
    """Return the number of tokens in the pool of a pattern's R layers; None without R layers.

    It is None too where the pool is a share of what a query sees: such layers lose something
    wherever shared ones do, at queries with more than k tokens.
    """
    return pattern.pool_factor * topk if "R" in pattern.roles and pattern.pool_factor else None


def choosing_size(patterns: Sequence[Pattern], topk: int) -> int | None:
    """Return up to how many tokens of context the patterns are all the same.

    It is k if one has S layers, else the smallest pool; None if all of them are full everywhere.
    """
    sizes = [topk for p in patterns if "S" in p.roles or p.pool_share is not None]
    return min([*sizes, *pools_of(patterns, topk)], default=None)


def pools_of(patterns: Iterable[Pattern], topk: int) -> dict[int, Pattern]:
    """Return the pools of some patterns in ascending order, each with a pattern that has it."""
    pools: dict[int, Pattern] = {}
    for pattern in patterns:
        pool = pool_of(pattern, topk)
        if pool is not None:
            pools.setdefault(pool, pattern)
    return dict(sorted(pools.items()))


# -- by length, before anything is loaded ----------------------------------------------------------


def default_length(topk: int, context: int, patterns: Iterable[Pattern] = ()) -> int:
    """Return the default number of tokens per sequence: 4 k, min 1024, max the model's context.

    With R layers among the patterns it is 4 pools where that is more.
    """
    largest = max([topk, *pools_of(patterns, topk)])
    return min(max(4 * largest, DEFAULT_LENGTH), context)


def check_length(
    length: int | None, topk: int, context: int, patterns: Sequence[Pattern] = ()
) -> int:
    """Return the length of sequences for a model and the patterns; None becomes the default.

    Raises:
        ValueError: the length exceeds the model's context; or `check_context` or `check_pools`
            refuses it, or every length up to the context.
    """
    check_possible(topk, context, patterns)
    length = default_length(topk, context, patterns) if length is None else length
    if length > context:
        raise ValueError(
            f"Sequences of {length} tokens are longer than the model's context of {context}."
        )
    check_context(length, topk)
    check_pools(length, topk, patterns)
    return length


def check_possible(topk: int, context: int, patterns: Iterable[Pattern] = ()) -> None:
    """Raise ValueError where the model's context is too short for any text to say something."""
    if _by_length(context, topk) < MIN_SHARE_BEYOND:
        raise ValueError(
            f"The model's context of {context} tokens is too short for its index_topk = {topk}: on "
            f"less than {4 * topk} tokens nearly every pattern is the same, so nothing can be "
            "measured or saved with this model."
        )
    for pool, pattern in pools_of(patterns, topk).items():
        if _by_length(context, pool) < MIN_OWN_BEYOND:
            most = context // (2 * topk)
            raise ValueError(
                f"The model's context of {context} tokens is too short for the pattern {pattern}: "
                f"its R layers choose from a pool of {pool} tokens, so on less than {2 * pool} "
                f"tokens they do what full layers do; take a pool factor of at most {most}."
            )


def lengths_needed(topk: int, context: int, pool_factor: int = 8) -> str:
    """Say how long the sequences of a model must be for something to be lost."""
    try:
        check_possible(topk, context)
    except ValueError as error:
        return str(error)
    pool = pool_factor * topk
    least = f"sequences of at least {4 * topk} tokens"
    if 2 * pool > context:
        return f"{least}; R layers need a pool of at most {context // 2} tokens"
    return f"{least}, {2 * pool} for R layers with a pool of {pool_factor} k"


def check_context(length: int, topk: int) -> float:
    """Return the share of queries that see more than k tokens, and so have something to select.

    Raises:
        ValueError: the share is below three quarters. With at most k tokens of context every
            pattern computes the same, so the result would say nothing.
    """
    share = _by_length(length, topk)
    if share < MIN_SHARE_BEYOND:
        raise ValueError(
            f"Sequences of {length} tokens are too short for this model: with index_topk = {topk} "
            f"only {share:.0%} of the queries have more than {topk} tokens to select from, and "
            f"for the others every pattern is the same; use at least {4 * topk} tokens, so that "
            f"{MIN_SHARE_BEYOND:.0%} have."
        )
    return share


def check_pools(length: int, topk: int, patterns: Iterable[Pattern]) -> None:
    """Refuse sequences that are too short for the pool of a pattern's R layers.

    Raises:
        ValueError: less than half of the queries see more than the pool. For the others R layers
            choose from everything, as full layers do.
    """
    for pool, pattern in pools_of(patterns, topk).items():
        share = _by_length(length, pool)
        if share < MIN_OWN_BEYOND:
            raise ValueError(
                f"Sequences of {length} tokens are too short for the pattern {pattern}: its R "
                f"layers choose from a pool of {pool} tokens, only {share:.0%} of the queries have "
                "more than that, and for the others R layers do what full layers do; use at least "
                f"{2 * pool} tokens, better {4 * pool} or more, or a smaller pool factor."
            )


def _by_length(length: int, size: int) -> float:
    """Return the share of the positions of a sequence that lie beyond `size`."""
    return max(length - size, 0) / length if length > 0 else 0.0


# -- by document, once there are batches -----------------------------------------------------------


def check_batches(
    batches: Sequence[Sequences], topk: int, patterns: Iterable[Pattern] = ()
) -> dict[int, Share]:
    """Return the share of the context that k and each pool of the patterns are on these batches.

    Returns:
        {k: its share, pool: its share, ..}, pools in ascending order.

    Raises:
        ValueError: no batch; a sequence that `check_context` or `check_pools` refuses; or in a
            domain less than half of the queries see more than k, or than a pool, of their own
            document.
    """
    patterns = tuple(patterns)
    if not batches:
        raise ValueError("There is no text to measure on: the list of batches is empty.")
    for length in sorted({int(b.ids.shape[1]) for b in batches}):
        check_context(length, topk)
        check_pools(length, topk, patterns)
    shares = {topk: share_of(batches, topk)}
    pools = pools_of(patterns, topk)
    for size in (topk, *pools):
        for domain in sorted({b.domain for b in batches}):
            share = share_of([b for b in batches if b.domain == domain], size)
            if share.beyond < MIN_OWN_BEYOND:
                _refuse_documents(domain, share, pools.get(size))
        shares[size] = share_of(batches, size)
    return shares


def _refuse_documents(domain: str, share: Share, pattern: Pattern | None) -> None:
    size = share.size
    what, same = f"k = {size}", "every pattern is the same"
    if pattern is not None:
        what, same = f"the pool of {size}", f"R layers of {pattern} do what full layers do"
    raise ValueError(
        f"The documents of the domain {domain!r} are too short: only {share.beyond:.0%} of the "
        f"queries see more than {what} tokens of their own document, and for the others {same}; "
        f"joining documents adds nothing to select from, so leave out those of less than "
        f"{2 * size} tokens or give longer ones, so that {MIN_OWN_BEYOND:.0%} see more."
    )


def share_of(batches: Iterable[Sequences], size: int) -> Share:
    """Measure the share of the context that `size` tokens are, over all queries of the batches.

    Where only some tokens count, these are the queries that predict them.
    """
    queries = beyond = longest = 0
    read = 0.0
    for batch in batches:
        own = batch.own_context
        if not batch.plain:
            own = own[:, :-1][batch.counted[:, 1:]]
            if not own.numel():
                continue
        queries += own.numel()
        beyond += int((own > size).sum())
        longest = max(longest, int(own.max()))
        read += float((own.clamp(max=size).double() / own).sum())
    if not queries:
        return Share(size=size, beyond=0.0, mean=1.0, longest=1.0)
    return Share(
        size=size, beyond=beyond / queries, mean=read / queries, longest=min(size / longest, 1.0)
    )


def blindness(loss: float, blind: float) -> str | None:
    """Say that a loss is no better than a blind guess; None where it is better.

    Args:
        loss: the model's loss on the text, nats per token.
        blind: `blind_loss` of the model.
    """
    if loss < blind * (1 - 1e-5):  # A head of zeros gives it up to rounding.
        return None
    return (
        f"The model's own loss on this text is {loss:.2f} nats, no better than a blind guess among "
        f"all tokens ({blind:.2f}): its weights are random or were read wrongly, or its tokenizer "
        "is another's, so no difference between patterns means anything."
    )


def sentence(shares: Mapping[int, Share]) -> str:
    """Say what part of the context k and the pools are; k is the first of the shares."""
    topk, *pools = shares
    parts = [f"k = {topk} is {shares[topk]}"]
    parts += [f"the pool of {pool} is {shares[pool]}" for pool in pools]
    return "; ".join(parts)


def _percent(share: float) -> str:
    """Format a share with three digits: 0.03125 is 3.12%."""
    return f"{100 * share:.3g}%"
