"""vLLM: a plugin that loads and checks patterns, and a worker extension that switches them.

Nothing here imports vLLM when it is imported itself, so that the package needs no engine.
"""
