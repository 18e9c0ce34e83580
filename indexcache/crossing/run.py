"""Search on each domain and on all of them, and test every pattern on every domain."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from indexcache.crossing.settings import MatrixSettings
from indexcache.data import ALL, Batch, check_unseen, digest_of, seen_in
from indexcache.engines.vllm.engine import VllmEngine
from indexcache.evals.evaluate import evaluate
from indexcache.evals.statistics import LEAST_DOCUMENTS
from indexcache.models.conditions import Origin
from indexcache.models.family import AnyModel, module_of
from indexcache.pattern import Pattern
from indexcache.records import open_run
from indexcache.report.tables import table
from indexcache.searching.run import search
from indexcache.searching.settings import SearchSettings

Objective = Literal["mean", "worst"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A search of the matrix.

    Attributes:
        domain: the domain of its text, or "all".
        objective: "mean" loss, or the "worst" excess of a domain.
        folder: the name of its folder within that of the searches.
    """

    domain: str
    objective: Objective
    folder: str

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.domain if self.domain != ALL else f"{ALL}, {self.objective}"


@dataclass(frozen=True)
class MatrixResult:
    """Patterns calibrated on each domain, and what they lose on each.

    Attributes:
        rows: for every search, budget and domain that it was tested on, one row of matrix.json.
        domains: the domains, in ascending order.
        conditions: what the numbers hold for, by the domain that was tested.
        calibration: the text of the searches: digest, and digests of its documents.
    """

    rows: tuple[dict[str, Any], ...]
    domains: tuple[str, ...]
    conditions: Mapping[str, Any]
    calibration: Mapping[str, Any]

    @property
    def worst(self) -> tuple[dict[str, Any], ...]:
        """For every search and budget the domain that loses most, and the mean over domains."""
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        keys = ("calibrated", "objective", "keep", "full", "pattern")
        for row in self.rows:
            groups.setdefault(tuple(row[k] for k in keys), []).append(row)
        found = []
        for group, rows in groups.items():
            most = max(rows, key=lambda r: float(r["delta_loss"]))
            mean = sum(float(r["delta_loss"]) for r in rows) / len(rows)
            own = {k: most[k] for k in ("tested", "delta_loss", "ci_low", "ci_high")}
            found.append(dict(zip(keys, group, strict=True)) | own | {"mean": mean})
        return tuple(found)

    def table(self) -> str:
        """Format one table per budget: a line per search, a column per domain tested."""
        parts = []
        for keep in dict.fromkeys(row["keep"] for row in self.rows):
            lines = []
            for most in (w for w in self.worst if w["keep"] == keep):
                label = (most["calibrated"], most["objective"])
                cells = [
                    _cell(row)
                    for row in self.rows
                    if (row["calibrated"], row["objective"], row["keep"]) == (*label, keep)
                ]
                name = label[0] if label[0] != ALL else f"{ALL}, {label[1]}"
                end = f"{most['delta_loss']:+.4f} ({most['tested']})"
                lines.append([name, *cells, f"{most['mean']:+.4f}", end, most["pattern"]])
            full = next(row["full"] for row in self.rows if row["keep"] == keep)
            head = [f"{full} full, calibrated on", *(f"on {d}" for d in self.domains)]
            parts.append(table([*head, "mean", "worst domain", "roles"], lines))
        few = sorted({r["tested"] for r in self.rows if r["ci_low"] is None})
        if few:
            parts.append(
                f"No interval for {', '.join(few)}: fewer than {LEAST_DOCUMENTS} documents."
            )
        return "\n\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return the content of matrix.json."""
        return {
            "domains": list(self.domains),
            "rows": list(self.rows),
            "worst": list(self.worst),
            "conditions": dict(self.conditions),
            "calibration": dict(self.calibration),
        }


def _cell(row: Mapping[str, Any]) -> str:
    if row["ci_low"] is None:
        return f"{row['delta_loss']:+.4f}"
    return f"{row['delta_loss']:+.4f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"


