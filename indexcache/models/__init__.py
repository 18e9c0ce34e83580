"""transformers models: families, the seam that switches patterns, loading, losses, prefix reuse."""
