"""Benchmarks: prefill and decoding timed part by part, floors beside the figures, cost of a pattern."""