def matrix(
    model: AnyModel | VllmEngine,
    calibration: Sequence[Batch],
    heldout: Sequence[Batch],
    out: str | Path,
    settings: MatrixSettings = MatrixSettings(),
    *,
    identity: Mapping[str, Any] | None = None,
    origin: Origin = Origin(),
    progress: bool = False,
) -> MatrixResult:
    """Search on each domain, and on all by the mean and by the worst domain, and test everywhere.

    `out` gets searches/NAME, a run folder of each search, journal.jsonl (one line per domain that
    was tested) and matrix.json.

    Args:
        model: as `search` and `evaluate` take it.
        calibration: batches of two domains or more; the searches on all take all of them.
        heldout: batches of the same domains.
        out: run folder; an interrupted run with the same settings continues, to the same result.
        settings: see `MatrixSettings`.
        identity: further facts that a resumed run must share, e.g. the checkpoint's fingerprint.
        origin: where the held-out batches come from, for the record in the result.
        progress: show progress bars on stderr.

    Raises:
        ValueError: one domain only, or domains that are not on both sides; held-out text that was
            calibration text; or what `search` or `evaluate` refuses.
    """
    stages = len(model.stages) if isinstance(model, VllmEngine) else None
    budgets = settings.budgets(layers_of(model), stages)
    domains = check_domains(calibration, heldout)
    seen = seen_in(calibration)
    check_unseen(heldout, seen)
    out = Path(out)
    facts = {
        **settings.facts(),
        "calibration": digest_of(calibration),
        "heldout": digest_of(heldout),
        **(identity or {}),
    }
    with open_run(out, facts, _check_entry) as run:
        found: dict[tuple[str, str, float], tuple[int, Pattern]] = {}
        for one in _calibrations(domains):
            own = [b for b in calibration if one.domain in (ALL, b.domain)]
            folder = out / "searches" / one.folder
            asked = partial(settings.search, objective=one.objective)
            searched = _search(model, own, folder, asked, budgets, identity, progress)
            for keep, full_pattern in searched.items():
                found[one.domain, one.objective, keep] = full_pattern
        patterns = list(dict.fromkeys(pattern for _, pattern in found.values()))
        done = {entry["tested"]: entry for entry in run.journal}
        for domain in domains:
            if domain in done:
                continue
            text = [b for b in heldout if b.domain == domain]
            named = {str(p): p for p in patterns}
            result = evaluate(model, named, text, origin=origin, progress=progress)
            rows = [row.to_json() for row in result.rows if row.where == domain]
            entry = {"tested": domain, "rows": rows, "conditions": result.conditions.to_json()}
            run.append(entry)
            done[domain] = run.journal[-1]
        measured = {(d, row["pattern"]): row for d in domains for row in done[d]["rows"]}
        rows = [
            {
                "calibrated": domain,
                "objective": objective,
                "keep": keep,
                "full": full,
                "pattern": str(pattern),
                "tested": tested,
                **{key: measured[tested, str(pattern)][key] for key in KEPT},
            }
            for (domain, objective, keep), (full, pattern) in found.items()
            for tested in domains
        ]
        conditions = {domain: done[domain]["conditions"] for domain in domains}
        about = {"digest": digest_of(calibration)} | seen.to_json()
        made = MatrixResult(tuple(rows), domains, conditions, about)
        run.save("matrix.json", made.to_json())
    return made


KEPT = (
    *("length", "loss", "delta_loss", "ci_low", "ci_high", "kl", "flips", "tokens", "documents"),
)


def check_domains(calibration: Sequence[Batch], heldout: Sequence[Batch]) -> tuple[str, ...]:
    """Return the domains of both texts.

    Raises:
        ValueError: there is one only, or one is missing on a side.
    """
    sides = [sorted({b.domain for b in batches}) for batches in (calibration, heldout)]
    check_several(sides[0])
    if sides[0] != sides[1]:
        missing = sorted({*sides[0]} ^ {*sides[1]})
        raise ValueError(
            f"The domains {', '.join(missing)} are in one of the calibration and the held-out text "
            "only; give text of each for both."
        )
    return tuple(sides[0])


def check_several(domains: Sequence[str]) -> None:
    """Raise ValueError where there are not two domains or more."""
    if len(domains) < 2:
        raise ValueError(
            f"The text has one domain ({', '.join(domains)}), but a matrix compares several; name "
            "them by the field domain of each document, or by sub-folders."
        )


def _calibrations(domains: Sequence[str]) -> list[Calibration]:
    """List the searches: one on each domain, and two on all."""
    found = [
        Calibration(
            domain=d, objective="mean", folder=f"{i}-{re.sub('[^A-Za-z0-9]+', '-', d)[:40]}"
        )
        for i, d in enumerate(domains)
    ]
    for objective in ("mean", "worst"):
        found.append(Calibration(domain=ALL, objective=objective, folder=f"all-{objective}"))
    return found


def _search(
    model: AnyModel | VllmEngine,
    batches: Sequence[Batch],
    folder: Path,
    asked: Callable[[float], SearchSettings],
    budgets: Mapping[int, float],
    identity: Mapping[str, Any] | None,
    progress: bool,
) -> dict[float, tuple[int, Pattern]]:
    """Return the pattern of every budget that a search on these batches finds, by fraction.

    Args:
        asked: the settings of a search down to a fraction.
        budgets: the fractions by the number of full layers, the most layers first.
    """
    found: dict[float, tuple[int, Pattern]] = {}
    for full, keep in reversed(
        list(budgets.items())
    ):  # The fewest full layers pass through the others.
        if keep in found:
            continue
        name = folder if not found else folder.with_name(f"{folder.name}-{full}")
        result = search(
            model, batches, name, asked(keep), identity=dict(identity or {}), progress=progress
        )
        passed = {point.full: point.pattern for point in result.frontier}
        found |= {budgets[n]: (n, passed[n]) for n in budgets if n in passed}
        assert keep in found, "a search ends at its own budget"
    return {keep: found[keep] for keep in budgets.values()}


def layers_of(model: AnyModel | VllmEngine) -> int:
    """Return the number of decoder layers."""
    if isinstance(model, VllmEngine):
        return model.layers
    return int(module_of(model).config.num_hidden_layers)


def _check_entry(entry: dict[str, Any]) -> None:
    """Raise KeyError or TypeError for a line of a journal that no matrix has written."""
    for row in entry["rows"]:
        for key in ("pattern", *KEPT):
            row[key]
    if not isinstance(entry["tested"], str) or not isinstance(entry["conditions"], dict):
        raise TypeError("its domain or its conditions are none")
