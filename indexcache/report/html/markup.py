"""Write HTML whose every text is escaped, and the numbers and tables of the page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence


class Html(str):
    """Text that is markup already; any other text is escaped where it enters a page."""


VOID = {"meta", "input", "br"}  # Those of SVG have an end in HTML.
# XML and HTML know no control characters, and what reverses text could make a name read otherwise.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def escape(text: object) -> Html:
    """Escape a text for the content of an element or for an attribute in double quotes."""
    if isinstance(text, Html):
        return text
    shown = UNSEEN.sub("\N{REPLACEMENT CHARACTER}", str(text))
    shown = shown.encode("utf-8", "replace").decode("utf-8")  # Half of a surrogate pair.
    return Html(html.escape(shown))


def el(name: str, /, *children: object, **attributes: object) -> Html:
    """Make an element.

    Args:
        name: its name.
        children: texts, which are escaped, elements, and lists of both; None is left out.
        attributes: their names with _ for -; a trailing _ is dropped (class_). None and False leave
            one out, True writes its name alone.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(f" {key}" if value is True else f' {key}="{escape(value)}"')
    parts.append(">")
    if name not in VOID:
        parts += [join(children), f"</{name}>"]
    return Html("".join(parts))


def join(children: Iterable[object]) -> Html:
    """Put elements and texts behind each other."""
    parts = []
    for child in children:
        if child is None:
            continue
        nested = isinstance(child, (list, tuple))
        parts.append(join(child) if nested else escape(child))  # type: ignore[arg-type]
    return Html("".join(parts))


def data(value: float | None, form: str = "+.4f", unit: str = "") -> Html:
    """Show a number in short; its `value` is the number of the file, with all its digits."""
    if value is None:
        return Html("–")
    return el("data", format(value, form), unit, value=repr(value))


def interval(low: float | None, high: float | None, form: str = "+.4f") -> Html:
    """Show an interval, or that there is none."""
    if low is None or high is None:
        return Html("no interval")
    return el("span", "[", data(low, form), ", ", data(high, form), "]", class_="ends")


def table(
    caption: str, head: Sequence[object], rows: Sequence[Sequence[object]], *, wide: bool = False
) -> Html:
    """Make a table whose first column names its rows.

    Args:
        caption: what it shows, with what the numbers hold for.
        head: the titles of the columns.
        rows: the cells; the first of each is the name of the row.
        wide: many narrow columns.
    """
    words = {i for row in rows for i, cell in enumerate(row) if not _is_number(cell)}

    def cells(tag: str, row: Sequence[object], **attributes: str) -> list[Html]:
        return [
            el(tag, cell, class_="words" if i in words else None, **attributes)
            for i, cell in enumerate(row)
        ]

    body = [
        el("tr", el("th", row[0], scope="row"), cells("td", ["", *row[1:]])[1:]) for row in rows
    ]
    inner = el(
        "table",
        el("caption", el("span", caption)),
        el("thead", el("tr", cells("th", head, scope="col"))),
        el("tbody", body),
        class_="wide" if wide else None,
    )
    return scroll(inner, caption)


def _is_number(cell: object) -> bool:
    text = str(cell)
    return (
        not text
        or text.startswith(("<data", '<span class="ends', "no interval", "–"))
        or (text[0] in "+-0123456789" and not isinstance(cell, Html))
    )


def scroll(inner: Html, label: str) -> Html:
    """Let something that is wider than the screen scroll in itself, also by keyboard."""
    return el("div", inner, class_="scroll", tabindex="0", role="region", aria_label=label)


def figure(picture: Html, caption: object, numbers: Html, *, open_: bool = False) -> Html:
    """Make a figure with a caption, and the table of its numbers behind it."""
    return el(
        "figure",
        picture,
        el("figcaption", caption),
        el("details", el("summary", "The numbers of this figure"), numbers, open=open_),
    )


def listed(words: Iterable[str], last: str = "and") -> str:
    """Join words as a sentence does: a, b and c."""
    *head, tail = list(words)
    return f"{', '.join(head)} {last} {tail}" if head else tail


def counted(number: int, noun: str) -> str:
    """Say how many: 1 document, 2 documents."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
