"""Operations: the plain-torch definitions in `reference`, and what is dispatched to them."""

from indexcache.ops.reference import index_scores

__all__ = ["index_scores"]
