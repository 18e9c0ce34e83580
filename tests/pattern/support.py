"""Draw patterns, and set how many are drawn."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from indexcache.pattern import Pattern

QUICK = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

patterns = st.builds(
    lambda rest, factor: Pattern("F" + rest, factor if "R" in rest else None),
    st.text("FRS", max_size=40),
    st.one_of(st.none(), st.integers(1, 999_999)),
)
shared_patterns = st.builds(lambda rest: Pattern("F" + rest), st.text("FS", max_size=40))
