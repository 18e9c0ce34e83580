"""The conditions under which a number was measured: model, text, lengths, sparsity, software."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from indexcache import __version__
from indexcache.data import Batch, digest_of
from indexcache.engines.vllm.engine import VllmEngine
from indexcache.models.blocks import fp8_way
from indexcache.models.family import AnyModel, DsaModule, module_of
from indexcache.models.identity import library_versions, weights_digest
from indexcache.models.loading import Model, fingerprint
from indexcache.models.seam import selector_of
from indexcache.vacuity import Share, sentence

FP8_WAYS = {
    "dequantize": "",
    "keep": ", weights kept in FP8",
    "both": ", weights and inputs of products in FP8",
}
"""These words follow the dtype where weights are stored in FP8."""
DIGITS = 12
"""Number of hex digits of a digest that are printed; files hold all 64."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where batches come from, as far as whoever cut them says.

    Attributes:
        text: the file or folder, or the name of a shipped text.
        split: the split of its documents: "calibration", "heldout" or "all".
        seed: the random seed by which sequences were taken.
    """

    text: str | None = None
    split: str | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a number holds for; another model, text, length or k gives another number.

    Attributes:
        model: the checkpoint folder; None for a module that was not loaded by `load`.
        model_digest: `models.loading.fingerprint` of that folder.
        weights_digest: `models.identity.weights_digest` of the module as it was measured.
        text: the file or folder of the text, if it is known.
        text_digest: `data.digest_of` of the batches.
        split: the split of the text's documents, if it is known.
        lengths: the different numbers of tokens of a sequence.
        sequences: number of sequences.
        documents: number of different documents in them.
        k: number of tokens that a query selects.
        pools: number of tokens in the pools of the patterns that have R layers.
        sparsity: the share of the context that k and each pool are, in this order.
        seed: random seed of the sequences.
        dtype: dtype of the weights, and what of the model is computed in FP8.
        device: the device, and the threads of a CPU.
        path: "stock" or "fast", the code that ran, or "vllm".
        versions: versions of indexcache, torch and transformers, or of indexcache and vLLM.
        delta: the file of the trained indexers in the model; None for the checkpoint's own.
        delta_digest: sha256 of that file.
    """

    model: str | None
    model_digest: str | None
    weights_digest: str
    text: str | None
    text_digest: str
    split: str | None
    lengths: tuple[int, ...]
    sequences: int
    documents: int
    k: int
    pools: tuple[int, ...]
    sparsity: tuple[Share, ...]
    seed: int | None
    dtype: str
    device: str
    path: str
    versions: Mapping[str, str]
    delta: str | None = None
    delta_digest: str | None = None

    def share(self, size: int) -> Share:
        """Return the share of the context that k or a pool is."""
        return next(share for share in self.sparsity if share.size == size)

    def summary(self) -> str:
        """Return length and k in a few words, for the head of a table."""
        return f"{_listed(self.lengths)} tokens, k = {self.k}"

    def __str__(self) -> str:
        model = "a model in memory" if self.model is None else f"model {self.model}"
        digests = [d for d in (self.model_digest, self.weights_digest) if d is not None]
        digest = ", weights ".join(d[:DIGITS] for d in digests)
        text = "the text" if self.text is None else f"text {self.text}"
        split = "" if self.split is None else f", split {self.split}"
        seed = "" if self.seed is None else f", seed {self.seed}"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        if self.delta is not None:
            model += f" with the delta {self.delta} ({str(self.delta_digest)[:DIGITS]})"
        return (
            f"This holds for {model} (digest {digest}) and {text} (digest "
            f"{self.text_digest[:DIGITS]}{split}): {self.sequences} sequences of "
            f"{_listed(self.lengths)} tokens from {self.documents} documents{seed};\n"
            f"{sentence({share.size: share for share in self.sparsity})};\n"
            f"{self.dtype} on {self.device}, {self.path} path, {versions}."
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self) | {
            "lengths": list(self.lengths),
            "pools": list(self.pools),
            "sparsity": [share.to_json() for share in self.sparsity],
            "versions": dict(self.versions),
        }


def conditions_of(
    model: AnyModel,
    batches: Sequence[Batch],
    shares: Mapping[int, Share],
    origin: Origin = Origin(),
    *,
    seed: int | None = None,
) -> Conditions:
    """Return the conditions of a measurement that begins now.

    Args:
        model: a model of a known family.
        batches: what it is measured on.
        shares: what `vacuity.check_batches` returned for them, k first.
        origin: where the batches come from.
        seed: random seed of the measurement; None is that of the origin.
    """
    module = module_of(model)
    folder = model.path if isinstance(model, Model) else None
    here = environment(module)
    delta = model.delta if isinstance(model, Model) else None
    return Conditions(
        model=None if folder is None else str(folder),
        model_digest=None if folder is None else _digest(folder),
        weights_digest=here["weights"],
        **of_text(batches, shares, origin),
        seed=origin.seed if seed is None else seed,
        dtype=here["dtype"].removeprefix("torch."),
        device=here["device"],
        path=here["path"],
        versions={"indexcache": __version__, **library_versions()},
        delta=None if delta is None else str(delta.path),
        delta_digest=None if delta is None else delta.digest,
    )


def conditions_in(
    engine: VllmEngine,
    batches: Sequence[Batch],
    shares: Mapping[int, Share],
    origin: Origin = Origin(),
    *,
    seed: int | None = None,
) -> Conditions:
    """Return the conditions of a measurement inside vLLM; the arguments are as `conditions_of`'s.

    The weights are those of the checkpoint's files, because they lie in other processes.
    """
    digest = fingerprint(engine.path)
    return Conditions(
        model=str(engine.path),
        model_digest=digest,
        weights_digest=digest,
        **of_text(batches, shares, origin),
        seed=origin.seed if seed is None else seed,
        dtype=str(engine.facts["dtype"]),
        device=str(engine.facts["device"]),
        path="vllm",
        versions={"indexcache": __version__, "vllm": str(engine.facts["vllm"])},
    )


def of_text(
    batches: Sequence[Batch], shares: Mapping[int, Share], origin: Origin
) -> dict[str, Any]:
    """Return those conditions that do not depend on who runs the model."""
    topk, *pools = shares
    return {
        "text": origin.text,
        "text_digest": digest_of(batches),
        "split": origin.split,
        "lengths": tuple(sorted({int(b.ids.shape[1]) for b in batches})),
        "sequences": sum(len(b.units) for b in batches),
        "documents": len({d for b in batches for d in b.digests}),
        "k": topk,
        "pools": tuple(pools),
        "sparsity": tuple(shares.values()),
    }


def _digest(folder: Path) -> str | None:
    """Return the fingerprint of a checkpoint; None if it is gone since it was loaded."""
    try:
        return fingerprint(folder)
    except (OSError, ValueError):
        return None


def environment(module: DsaModule) -> dict[str, Any]:
    """Return the facts of a loaded model on which the last bit of a loss depends."""
    weight = module.get_input_embeddings().weight
    device = (
        torch.cuda.get_device_name(weight.device)
        if weight.is_cuda
        else f"cpu, {torch.get_num_threads()} threads"
    )
    dtype = f"{weight.dtype}{FP8_WAYS[fp8_way(module)]}"
    return {
        "weights": weights_digest(module),
        "path": selector_of(module).path,
        "dtype": dtype,
        "device": device,
        **library_versions(),
    }


def _listed(lengths: Sequence[int]) -> str:
    return " or ".join(map(str, lengths))
