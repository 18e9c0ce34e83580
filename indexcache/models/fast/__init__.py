"""The fast path: an accelerated model, its cache, prefill, decoding."""
