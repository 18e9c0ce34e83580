"""The certificate of a pattern: what was shown of it, for which model, on which text.

`certificate.json` is for programs, `certificate.md` for the one who signs; docs/evidence.md
explains every figure. A certificate holds for one checkpoint, and for what `export` writes of it.
Its digest shows that it was edited, not who wrote it: sign the file with a tool of your own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from indexcache.checkpoint import has_weights, read_config, tensor_digests
from indexcache.configs import model_type_of, text_section
from indexcache.data.retrieval import DOMAIN
from indexcache.overrides import SHARING_KEYS
from indexcache.reading import read_json
from indexcache.seen import CONFIG_KEY
from indexcache.vacuity import pool_of

if TYPE_CHECKING:  # `doctor` reads certificates without torch.
    from indexcache.evals.evidence import Evidence
    from indexcache.evals.gate import Gate, Verdict
    from indexcache.evals.measurement import Measurement

VERSION = 1
"""The version of the format."""
UNBOUND = (*SHARING_KEYS, CONFIG_KEY, "layer_types", "auto_map", "transformers_version")
"""Keys of a config that an export changes, and that change no number."""
KEYS = ("model", "pattern", "verdict", "k", "loss", "recall", "digest")
"""Keys without which a file is no certificate."""


def model_facts(folder: Path) -> dict[str, Any]:
    """Return what a certificate holds of a checkpoint: digests of its weights and of its config.

    Raises:
        ValueError: the weights cannot be read.
    """
    config = read_config(folder)
    weights, indexers = tensor_digests(folder)
    section = text_section(config)
    return {
        "model_type": model_type_of(config),
        "layers": section["num_hidden_layers"],
        "weights_digest": weights,
        "indexer_digests": {str(layer): digest for layer, digest in indexers.items()},
        "config_digests": config_digests(config),
    }


def config_digests(config: Mapping[str, Any]) -> dict[str, str]:
    """Return a short digest of the value of every key of a config but those of `UNBOUND`."""
    flat: dict[str, Any] = {}
    nested = text_section(dict(config))
    for key, value in config.items():
        if value is not nested:
            flat[key] = value
    if nested is not config and nested != config:
        flat |= {f"text_config.{key}": value for key, value in nested.items()}
    return {
        key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
        for key, value in sorted(flat.items())
        if key.removeprefix("text_config.") not in UNBOUND and key != "text_config"
    }


def make_certificate(
    evidence: Evidence, gate: Gate, model: Mapping[str, Any], *, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of certificate.json for the one pattern of an evaluation.

    Args:
        evidence: the result of `evaluate`.
        gate: what `judge` says of it.
        model: `model_facts` of the checkpoint, from before the evaluation.
        settings: further facts, e.g. how retrieval sequences were made.
    """
    first = evidence.rows[0]
    pattern, k = first.pattern, evidence.conditions.k
    verdicts: dict[Any, Verdict] = {(v.domain, v.length): v for v in gate.verdicts}
    conditions = evidence.conditions
    kept = {str(i) for i, role in enumerate(pattern.roles) if role == "S"}
    facts = dict(model)
    facts["indexer_digests"] = {
        layer: digest for layer, digest in model["indexer_digests"].items() if layer not in kept
    }
    data: list[dict[str, Any]] = [
        {
            "kind": "text",
            "source": conditions.text,
            "split": conditions.split,
            "digest": conditions.text_digest,
            "lengths": list(conditions.lengths),
            "sequences": conditions.sequences,
            "documents": conditions.documents,
            "seed": conditions.seed,
        }
    ]
    if evidence.retrieval:
        found = {"kind": "retrieval", **evidence.retrieval, "seed": conditions.seed}
        data.append(found | dict(settings))
    text = [row for row in evidence.rows if row.recall is None]
    asked = [row for row in evidence.rows if row.recall is not None]
    value: dict[str, Any] = {
        "certificate": VERSION,
        "verdict": _overall(gate),
        "passed": gate.passed,
        "sentence": gate.sentence(),
        "note": " ".join(filter(None, [gate.note, evidence.blindness])) or None,
        "margins": {"loss": gate.most, "recall": gate.recall_most},
        "level": 0.95,
        "model": {"path": conditions.model, "digest": conditions.model_digest, **facts},
        "pattern": {
            "name": first.name,
            "pattern": str(pattern),
            "roles": pattern.roles,
            "layers": len(pattern),
            "full": len(pattern.full_layers),
            "pool_factor": pattern.pool_factor,
            "pool_share": None if pattern.pool_share is None else str(pattern.pool_share),
            "pool": pool_of(pattern, k),
            "chosen_on": hashlib.sha256(
                json.dumps(pattern.seen.to_json(), sort_keys=True).encode()
            ).hexdigest()
            if pattern.seen
            else None,
        },
        "baseline": str(evidence.baseline),
        "k": k,
        "sparsity": [
            {"length": length, **share.to_json()}
            for length, shares in evidence.shares.items()
            for share in shares
        ],
        "data": data,
        "lengths": sorted({row.length for row in evidence.rows if row.length}),
        "loss": [_row(row, LOSS) | _judged(verdicts[row.where, row.length]) for row in text],
        "recall": [_asked(row) | _judged(verdicts[row.where, row.length]) for row in asked],
        "baseline_loss": evidence.baseline_loss,
        "blind_loss": evidence.blind_loss,
        "dtype": conditions.dtype,
        "device": conditions.device,
        "path": conditions.path,
        "noise": evidence.noise,
        "versions": dict(conditions.versions),
    }
    return value | {"digest": content_digest(value)}


