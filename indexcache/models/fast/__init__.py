"""Run a model on the fast path: acceleration, cache, prefill, decoding."""
