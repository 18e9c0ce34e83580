"""What a model does inside: overlap of selections."""

from indexcache.analysis.overlap import measure_overlap

__all__ = ["measure_overlap"]
