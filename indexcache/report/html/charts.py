"""Draw the figures of the page as inline SVG, in colours that the style sheet names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from indexcache.report.html.markup import Html, el, join

WIDTH = 400  # of every picture, in its own units; text of 12 stays legible on a phone
CHAR = 6.3  # mean width of a letter of size 12
KINDS = 4  # number of colours of series


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A value with its interval.

    Attributes:
        label: its name, or its number in the picture.
        value: the value.
        low: the lower end; None without an interval.
        high: the upper end.
        x: where it stands, in a picture with two axes.
        kind: the number of its series, which gives colour and shape.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    x: float = 0.0
    kind: int = 0


def picture(height: float, title: str, *children: object) -> Html:
    """Make a picture with a title for those who cannot see it."""
    return el(
        "svg",
        el("title", title),
        *children,
        viewBox=f"0 0 {WIDTH} {_n(height)}",
        role="img",
        aria_label=title,
    )


def strip(roles: str, title: str, texts: Sequence[str] | None = None) -> Html:
    """Draw a pattern as a strip of one cell per layer, which wraps where the screen ends.

    Args:
        roles: F, R and S of every layer.
        title: what it shows, for those who cannot see it.
        texts: what stands in the cells; None for the roles.
    """
    cells = [
        el("span", el("small", i), el("b", text), class_=f"cell {role}")
        for i, (role, text) in enumerate(zip(roles, texts or roles, strict=True))
    ]
    inner = el("span", cells, aria_hidden="true", class_="cells")
    return el("div", inner, class_="strip", role="img", aria_label=title)


def scatter(
    marks: Sequence[Mark], title: str, x_title: str, y_title: str, margin: float | None = None
) -> Html:
    """Draw numbered points with intervals over two axes; x is a share, drawn as a percentage."""
    left, right, top, bottom = 56.0, WIDTH - 12.0, 24.0, 248.0
    ends = [e for m in marks for e in (m.low, m.high, m.value) if e is not None] + [0.0]
    ticks = nice_ticks(min(ends), max([*ends, *([] if margin is None else [margin])]))

    def across(x: float) -> float:
        return left + 10 + (right - left - 20) * x

    def up(y: float) -> float:
        return bottom - (bottom - top) * (y - ticks[0]) / (ticks[-1] - ticks[0])

    shapes: list[object] = [
        _y_axis(ticks, up, left, right),
        [
            el("text", f"{p}%", x=_n(across(p / 100)), y=bottom + 16, class_="mid")
            for p in range(0, 101, 25)
        ],
        _axis_titles(x_title, y_title, (left + right) / 2, bottom + 36),
    ]
    if margin is not None:
        line = _n(up(margin))
        shapes.append(el("line", x1=left, x2=right, y1=line, y2=line, class_="margin"))
        shapes.append(el("text", "margin", x=right, y=_n(up(margin) - 4), class_="end margin-text"))
    labels: list[tuple[float, float, float]] = []
    places: dict[float, int] = {}
    same = {m.x: sum(o.x == m.x for o in marks) for m in marks}
    for mark in marks:
        i = places[mark.x] = places.get(mark.x, -1) + 1
        x = across(mark.x) + 14 * (i - (same[mark.x] - 1) / 2)
        shapes.append(_whisker(mark, x, up))
        shapes.append(_dot(x, up(mark.value), mark.kind))
        y = up(mark.value if mark.high is None else mark.high) - 7
        width = 4 + CHAR * len(mark.label)
        while any(abs(x - a) < (width + w) / 2 and abs(y - b) < 11 for a, b, w in labels):
            y -= 11  # Upwards until no other label is there.
        labels.append((x, y, width))
        shapes.append(el("text", mark.label, x=_n(x), y=_n(y), class_="mid"))
    return picture(bottom + 44, title, *shapes)


def forest(
    marks: Sequence[Mark], title: str, x_title: str, margin: float | None = None, form: str = "+.4f"
) -> Html:
    """Draw one line per mark: its name, its interval, its value and zero."""
    left, right, row = 128.0, WIDTH - 62.0, 24.0
    ends = [e for m in marks for e in (m.low, m.high, m.value) if e is not None] + [0.0]
    ticks = nice_ticks(min(ends), max([*ends, *([] if margin is None else [margin])]), 3)
    bottom = 12 + row * len(marks)

    def across(x: float) -> float:
        return left + (right - left) * (x - ticks[0]) / (ticks[-1] - ticks[0])

    shapes: list[object] = [
        [
            [
                el("line", x1=_n(across(t)), x2=_n(across(t)), y1=6, y2=bottom, class_="grid"),
                el(
                    "text",
                    f"{100 * t:g}%" if "%" in form else f"{t:g}",
                    x=_n(across(t)),
                    y=bottom + 15,
                    class_="mid",
                ),
            ]
            for t in ticks
        ],
        el("text", x_title, x=_n((left + right) / 2), y=bottom + 33, class_="mid"),
        el("line", x1=_n(across(0)), x2=_n(across(0)), y1=6, y2=bottom, class_="zero"),
    ]
    if margin is not None:
        x = _n(across(margin))
        shapes.append(el("line", x1=x, x2=x, y1=6, y2=bottom, class_="margin"))
    for i, mark in enumerate(marks):
        y = 12 + row * i + row / 2
        shapes.append(el("text", shorten(mark.label, left - 8), x=0, y=_n(y + 4)))
        if mark.low is not None and mark.high is not None:
            a, b = _n(across(mark.low)), _n(across(mark.high))
            kind = mark.kind % KINDS
            shapes.append(el("line", x1=a, x2=b, y1=_n(y), y2=_n(y), class_=f"whisker s{kind}"))
        shapes.append(_dot(across(mark.value), y, mark.kind))
        shapes.append(el("text", format(mark.value, form), x=WIDTH, y=_n(y + 4), class_="end"))
    return picture(bottom + 40, title, *shapes)


def bars(
    marks: Sequence[Mark], title: str, form: str, *, reference: float = 0.0, most: float = 0.0
) -> Html:
    """Draw one horizontal bar per mark with its value behind it, and a line at a reference."""
    left, right, row = 150.0, WIDTH - 52.0, 20.0
    top = max([m.value for m in marks] + [reference, most, 1e-9])
    bottom = 6 + row * len(marks)
    shapes: list[object] = []
    for i, mark in enumerate(marks):
        y, width = 6 + row * i, (right - left) * max(mark.value, 0) / top
        shapes.append(el("text", shorten(mark.label, left - 8), x=0, y=_n(y + 14)))
        shapes.append(
            el(
                "rect",
                x=left,
                y=_n(y + 3),
                width=_n(width),
                height=_n(row - 6),
                class_=f"bar s{mark.kind % KINDS}",
            )
        )
        text = format(mark.value, form)
        shapes.append(el("text", text, x=_n(left + width + 5), y=_n(y + 14)))
    if reference:
        x = _n(left + (right - left) * reference / top)
        shapes.append(el("line", x1=x, x2=x, y1=2, y2=_n(bottom), class_="zero"))
    return picture(bottom + 6, title, *shapes)


def lines(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    title: str,
    x_title: str,
    y_title: str,
) -> Html:
    """Draw series of points over two axes; the first is joined by a line, the others are points."""
    left, right, top, bottom = 56.0, WIDTH - 12.0, 12.0, 206.0
    points = [p for _, own in series for p in own]
    ticks = nice_ticks(min(y for _, y in points), max(y for _, y in points))
    low, high = min(x for x, _ in points), max(x for x, _ in points)

    def across(x: float) -> float:  # From the most full layers to the fewest.
        return left + 10 + (right - left - 20) * (high - x) / ((high - low) or 1)

    def up(y: float) -> float:
        return bottom - (bottom - top) * (y - ticks[0]) / (ticks[-1] - ticks[0])

    wanted = max(round((high - low) / 8), 1)
    shapes: list[object] = [
        _y_axis(ticks, up, left, right),
        [
            el("text", x, x=_n(across(x)), y=bottom + 16, class_="mid")
            for x in range(int(high), int(low) - 1, -wanted)
        ],
        _axis_titles(x_title, y_title, (left + right) / 2, bottom + 34),
    ]
    for kind, (_, own) in enumerate(series):
        if not kind:
            d = "M" + "L".join(f"{_n(across(x))} {_n(up(y))}" for x, y in own)
            shapes.append(el("path", d=d, class_="curve s0"))
        shapes += [_dot(across(x), up(y), kind) for x, y in own]
    key = el("p", [legend(kind, name) for kind, (name, _) in enumerate(series)], class_="legend")
    return join([picture(bottom + 42, title, *shapes), key])


def legend(kind: int, name: str) -> Html:
    """Show the mark of a series and its name."""
    mark = el("svg", _dot(7, 7, kind), viewBox="0 0 14 14", aria_hidden="true", class_="key")
    return el("span", mark, " ", name)


def heat_map(shares: Sequence[Sequence[float]], title: str, groups: Sequence[range] = ()) -> Html:
    """Draw a table of shares between 0 and 1 as squares, with frames around groups of rows.

    Cells of one shade are one path, so that the picture of 80 layers stays small.
    """
    count = len(shares)
    left, top, size = 30.0, 8.0, (WIDTH - 40.0) / count
    shades: dict[int, list[str]] = {}
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            shade = round(min(max(share, 0.0), 1.0) * 50) * 2
            shades.setdefault(shade, []).append(f"M{j} {i}h1v1h-1z")
    cells = [
        el("path", d="".join(path), fill_opacity=f"{shade / 100:g}")
        for shade, path in sorted(shades.items())
    ]
    place = f"translate({_n(left)} {_n(top)}) scale({size:.4f})"
    step = -(-count // 12)
    labels = [
        [
            el("text", i, x=left - 5, y=_n(top + size * (i + 0.5) + 4), class_="end"),
            el(
                "text",
                i,
                x=_n(left + size * (i + 0.5)),
                y=_n(top + size * count + 15),
                class_="mid",
            ),
        ]
        for i in range(0, count, step)
    ]
    frames = [
        el("rect", x=g.start, y=g.start, width=len(g), height=len(g), class_="frame")
        for g in groups
    ]
    return picture(
        top + size * count + 22,
        title,
        el("g", cells, frames, transform=place, class_="heat"),
        labels,
    )


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return round numbers that enclose a range, about as many as are wanted."""
    if not high - low > 1e-200:
        size = max(abs(low), abs(high))
        half = 0.5 if size <= 1e-200 else size / 2
        low, high = low - half, high + half
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def shorten(text: str, width: float) -> str:
    """Cut a text to a width, with a sign that it was cut."""
    most = int(width / CHAR)
    return text if len(text) <= most else text[: most - 1] + "…"


