"""Searching for a pattern: the paper's greedy algorithm, the loss it minimises, and the run around it."""
