"""Compute how far an indexer is from the attention it learns, and its gradients."""
