"""Write the tables of README and docs from the result files they quote.

A page holds a table between `<!-- table NAME -->` and `<!-- end -->`. Run

    python -m docs.tables

after a result file has changed; the tests fail where a page and its result files disagree. One
file here holds the tables of one subject.
"""

from __future__ import annotations

# Each of these registers its tables when it is imported.
from docs.tables import intervals, large, search, smollm2, speed, tiny, training  # noqa: F401
from docs.tables.registry import MARKED, RESULTS, ROOT, TABLES, filled, markdown, pages

__all__ = ["MARKED", "RESULTS", "ROOT", "TABLES", "filled", "markdown", "pages"]