def _y_axis(ticks: Sequence[float], up: object, left: float, right: float) -> list[object]:
    assert callable(up)
    return [
        [
            el(
                "line",
                x1=left,
                x2=right,
                y1=_n(up(t)),
                y2=_n(up(t)),
                class_="zero" if t == 0 else "grid",
            ),
            el("text", f"{t:g}", x=left - 5, y=_n(up(t) + 4), class_="end"),
        ]
        for t in ticks
    ]


def _axis_titles(x_title: str, y_title: str, x: float, y: float) -> list[object]:
    turned = el("text", y_title, transform="translate(11 124) rotate(-90)", class_="mid")
    return [el("text", x_title, x=_n(x), y=_n(y), class_="mid"), turned]


def _whisker(mark: Mark, x: float, up: object) -> Html | None:
    assert callable(up)
    if mark.low is None or mark.high is None:
        return None
    kind = f"whisker s{mark.kind % KINDS}"
    return el("line", x1=_n(x), x2=_n(x), y1=_n(up(mark.low)), y2=_n(up(mark.high)), class_=kind)


def _dot(x: float, y: float, kind: int) -> Html:
    """Draw a mark; series differ in shape too, for those who do not see colours."""
    kind %= KINDS
    if kind == 0:
        return el("circle", cx=_n(x), cy=_n(y), r=4.5, class_="dot s0")
    a, b = x, y
    shapes = {
        1: f"M{_n(a - 4)} {_n(b - 4)}h8v8h-8z",
        2: f"M{_n(a)} {_n(b - 5.5)}l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
        3: f"M{_n(a)} {_n(b - 5)}l5.2 9h-10.4z",
    }
    return el("path", d=shapes[kind], class_=f"dot s{kind}")


def _n(value: float) -> str:
    """Write a coordinate in few digits."""
    return f"{round(value, 1):g}"
