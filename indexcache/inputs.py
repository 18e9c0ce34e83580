"""From what a user names (a model, a source of text) to a loaded model and its batches; shared by all verbs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from indexcache.data import Batch, check_context, load_documents, make_batches, split_documents
from indexcache.models.loading import Loaded, load_model


@dataclass(frozen=True, kw_only=True)
class Text:
    """Which text becomes which batches. `source` None is the text shipped with `tiny`, already split into calibration
    and held-out files; `length` None is 4 k tokens, at least 1024 and at most the model's context."""

    source: Path | None = None
    split: str = "all"
    length: int | None = None
    sequences: int = 9
    batch: int = 1
    seed: int = 0


def shipped_text(split: str) -> Path:
    """The shipped text of one split ("calibration" or "heldout"); licences in NOTICE."""
    return Path(str(resources.files("indexcache") / "assets" / "text" / f"{split}.jsonl"))


def text_for(model: str, source: str | None, split: str) -> tuple[Path, str]:
    """(file or folder, split to take of it) for a verb that wants `split` ("calibration" or "heldout").

    Raises:
        ValueError: no text given for a model other than `tiny`.
    """
    if source is not None:
        return Path(source), split
    if model != "tiny":
        raise ValueError(
            "Give the text with --data: a .jsonl or text file, a folder of them, or token ids."
        )
    return shipped_text("heldout" if split == "heldout" else "calibration"), "all"


def make_inputs(loaded: Loaded, text: Text) -> list[Batch]:
    """Batches of `text` for a loaded model, after the vacuity check.

    Raises:
        ValueError: what `indexcache.data` refuses, or sequences longer than the model's context.
    """
    config = loaded.model.config
    context, topk = int(config.max_position_embeddings), loaded.topk  # type: ignore[union-attr, arg-type]
    length = text.length or min(max(4 * topk, 1024), context)
    if length > context:
        raise ValueError(
            f"Sequences of {length} tokens are longer than the model's context of {context}."
        )
    check_context(length, topk)
    assert text.source is not None
    vocabulary = int(config.vocab_size)  # type: ignore[union-attr, arg-type]
    documents = split_documents(load_documents(text.source, loaded.encode, vocabulary), text.split)
    return make_batches(
        documents, length=length, sequences=text.sequences, batch=text.batch, seed=text.seed
    )


def check_unseen(batches: Sequence[Batch], seen: Iterable[str]) -> None:
    """Raises ValueError when a document of these batches was calibration text of a search."""
    shared = {d for b in batches for d in b.digests} & set(seen)
    if shared:
        raise ValueError(
            f"{len(shared)} of the held-out documents were calibration text of the search, so this would not be evidence; "
            "give other text, or use the split 'heldout' of the text the search took its 'calibration' from."
        )


__all__ = [
    "Loaded",
    "Text",
    "check_unseen",
    "load_model",
    "make_inputs",
    "shipped_text",
    "text_for",
]
