"""Searching for a pattern: the paper's greedy algorithm and the objective it minimises."""

from indexcache.search.greedy import Step, greedy, greedy_stages
from indexcache.search.run import SearchSettings, search_pattern

__all__ = ["SearchSettings", "Step", "greedy", "greedy_stages", "search_pattern"]
