"""Write a certificate as a page for the one who signs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from indexcache.report.tables import table

WIDTH = 88
VERDICTS = {
    "safe": "SAFE: non-inferior within the margins, everywhere that was measured",
    "not safe": "NOT SAFE: worse than the margin allows",
    "inconclusive": "INCONCLUSIVE: the data decide neither way",
}


def page(value: Mapping[str, Any]) -> str:
    """Return certificate.md of the content of certificate.json."""
    pattern, margins, model = value["pattern"], value["margins"], value["model"]
    limits = f"at most {margins['loss']:g} nats per token of loss"
    if margins["recall"] is not None:
        limits += f", and at most {margins['recall']:.1%} of the answers"
    pool = "" if pattern["pool"] is None else f", R layers choose from {pattern['pool']} tokens"
    lines = [
        "# Certificate of a sharing pattern",
        "",
        f"**{VERDICTS[value['verdict']]}.**",
        "",
        _filled(value["sentence"]),
        *([] if value["note"] is None else ["", _filled(value["note"])]),
        "",
        "## What is certified",
        "",
        f"- Model: {model['path'] or 'a model in memory'}, {model['layers']} layers of type "
        f"{model['model_type']}",
        f"- Digest of the weights: {model['weights_digest']}",
        f"- Pattern: {pattern['pattern']}",
        f"- Layers that run their indexer: {pattern['full']} of {pattern['layers']}{pool}",
        f"- Compared with: {value['baseline']}",
        f"- Margin: {limits}",
        f"- k: every query selects {value['k']} tokens",
        "",
        "Effective sparsity, the part of its context that a query chooses from:",
        "",
        _block(_sparsity(value)),
        "",
        "## Loss on held-out text, nats per token",
        "",
        _block(_loss(value)),
        "",
    ]
    if value["recall"]:
        lines += ["## Answers found in long text", "", _block(_recall(value)), ""]
    lines += [
        "## What it was measured on",
        "",
        *[_data(one) for one in value["data"]],
        f"- Run: {value['dtype']} on {value['device']}, {value['path']} path, "
        + ", ".join(f"{name} {version}" for name, version in value["versions"].items()),
        "",
        "## What it does not say",
        "",
        _filled(
            "It holds for this checkpoint, this k, these lengths and this kind of text. Longer "
            "context, another language or another task is not covered. It says nothing of speed. "
            "docs/evidence.md explains every figure."
        ),
        "",
        f"Digest of certificate.json: {value['digest']}",
        "",
        "Name: ______________________   Date: ____________   Signature: ______________________",
    ]
    return "\n".join(lines) + "\n"


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _block(text: str) -> str:
    return f"```text\n{text}\n```"


def _sparsity(value: Mapping[str, Any]) -> str:
    head = ["length", "chosen from", "mean share", "of the longest", "queries beyond"]
    rows = [
        [s["length"], s["size"], f"{s['mean']:.2%}", f"{s['longest']:.2%}", f"{s['beyond']:.1%}"]
        for s in value["sparsity"]
    ]
    return table(head, rows)


def _span(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None else f"[{low:{form}}, {high:{form}}]"


def _loss(value: Mapping[str, Any]) -> str:
    head = ["domain", "length", "docs", "baseline", "excess", "95 % interval", "upper end"]
    rows = [
        [
            r["domain"],
            r["length"],
            r["documents"],
            f"{r['loss'] - r['delta_loss']:.4f}",
            f"{r['delta_loss']:+.4f}",
            _span(r["ci_low"], r["ci_high"], "+.4f"),
            "" if r["upper"] is None else f"{r['upper']:+.4f}",
            "-" if r["kl"] is None else f"{r['kl']:.4f}",
            f"{r['flips']:.1%}",
            r["verdict"],
        ]
        for r in value["loss"]
    ]
    return table([*head, "KL", "top-1 flips", "verdict"], rows)


def _recall(value: Mapping[str, Any]) -> str:
    head = ["task", "length", "answers", "baseline", "pattern", "lost", "gained", "excess"]
    rows = [
        [
            r["task"],
            r["length"],
            r["answers"],
            r["found_baseline"],
            r["found"],
            r["lost"],
            r["gained"],
            f"{r['excess']:+.1%}",
            _span(r["ci_low"], r["ci_high"], "+.1%"),
            "" if r["upper"] is None else f"{r['upper']:+.1%}",
            r["verdict"],
        ]
        for r in value["recall"]
    ]
    return table([*head, "95 % interval", "upper end", "verdict"], rows)


def _data(one: Mapping[str, Any]) -> str:
    lengths = " and ".join(map(str, one["lengths"]))
    if one["kind"] == "text":
        return (
            f"- Text: {one['source'] or 'in memory'}, split {one['split']}, {one['sequences']} "
            f"sequences of {lengths} tokens from {one['documents']} documents, seed "
            f"{one['seed']}, digest {one['digest']}"
        )
    return (
        f"- Retrieval: {', '.join(one['kinds'])}; {one['sequences']} sequences of {lengths} "
        f"tokens with {one['answers']} answers, seed {one['seed']}, digest {one['digest']}"
    )
