"""Read numbers of tokens as people write them: 8192, 60K, 1M."""

from __future__ import annotations

import re

SHORT = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)([KkM])")
"""A number with its unit, a thousand or a million."""


def number(word: str) -> int:
    """Read a number of tokens, in which K is a thousand and M a million.

    Raises:
        ValueError: the word is no whole number of tokens.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)([KkM]?)", word)
    value = (
        float(match[1]) * {"": 1, "K": 1_000, "M": 1_000_000}[match[2].upper()] if match else 0.0
    )
    if value < 1 or value != int(value):
        raise ValueError(
            f"{word!r:.80} is no number of tokens; write e.g. 8192, 60K or 1M (K is a thousand)."
        )
    return int(value)
