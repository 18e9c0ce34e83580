"""Compute how far an indexer is from the attention that it learns, with gradients."""
