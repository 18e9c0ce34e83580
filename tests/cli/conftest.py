"""A text for the tests of the command line."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """80 documents, 40 in each of two domains."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    letters = [chr(97 + (i * 7 + j * j * (i + 3) + j) % 26) for i in range(80) for j in range(80)]
    rows = [
        {"text": f"{i} " + "".join(letters[80 * i : 80 * i + 80]), "domain": "ab"[i % 2]}
        for i in range(80)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path
