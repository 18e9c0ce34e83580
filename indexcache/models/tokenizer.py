"""Load the tokenizer of a checkpoint, and see that it keeps the text.

A tokenizer_config.json that names another class makes some versions of transformers replace what
tokenizer.json says: a byte-level tokenizer under the name of Llama's loses every space, silently.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

log = logging.getLogger(__name__)

PROBES = (
    "The quick brown fox, 1234 times.",
    "two  spaces, then a line\n\nand another\n",
    "def f(x):\n    if x:\n\treturn [x + 1, 'y']\n",
    "Żółw, Привет мир, 你好 世界, مرحبا",
)
"""Texts that a tokenizer is tried on: words, blank lines, code, letters beyond ASCII."""


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a checkpoint, as its tokenizer.json defines it.

    Raises:
        ValueError: transformers can read none there, or reads one that loses text which
            tokenizer.json keeps.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        file = path / "tokenizer.json"
        if not file.is_file():
            _check_spaces(path, tokenizer)
            return tokenizer
        defined = Tokenizer.from_file(str(file))
        lost = _lost(tokenizer, defined)
        if not lost:
            return tokenizer
        kind = type(tokenizer).__name__
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        if _lost(tokenizer, defined):
            raise ValueError(f"it loses text that tokenizer.json keeps, e.g. in {lost[0]!r}")
    except Exception as error:  # The tokenizers library raises Exception itself.
        if isinstance(error, (MemoryError, RecursionError)):
            raise
        text = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: no tokenizer can be read there ({text:.200}).") from None
    log.warning(
        "%s: its tokenizer_config.json makes transformers read the tokenizer as %s, which loses "
        "spaces; tokenizer.json is read as it is.",
        path,
        kind,
    )
    return tokenizer


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _lost(tokenizer: Any, defined: Tokenizer) -> list[str]:
    """List the probes that `defined` gives back unchanged, and `tokenizer` does not."""
    lost = []
    for text in PROBES:
        ids, expected = _ids(tokenizer, text), defined.encode(text, add_special_tokens=False).ids
        if ids == expected:
            continue
        if defined.decode(expected) == text and defined.decode(ids) != text:
            lost.append(text)
    return lost


def _check_spaces(path: Path, tokenizer: Any) -> None:
    """Refuse a tokenizer without tokenizer.json that makes one word of two."""
    together, apart = _ids(tokenizer, "brownfox"), _ids(tokenizer, "brown fox")
    if together == apart:
        raise ValueError(
            "it gives 'brown fox' and 'brownfox' the same tokens: its class, in "
            "tokenizer_config.json, is not the one of its files"
        )
