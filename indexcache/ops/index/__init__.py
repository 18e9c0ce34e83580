"""Compute scores of the lightning indexer and select the top k."""
