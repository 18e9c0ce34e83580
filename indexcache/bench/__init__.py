"""Measure prefill and decoding part by part, beside their floors, and predict their cost."""

# Tokens of a benchmark's prefill that go through the model at once. `models.fast.prefill` takes
# fewer by default, because it must run where memory is short.
CHUNK = 16384
