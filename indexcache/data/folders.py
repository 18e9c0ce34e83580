"""Find the files of a source: which are read, which are not, and why."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

TEXT_SUFFIXES = (".txt", ".md", ".rst")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow")
SUFFIXES = (*RECORD_SUFFIXES, ".npy", *TEXT_SUFFIXES)
PACKED = ".gz"  # Every format but .npy, .parquet and .arrow is read from gzip files too.
NOT_PACKED = (".npy", ".parquet", ".arrow")

CARD = re.compile(
    r"(readme|dataset_?card|datasheet|licen[cs]e|notice|copying|citation)([^a-z].*)?", re.I
)
METADATA = re.compile(
    r"(dataset_infos?|dataset_dict|state|config|croissant|metadata|package|tokenizer.*"
    r"|special_tokens_map|generation_config|.*\.index)\.json|(requirements|merges|vocab).*\.txt",
    re.I,
)
PLAIN_FOLDERS = ("data", "snapshots", "train", "test", "validation")
"""Folder names of a downloaded data set that say nothing about the kind of text."""


@dataclass(frozen=True)
class Listing:
    """The files of a source.

    Attributes:
        files: (file, domain) of each file to read, in a fixed order.
        skipped: a reason for each kind of files that are left out, e.g. "2 hidden files".
    """

    files: tuple[tuple[Path, str], ...]
    skipped: tuple[str, ...] = ()


def format_of(path: Path) -> str | None:
    """Return the suffix of the format that a file has by its name; None if it is not read."""
    name = path.name.lower()
    packed = name.endswith(PACKED)
    suffix = Path(name.removesuffix(PACKED)).suffix
    return suffix if suffix in SUFFIXES and not (packed and suffix in NOT_PACKED) else None


def list_files(root: Path, domain: str) -> Listing:
    """List everything readable at or below a source.

    Below a folder, hidden files and folders, cards and metadata of data sets, pipes and devices,
    and links that lead out of the folder are left out. Links that lead from a snapshot of the
    Hugging Face cache into that cache are followed.

    Raises:
        ValueError: nothing is there, or nothing that is read.
    """
    try:
        mode = root.stat().st_mode
    except (OSError, ValueError):
        raise ValueError(f"{root}: no such file or folder.") from None
    if stat.S_ISDIR(mode):
        return _list_folder(root, domain)
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"{root}: is a pipe or a device, whose end is unknown; text is read from a regular "
            "file, so write it into one first."
        )
    if format_of(root) is None:
        raise ValueError(
            f"{root}: text is read from {', '.join(SUFFIXES)} files, not from "
            f"{root.suffix or 'this'}."
        )
    return Listing(((root, domain),))


def _list_folder(root: Path, domain: str) -> Listing:
    home = _allowed_links(root)
    found: list[Path] = []
    skipped: Counter[str] = Counter()
    for folder, folders, names in os.walk(root, onerror=lambda e: skipped.update([_closed(e)])):
        for name in list(folders):
            path = Path(folder, name)
            if name.startswith("."):
                skipped[f"the hidden folder {path.relative_to(root)}"] += 1
                folders.remove(name)
            elif path.is_symlink():
                skipped[f"the linked folder {path.relative_to(root)}"] += 1
        for name in names:
            path = Path(folder, name)
            if reason := _why_not(path, path.relative_to(root), home):
                skipped[reason] += 1
            else:
                found.append(path)
    said = tuple(f"{n} {reason}" if reason[:1] != "t" else reason for reason, n in skipped.items())
    if not found:
        left_out = f" Left out: {', '.join(_short(said))}." if said else ""
        raise ValueError(
            f"{root}: there is no text in this folder; text is read from {', '.join(SUFFIXES)} "
            f"files.{left_out}"
        )
    return Listing(tuple((p, _domain(p.relative_to(root), domain)) for p in sorted(found)), said)


def _why_not(path: Path, relative: Path, home: Path) -> str | None:
    """Return why a file of a folder is not read; None if it is."""
    name = path.name
    if name.startswith("."):
        return f"the hidden file {relative}"
    suffix = format_of(path)
    if suffix is None:
        return f"{''.join(path.suffixes[-2:]) or 'suffixless'} files, which are not read"
    if CARD.fullmatch(name):
        return f"the card {relative}"
    if METADATA.fullmatch(name) or (suffix == ".arrow" and name.startswith(("cache-", "tmp"))):
        return f"the metadata {relative}"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return f"the pipe or device {relative}"
        target = path.resolve()
    except (OSError, RuntimeError):
        return f"the broken link {relative}"
    if path.is_symlink() and not target.is_relative_to(home):
        return f"the link {relative}, which leads out of the folder to {target}"
    return None


def _allowed_links(root: Path) -> Path:
    """Return the folder that links below a source may lead to: it, or its place in the hub's cache.

    There `datasets--NAME/snapshots/REVISION` holds links into `datasets--NAME/blobs`.
    """
    resolved = root.resolve()
    for parent in (resolved, *resolved.parents):
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent
    return resolved


def _domain(relative: Path, domain: str) -> str:
    folders = list(relative.parts[:-1])
    while folders and folders[0] in PLAIN_FOLDERS:
        # A revision follows after "snapshots".
        folders = folders[2 if folders[0] == "snapshots" else 1 :]
    return folders[0] if folders else domain


def _closed(error: OSError) -> str:
    return f"the folder {error.filename}, which cannot be read"


def _short(reasons: tuple[str, ...], most: int = 16) -> list[str]:
    more = len(reasons) - most
    return [*reasons[:most], *([f"and {more} more"] if more > 0 else [])]


def describe_listing(root: Path, listing: Listing) -> str:
    """Return one sentence that says which files of a folder are read and which are not."""
    names = tuple(str(path.relative_to(root)) for path, _ in listing.files)
    text = f"{root}: read {len(names)} files ({', '.join(_short(names))})"
    if len(names) == 1:
        text = f"{root}: read {names[0]}"
    if listing.skipped:
        text += f"; left out {', '.join(_short(listing.skipped))}"
    return text + "."
