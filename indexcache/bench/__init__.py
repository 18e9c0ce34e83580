"""Benchmarks: prefill and decoding timed part by part, floors beside them, the cost of a pattern."""

# Tokens of a benchmark's prefill that go through the model at once. `models.fast.prefill` takes fewer
# by default, because it must run where memory is short.
CHUNK = 16384
