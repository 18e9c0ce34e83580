"""Evidence on held-out text."""

from indexcache.evals.evaluate import evaluate_pattern

__all__ = ["evaluate_pattern"]
