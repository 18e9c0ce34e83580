"""Read small files whole: regular ones only, of a bounded size, as bytes, text or JSON.

Every refusal is a ValueError of one sentence that names the file.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 28
"""The largest file that is read as a whole: JSON, patterns, settings and prompts."""


def check_regular(path: Path) -> None:
    """Raise ValueError if `path` is there and is no file that has an end.

    A folder, a pipe, a socket or a device such as /dev/zero is refused before it is opened.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # The path has a null byte.
        raise ValueError(f"{path}: cannot be read ({error}).") from None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise ValueError(f"{path}: cannot be read, because it is {kind} and not a file.")


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Read a file of at most `most` bytes.

    Raises:
        ValueError: it is no regular file, it is larger, or it cannot be read.
    """
    check_regular(path)
    try:
        with open(path, "rb") as f:
            raw = f.read(most + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}).") from None
    if len(raw) > most:
        raise ValueError(
            f"{path}: has more than {most} bytes, so it is not the file that belongs here."
        )
    return raw


def read_text(path: Path, encoding: str = "utf-8-sig", most: int = MOST_BYTES) -> str:
    """Read a file of UTF-8 text, with or without a byte order mark; see `read_bytes`.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        return read_bytes(path, most).decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason}).") from None


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """Parse JSON of any depth.

    Args:
        finite: refuse NaN, infinite numbers, numbers that Python reads as infinite, and whole
            numbers of more than 30 digits.

    Raises:
        ValueError: it is not JSON.
    """

    def number(word: str) -> float:
        value = float(word)
        if finite and not math.isfinite(value):
            raise ValueError(f"{word:.40} is not a finite number")
        return value

    def whole(word: str) -> int:
        if finite and len(word) > 30:
            raise ValueError(f"{word:.40}.. is too large a number")
        return int(word)

    try:
        return json.loads(text, parse_float=number, parse_constant=number, parse_int=whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ValueError: it cannot be read or is not TOML; the message names the file.
    """
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except RecursionError:
        why = "it is nested too deeply"
    except (ValueError, OverflowError) as error:
        why = str(error)
    raise ValueError(f"{path}: is not TOML ({why}).")


def read_json(path: Path, *, finite: bool = False) -> Any:
    """Read a JSON file; see `parse_json`.

    Raises:
        ValueError: it cannot be read or is not JSON; the message names the file.
    """
    try:
        return parse_json(read_text(path, "utf-8"), finite=finite)
    except ValueError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: cannot be read as JSON ({why.rstrip('.')}).") from None
