"""Read run folders, whatever verb wrote them, and see that they are of one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from indexcache.report.html.conditions import Conditions, Identity
from indexcache.report.html.nodes import Node
from indexcache.report.html.results import (
    ALL,
    ANSWERS,
    BenchRun,
    CertificateRun,
    Crossed,
    DistillRun,
    EvaluateRun,
    MatrixRun,
    OverlapRun,
    Point,
    Row,
    Run,
    SearchRun,
    Timed,
    Verdict,
)


def _evaluate(folder: str, node: Node) -> EvaluateRun:
    conditions = Conditions.of(node)
    gate = node["gate"] if node.has("gate") else None
    baseline = node["baseline"].pattern()
    rows = tuple(Row.of(r) for r in node["rows"])
    if not any(row.where == ALL for row in rows):
        raise ValueError(f"{node.file}: has no row of all text, so nothing was measured in it.")
    return EvaluateRun(
        verb="evaluate",
        folder=folder,
        node=node,
        identity=conditions.identity(len(baseline)),
        conditions=conditions,
        rows=rows,
        positions=tuple(Row.of(r) for r in node["positions"]),
        verdicts=() if gate is None else tuple(Verdict.of(v) for v in gate["verdicts"]),
        most=None if gate is None else gate["most"].number(),
        recall_most=None if gate is None else gate.maybe_number("recall_most"),
        baseline=baseline,
    )


def _search(folder: str, node: Node) -> SearchRun:
    conditions = Conditions.of(node)

    def point(one: Node) -> Point:
        found = []
        for kind, pair in one["found"].items() if one.has("found") else []:
            numbers = [n.whole() for n in pair]
            if len(numbers) != 2:
                pair.refuse("no pair of numbers")
            found.append((kind.removeprefix(ANSWERS), numbers[0], numbers[1]))
        return Point(
            pattern=one["pattern"].pattern(),
            loss=one["loss"].number(),
            estimated=one.has("estimated"),
            cost=one.maybe_number("cost_share"),
            found=tuple(found),
        )

    frontier = tuple(point(p) for p in node["frontier"])
    if not frontier or len({len(p.pattern) for p in frontier}) > 1:
        node["frontier"].refuse("no frontier")
    return SearchRun(
        verb="search",
        folder=folder,
        node=node,
        identity=conditions.identity(len(frontier[0].pattern)),
        conditions=conditions,
        frontier=frontier,
        uniform=tuple(point(p) for p in node.list_of("uniform")),
        objective=node.maybe_text("objective") or "mean loss",
        notes=tuple(n.text() for n in node.list_of("notes")),
    )


def _overlap(folder: str, node: Node) -> OverlapRun:
    conditions = Conditions.of(node)
    layers = node["layers"].whole()
    shares = tuple(tuple(n.number() for n in row) for row in node["overlap"])
    if not layers or [len(row) for row in shares] != [layers] * layers:
        node["overlap"].refuse(f"no table of {layers} times {layers} numbers")
    return OverlapRun(
        verb="overlap",
        folder=folder,
        node=node,
        identity=conditions.identity(layers),
        conditions=conditions,
        shares=shares,
        chance=node["chance"].number(),
        queries=node["queries"].whole(),
        pattern=node["pattern"].pattern() if node.has("pattern") else None,
    )


def _bench(folder: str, node: Node) -> BenchRun:
    settings = node["settings"]
    rows, failed = [], []
    for row in node["rows"]:
        if row.has("error"):
            where = f"{row['name'].text()} at {row['context'].whole()} tokens"
            failed.append(f"{where}: {row['error'].text()}")
            continue
        gains = row["speedup"] if row.has("speedup") else None
        total = row["decode_total_tok_s"].number()
        if total <= 0:
            row["decode_total_tok_s"].refuse("no rate")
        rows.append(
            Timed(
                context=row["context"].whole(),
                name=row["name"].text(),
                pattern=row["pattern"].pattern(),
                asked=str(row["asked"].value),
                batch=row["batch"].whole(),
                ttft_s=row.maybe_number("ttft_s"),
                step_tok_s=row["decode_tok_s"].number(),
                total_tok_s=total,
                gains=(gains.maybe_number("ttft"), gains.maybe_number("decode"))
                if gains
                else (None, None),
            )
        )
    random = node["random"].value is True
    digest = None if random else settings["identity"].text().partition(" ")[0]
    shape = node["shape"]
    return BenchRun(
        verb="bench",
        folder=folder,
        node=node,
        identity=Identity(
            name=node["model"].text(),
            digest=digest,
            layers=shape["layers"].whole(),
            k=shape["topk"].whole(),
        ),
        device=node["device"].text(),
        date=node["date"].text(),
        random=random,
        note=node["note"].text(),
        dtype=settings["dtype"].text(),
        rows=tuple(rows),
        failed=tuple(failed),
    )


def _distill(folder: str, node: Node) -> DistillRun:
    pattern = node["pattern"].pattern()
    settings = Node.read(node.file.with_name("settings.json"))
    held = node["held_out"] if node.has("held_out") else None
    return DistillRun(
        verb="distill",
        folder=folder,
        node=node,
        identity=Identity(
            name=settings.maybe_text("base") or "a model in memory",
            digest=settings.maybe_text("base_digest"),
            weights=settings.maybe_text("weights"),
            layers=len(pattern),
        ),
        pattern=pattern,
        steps=node["steps"].whole(),
        tokens=node["tokens"].whole(),
        held_out=None
        if held is None
        else (
            held["first"].number(),
            held["best"].number(),
            held["best_step"].whole(),
            held["last"].number(),
        ),
        delta=node.maybe_text("delta"),
    )


def _certificate(folder: str, node: Node) -> CertificateRun:
    """Read a certificate, as the evaluation that it certifies."""
    if not node.has("certificate") or node["certificate"].whole() != 1:
        raise ValueError(
            f"{node.file}: is no certificate of version 1, which this program reads; make the "
            "report with the program that wrote it."
        )
    text = next(iter(node["data"]))
    model, pattern = node["model"], node["pattern"]
    longest = max((s["length"].whole() for s in node["sparsity"]), default=0)
    name = {"name": pattern["name"].text(), "pattern": pattern["pattern"].text()}
    rows, verdicts = [], []
    for row in (*node["loss"], *node["recall"]):
        value = {key: inner.value for key, inner in row.items()}
        if "task" in value:
            value |= {"domain": f"{ANSWERS}{row['task'].text()}", "loss": 0.0, "flips": 0.0}
            value |= {"documents": row["sequences"].whole(), "tokens": row["answers"].whole()}
            ends = [row.maybe_number(key) for key in ("ci_high", "ci_low")]
            found = [None if end is None else 0.0 - end for end in ends]
            value |= {"found_ci_low": found[0], "found_ci_high": found[1]}
            value |= {"ci_low": None, "ci_high": None}
        flips = Node(row.file, value, row.place)["flips"].number()
        pool = None if pattern["pool"].value is None else _pool_share(node, longest)
        rows.append(value | name | {"agreement": 1 - flips, "pool_share": pool})
        verdicts.append(value | name | {"reason": row["why"].text()})
    margins = node["margins"]
    evidence = {
        "rows": rows,
        "positions": [],
        "baseline": node["baseline"].value,
        "baseline_loss": node["baseline_loss"].value,
        "blind_loss": node["blind_loss"].value,
        "conditions": {
            "model": model["path"].value,
            "model_digest": model["digest"].value,
            "weights_digest": model["weights_digest"].value,
            "text": text["source"].value,
            "text_digest": text["digest"].value,
            **{key: text[key].value for key in ("split", "lengths", "sequences", "documents")},
            **{key: node[key].value for key in ("k", "dtype", "device", "path", "versions")},
            "seed": text["seed"].value,
            "sparsity": [s.value for s in node["sparsity"] if s["length"].whole() == longest],
        },
        "gate": {
            "most": margins["loss"].value,
            "recall_most": margins["recall"].value,
            "note": node["note"].value,
            "verdicts": verdicts,
        },
    }
    evaluation = _evaluate(folder, Node(node.file, evidence))
    return CertificateRun(
        verb="certificate",
        folder=folder,
        node=node,
        identity=Identity(
            name=evaluation.identity.name,
            digest=evaluation.identity.digest,
            layers=evaluation.identity.layers,
            k=evaluation.identity.k,
        ),
        pattern=pattern["pattern"].pattern(),
        word=node["verdict"].text(),
        evaluation=evaluation,
    )


def _pool_share(node: Node, longest: int) -> float:
    """Return the pool over the longest context, which a certificate has beside that of k."""
    sizes = [s for s in node["sparsity"] if s["length"].whole() == longest]
    return sizes[-1]["longest"].number()


def _matrix(folder: str, node: Node) -> MatrixRun:
    domains = tuple(d.text() for d in node["domains"])
    cells = tuple(
        Crossed(
            calibrated=row["calibrated"].text(),
            objective=row["objective"].text(),
            full=row["full"].whole(),
            pattern=row["pattern"].pattern(),
            tested=row["tested"].text(),
            excess=row["delta_loss"].number(),
            low=row.maybe_number("ci_low"),
            high=row.maybe_number("ci_high"),
            documents=row["documents"].whole(),
        )
        for row in node["rows"]
    )
    if not cells or {c.tested for c in cells} != set(domains):
        node["rows"].refuse("no matrix of these domains")
    first = Node(node.file, {"conditions": node["conditions"][domains[0]].value})
    conditions = Conditions.of(first)
    return MatrixRun(
        verb="matrix",
        folder=folder,
        node=node,
        identity=conditions.identity(len(cells[0].pattern)),
        conditions=conditions,
        domains=domains,
        cells=cells,
    )


READERS: dict[str, Callable[[str, Node], Run]] = {
    "evidence.json": _evaluate,
    "overlap.json": _overlap,
    "bench.json": _bench,
    "matrix.json": _matrix,
}
CERTIFICATE = "certificate.json"
UNFINISHED = ("journal.jsonl", "settings.json")


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read the results in some run folders, in the order of the folders.

    Raises:
        ValueError: no folder, or one that holds no finished run; a file that no verb writes; or
            runs of different models.
    """
    if not folders:
        raise ValueError("There is no run folder; name at least one that a verb has written.")
    runs: list[Run] = []
    read: dict[Path, str] = {}
    for folder in folders:
        place = Path(folder)
        if not folder.strip() or "\0" in folder or not place.is_dir():
            what = "is a file" if place.is_file() else "there is no such folder"
            raise ValueError(f"{folder!r:.200}: {what}; the report takes run folders.")
        if (same := place.resolve()) in read:
            raise ValueError(f"{folder}: is the same folder as {read[same]}; name it once.")
        read[same] = folder
        runs += _read_folder(folder)
    _check_same_model(runs)
    return runs


