"""Parse a page, and name the folders of its runs."""

from __future__ import annotations

from html.parser import HTMLParser

from indexcache.report.html.markup import VOID

ALL = ("search", "evaluate", "overlap", "bench", "distill")


class Page(HTMLParser):
    """Read what a page holds, and fail on elements that do not end where they should."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.numbers: list[float] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag == "data":
            self.numbers.append(float(dict(attrs)["value"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def folders(root, *names):
    return [str(root / name) for name in names or ALL]
