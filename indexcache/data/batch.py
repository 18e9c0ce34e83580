"""A batch of sequences, and the digest of all batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of one domain that go through the model together.

    Attributes:
        ids: token ids, int64 [B, T].
        domain: the domain of all of them.
        units: per sequence, the document(s) it is cut from; an interval over documents counts
            these.
        digests: the digests of the token ids of all documents in the batch.
        own_context: for each token, the number of tokens of its own document in the sequence up to
            and including it, int64 [B, T]: 1..T where a sequence is cut from one document, and it
            restarts where documents are joined. A batch built without it has 1..T.
        text_digests: for each of `digests`, the digest of the document's text, without white space
            and case; "" where the document was token ids.
        shingles: per sequence, the hashes of the passages of its documents, uint64.
        answers: per sequence, the places (start, stop) of the answers that are asked of a model:
            it has to continue ids[:start] with ids[start:stop]. Empty for plain text.
        only: the tokens whose loss counts, bool [B, T]; None counts those of the answers, or in
            plain text all.
    """

    ids: Tensor
    domain: str
    units: tuple[str, ...]
    digests: tuple[str, ...]
    own_context: Tensor = field(default=None)  # type: ignore[assignment]  # __post_init__ sets it.
    text_digests: tuple[str, ...] = ()
    shingles: tuple[np.ndarray, ...] = ()
    answers: tuple[tuple[tuple[int, int], ...], ...] = ()
    only: Tensor | None = None

    def __post_init__(self) -> None:
        if self.own_context is None:
            import torch

            own = torch.arange(1, self.ids.shape[1] + 1).expand(self.ids.shape)
            object.__setattr__(self, "own_context", own)
        if self.only is not None and (
            self.only.shape != self.ids.shape or bool(self.only[:, :1].any())
        ):
            raise ValueError(
                f"The tokens that count must be given for ids of {tuple(self.ids.shape)}, not "
                f"{tuple(self.only.shape)}, and never the first token, which nothing predicts."
            )

    @property
    def plain(self) -> bool:
        """Whether the losses of all tokens count, but the first ones', which nothing predicts."""
        return not self.answers and self.only is None

    @property
    def counted(self) -> Tensor:
        """The tokens whose loss counts, bool [B, T]."""
        import torch

        if self.only is not None:
            return self.only
        counted = torch.full(self.ids.shape, self.plain)
        counted[:, :1] = False
        for row, spans in enumerate(self.answers):
            for start, stop in spans:
                counted[row, start:stop] = True
        return counted


def digest_of(batches: Sequence[Batch]) -> str:
    """Return one digest of everything that is in the batches, order included."""
    h = hashlib.sha256()
    for b in batches:
        h.update(f"{b.domain}|{tuple(b.ids.shape)}|{b.digests}".encode() + b.ids.numpy().tobytes())
        if not b.plain:
            h.update(repr(b.answers).encode() + b.counted.numpy().tobytes())
    return h.hexdigest()
