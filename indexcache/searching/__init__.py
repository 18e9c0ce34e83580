"""Searching for a pattern: the paper's greedy algorithm, the objective it minimises, the run around it, naming what it found."""