def _read_folder(folder: str) -> list[Run]:
    place = Path(folder)
    runs = [
        reader(folder, Node.read(place / name))
        for name, reader in READERS.items()
        if (place / name).exists()
    ]
    if (place / "result.json").exists():
        node = Node.read(place / "result.json")
        if node.has("frontier"):
            runs.append(_search(folder, node))
        elif node.has("stage"):
            runs.append(_distill(folder, node))
        elif not runs:
            raise ValueError(
                f"{node.file}: is the result of no search and of no distillation, so it is not a "
                "file that the report knows."
            )
    if (place / CERTIFICATE).exists():
        certificate = _certificate(folder, Node.read(place / CERTIFICATE))
        if not any(isinstance(run, EvaluateRun) for run in runs):
            runs.append(certificate.evaluation)  # The evaluation itself was not kept.
        runs.append(certificate)
    if runs:
        return runs
    if any((place / name).exists() for name in UNFINISHED):
        raise ValueError(
            f"{folder}: the run in this folder has not finished; let it, by the same command, and "
            "then make the report."
        )
    inside = [str(p) for p in sorted(place.iterdir()) if p.is_dir() and _holds_run(p)]
    hint = f"; it holds run folders: name them ({' '.join(inside[:6])})" if inside else ""
    raise ValueError(
        f"{folder}: is not a run folder: it has no evidence.json, overlap.json, bench.json, "
        f"matrix.json, certificate.json or result.json{hint}."
    )


def _holds_run(place: Path) -> bool:
    return any((place / name).is_file() for name in (*READERS, CERTIFICATE, "result.json"))


def _check_same_model(runs: Sequence[Run]) -> None:
    for i, run in enumerate(runs):
        for other in runs[:i]:
            if (what := run.identity.differs(other.identity)) is not None:
                raise ValueError(
                    f"{other.folder} and {run.folder} are runs of different models "
                    f"({other.identity.name} and {run.identity.name}: {what}); make a report of "
                    "each."
                )