LOSS = (
    *("domain", "length", "documents", "tokens", "beyond", "loss", "delta_loss"),
    *("ci_low", "ci_high", "kl", "kl_ci", "flips", "flips_ci"),
)


def _row(row: Measurement, keys: tuple[str, ...]) -> dict[str, Any]:
    value = row.to_json()
    return {key: value[key] for key in keys}


def _asked(row: Measurement) -> dict[str, Any]:
    """Return what a certificate says of a kind of retrieval; its interval is of the share lost."""
    recall = row.recall
    assert recall is not None
    low, high = (None if end is None else -end for end in (recall.high, recall.low))
    return {
        "task": str(row.where).removeprefix(DOMAIN),
        "length": row.length,
        "sequences": row.documents,
        "answers": recall.answers,
        "found_baseline": recall.found_baseline,
        "found": recall.found,
        "lost": recall.lost,
        "gained": recall.gained,
        "excess": recall.excess,
        "ci_low": low,
        "ci_high": high,
        "delta_loss": row.delta_loss,
        "beyond": row.beyond,
    }


def _judged(verdict: Verdict) -> dict[str, Any]:
    return {"upper": verdict.upper, "verdict": verdict.verdict, "why": verdict.reason}


def _overall(gate: Gate) -> str:
    words = {v.verdict for v in gate.verdicts}
    return next((w for w in ("not safe", "inconclusive") if w in words), "safe")


