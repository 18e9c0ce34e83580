"""Read values out of a JSON file; what is missing or of another kind is named with its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from indexcache.pattern import Pattern
from indexcache.records import read_json

LARGEST = 1e15


@dataclass(frozen=True)
class Node:
    """A value in a JSON file, and where it stands there.

    Every method raises ValueError, in one sentence, where the file holds something else.
    """

    file: Path
    value: Any
    place: str = ""

    @classmethod
    def read(cls, file: Path) -> Node:
        """Read a file whose outermost value is an object."""
        node = cls(file, read_json(file, finite=True))
        return node if isinstance(node.value, dict) else node.refuse("no JSON object")

    def refuse(self, what: str) -> Any:
        """Raise ValueError that the value is `what`."""
        place = self.place or "the file"
        raise ValueError(
            f"{self.file}: {place} is {self.value!r:.60}, which is {what}, so the file was changed "
            "by hand or is another program's; run the verb that writes it again."
        )

    def has(self, key: str) -> bool:
        """Say whether there is such a key with something in it."""
        return isinstance(self.value, dict) and self.value.get(key) is not None

    def __getitem__(self, key: str) -> Node:
        place = f"{self.place}.{key}" if self.place else key
        if not isinstance(self.value, dict):
            self.refuse("no JSON object")
        if key not in self.value:
            raise ValueError(
                f"{self.file}: has no {place!r:.80}, so it is not what a run of this version "
                "writes; run the verb that writes it again."
            )
        return Node(self.file, self.value[key], place)

    def __iter__(self) -> Iterator[Node]:
        if not isinstance(self.value, list):
            self.refuse("no list")
        for i, item in enumerate(self.value):
            yield Node(self.file, item, f"{self.place}[{i}]")

    def items(self) -> list[tuple[str, Node]]:
        """Return the keys of an object and what they hold."""
        if not isinstance(self.value, dict):
            self.refuse("no JSON object")
        return [(key, self[key]) for key in self.value]

    def number(self) -> float:
        """Return a number; a truth value is none."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            self.refuse("no number")
        if abs(self.value) > LARGEST:
            self.refuse("larger than any number that a run gives")
        return self.value

    def whole(self) -> int:
        """Return a whole number of at least 0."""
        if type(self.value) is not int or self.value < 0:
            self.refuse("no whole number of at least 0")
        return self.value

    def text(self) -> str:
        """Return a text."""
        return self.value if isinstance(self.value, str) else self.refuse("no text")

    def pattern(self) -> Pattern:
        """Return a pattern."""
        try:
            return Pattern(self.text())
        except ValueError as error:
            raise ValueError(f"{self.file}: {self.place}: {error}") from None

    # -- what may be missing or null --

    def maybe_number(self, key: str) -> float | None:
        """Return a number, or None."""
        return self[key].number() if self.has(key) else None

    def maybe_whole(self, key: str) -> int | None:
        """Return a whole number of at least 0, or None."""
        return self[key].whole() if self.has(key) else None

    def maybe_text(self, key: str) -> str | None:
        """Return a text, or None."""
        return self[key].text() if self.has(key) else None

    def list_of(self, key: str) -> list[Node]:
        """Return a list, which is empty where there is none."""
        return list(self[key]) if self.has(key) else []
