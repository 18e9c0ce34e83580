"""Scores of the lightning indexer and the selection of the top k."""