def content_digest(value: Mapping[str, Any]) -> str:
    """Return the digest of a certificate's content, 64 hex digits, whatever its white space."""
    content = {key: v for key, v in value.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -- checking ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """A finding of the check of a certificate.

    Attributes:
        error: whether the certificate does not hold.
        text: a sentence.
    """

    error: bool
    text: str


def read_certificate(path: str | Path) -> dict[str, Any]:
    """Read a certificate; whether it holds is another question (`check_certificate`).

    Raises:
        ValueError: the file cannot be read, or is no certificate of a known version.
    """
    file = Path(path)
    value = read_json(file, finite=True)
    if not isinstance(value, dict) or "certificate" not in value:
        raise ValueError(
            f"{file}: is no certificate; name the certificate.json that `evaluate --certificate` "
            "writes."
        )
    if value["certificate"] != VERSION and value.get("digest") == content_digest(value):
        raise ValueError(
            f"{file}: is a certificate of version {value['certificate']!r:.20}, and this program "
            f"reads version {VERSION}; take the program that wrote it, or certify anew."
        )
    return value


def check_certificate(
    path: str | Path,
    model: str | Path,
    config: dict[str, Any],
    *,
    roles: str | None = None,
    overridden: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Finding]:
    """Say whether a certificate holds for a checkpoint and for the pattern that is asked of it.

    Args:
        path: certificate.json.
        model: the checkpoint, or its config.json, whose weights nobody can check.
        config: the config of it.
        roles: the roles that are asked for, by the config or by a pattern; None for none.
        overridden: the config as each engine sees it.

    Raises:
        ValueError: see `read_certificate`; or the weights cannot be read.
    """
    value = read_certificate(path)
    broken = [key for key in KEYS if key not in value]
    if broken or value["digest"] != content_digest(value):
        return [
            Finding(
                True,
                f"{path}: the content is not what the certificate's digest says, so it was edited "
                "after it was written; take the original, or certify anew.",
            )
        ]
    errors = list(_problems(path, value, Path(model), config, overridden or {}))
    certified = value["pattern"]
    found = [Finding(True, text) for text in errors]
    if roles is None or not set(roles) - set("F-"):
        found.append(
            Finding(
                False,
                f"{path}: neither the config nor --pattern asks for sharing, so engines run all "
                f"layers full; the certificate is for {certified['pattern']}.",
            )
        )
    elif not _agree(roles, certified["roles"]):
        found.append(
            Finding(
                True,
                f"{path}: the certificate is for the pattern {certified['pattern']}, but "
                f"{roles} is asked for; certify that, or serve the certified one.",
            )
        )
    if not any(f.error for f in found):
        limits = [f"{value['margins']['loss']:g} nats per token"]
        if value["margins"]["recall"] is not None:
            limits.append(f"{value['margins']['recall']:.3g} of the answers")
        lengths = " and ".join(map(str, value["lengths"]))
        found.append(
            Finding(
                False,
                f"{path}: the certificate holds for this checkpoint: {certified['pattern']} loses "
                f"at most {' and '.join(limits)} at {lengths} tokens with k = {value['k']}.",
            )
        )
    return found


def _agree(asked: str, certified: str) -> bool:
    """Say whether two strings of roles are the same where layers have sparse attention."""
    return len(asked) == len(certified) and all(
        a in ("-", b) for a, b in zip(asked, certified, strict=True)
    )


def _problems(
    path: str | Path,
    value: Mapping[str, Any],
    model: Path,
    config: dict[str, Any],
    overridden: Mapping[str, Mapping[str, Any]],
) -> Iterator[str]:
    """Say what of a certificate does not hold, in sentences."""
    if value["passed"] is not True:
        yield (
            f"{path}: the certificate's verdict is {value['verdict']!r}, so it allows nothing: "
            f"{value['sentence']}"
        )
    sizes = {"the config": text_section(config).get("index_topk")}
    sizes |= {name: text_section(dict(c)).get("index_topk") for name, c in overridden.items()}
    for where, k in sizes.items():
        if k != value["k"]:
            yield (
                f"{path}: the certificate is for k = {value['k']}, but index_topk is {k!r:.20} for "
                f"{where}; another k loses something else, so certify that."
            )
            break
    theirs, own = value["model"]["config_digests"], config_digests(config)
    changed = sorted(k for k in {*theirs, *own} if theirs.get(k) != own.get(k))
    others = [key for key in changed if key.removeprefix("text_config.") != "index_topk"]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        yield (
            f"{path}: the config is another one than the certificate is for: "
            f"{', '.join(others[:5])}{more} changed; certify this one."
        )
    if not (model.is_dir() and has_weights(model)):
        return
    weights, indexers = tensor_digests(model)
    if weights != value["model"]["weights_digest"]:
        yield (
            f"{path}: the weights are others than those that the certificate is for; name the "
            "checkpoint that was evaluated, or certify this one."
        )
        return
    lost = [
        layer
        for layer, digest in value["model"]["indexer_digests"].items()
        if indexers.get(int(layer)) != digest
    ]
    if lost:
        yield (
            f"{path}: the indexers of the layers {', '.join(lost)} are missing or others than "
            "those that the certificate is for."
        )
