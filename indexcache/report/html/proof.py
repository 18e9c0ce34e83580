"""The sections about certificates, and about domains that were not calibrated on."""

from __future__ import annotations

from collections.abc import Sequence

from indexcache.report.html.markup import Html, counted, data, el, interval, join, table
from indexcache.report.html.quality import badge
from indexcache.report.html.results import CertificateRun, Crossed, MatrixRun, Run, of_verb

STRONGEST = 35  # per cent of colour in a cell, so that its text keeps its contrast


def certificates(runs: Sequence[Run]) -> Html | None:
    """Say what certificates hold, and how to see whether they hold for a checkpoint."""
    parts = []
    for run in of_verb(runs, CertificateRun):
        node = run.node
        sparsity = [
            [
                f"{s['length'].whole()} tokens, {s['size'].whole()} of them read",
                data(s["mean"].number(), ".2%"),
                data(s["longest"].number(), ".2%"),
                data(s["beyond"].number(), ".1%"),
            ]
            for s in node["sparsity"]
        ]
        head = ["length", "mean share of the context", "of the longest", "queries that see more"]
        weights = node["model"]["weights_digest"].text()
        parts += [
            el("p", badge(run.word), f" {run.folder}: {node['sentence'].text()}"),
            el("p", note) if (note := node.maybe_text("note")) else None,
            el(
                "p",
                "It is for the pattern ",
                el("code", run.pattern),
                ", for weights with the digest ",
                el("code", weights),
                f", for k = {run.identity.k}, and for nothing else. The digest of the certificate "
                "is ",
                el("code", node["digest"].text()),
                ". Whether it was edited, and whether it holds for a checkpoint, is what ",
                el("code", f"indexcache doctor MODEL --certificate {node.file}"),
                " says.",
            ),
            table(f"Effective sparsity ({run.folder})", head, sparsity),
        ]
    return join(parts) if parts else None


def matrix(runs: Sequence[Run]) -> Html | None:
    """Show what patterns lose on text that they were not calibrated on."""
    parts: list[object] = []
    for run in of_verb(runs, MatrixRun):
        for full in dict.fromkeys(cell.full for cell in run.cells):
            own = [cell for cell in run.cells if cell.full == full]
            parts += [_matrix(run, own, full), *(el("p", s) for s in _by_objective(own))]
    if not parts:
        return None
    text = (
        "A line is a pattern that a search chose on one kind of text, a column the held-out text "
        "that it was tested on. The number is the excess loss in nats per token, with its 95 % "
        "interval; more colour is more loss."
    )
    return join([el("p", text), parts])


def _matrix(run: MatrixRun, own: Sequence[Crossed], full: int) -> Html:
    most = max([cell.excess for cell in own] + [1e-12])
    cells = {(c.label, c.tested): c for c in own}
    rows = []
    for label in dict.fromkeys(c.label for c in own):
        line = [cells.get((label, d)) for d in run.domains]
        worst = max(filter(None, line), key=_excess)
        rows.append(
            [
                label,
                *("–" if c is None else _cell(c, most) for c in line),
                join([worst.tested, " ", data(worst.excess)]),
                el("code", worst.pattern),
            ]
        )
    documents = {c.tested: c.documents for c in own}
    tested = [f"{d} ({counted(documents.get(d, 0), 'document')})" for d in run.domains]
    caption = (
        f"{full} full layers, calibrated on one text and tested on another ({run.folder}: "
        f"sequences of {run.conditions.length}, k = {run.conditions.k}, against all layers full)"
    )
    return table(caption, ["calibrated on", *tested, "worst", "roles"], rows)


def _cell(cell: Crossed, most: float) -> Html:
    shade = round(STRONGEST * max(cell.excess, 0.0) / most)
    ends = interval(cell.low, cell.high)
    return el("span", data(cell.excess), el("br"), ends, class_="shade", style=f"--shade:{shade}%")


def _by_objective(own: Sequence[Crossed]) -> list[str]:
    """Compare the worst domain of the searches on all text."""
    worst: dict[str, Crossed] = {}
    for cell in own:
        if cell.label != cell.calibrated:
            known = worst.get(cell.objective)
            worst[cell.objective] = cell if known is None else max(known, cell, key=_excess)
    if set(worst) != {"mean", "worst"}:
        return []
    mean, minimax = worst["mean"], worst["worst"]
    return [
        f"With {mean.full} full layers, a search on all text by the mean loss leaves "
        f"{mean.excess:+.4f} nats on its worst domain, {mean.tested}; one by the worst domain "
        f"leaves {minimax.excess:+.4f} on {minimax.tested}."
    ]


def _excess(cell: Crossed) -> float:
    return cell.excess
