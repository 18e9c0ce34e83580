"""Search for a pattern: the paper's greedy algorithm, its objective, and the run around it."""
