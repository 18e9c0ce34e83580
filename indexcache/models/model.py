"""Hold a loaded model: its module, what reads text for it, and where it came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from indexcache.data import Batch
from indexcache.models.applied import AppliedDelta
from indexcache.models.family import DsaModule, decoder_layers
from indexcache.models.reader import Reader
from indexcache.pattern import Pattern


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model with its tokenizer; every function of the package that needs a model takes it.

    The module runs every indexer that has weights, whatever pattern the config asks for.

    Attributes:
        module: the transformers model, in eval mode.
        reader: what reads text and chats with the tokenizer, which is loaded at the first text:
            token ids need none.
        path: the checkpoint folder.
        native: the pattern that the checkpoint's config asks for.
        delta: the trained indexers that were put into the module; None for the checkpoint's own.
    """

    module: DsaModule = field(repr=False)
    reader: Reader = field(repr=False)
    path: Path
    native: Pattern
    delta: AppliedDelta | None = field(default=None, repr=False)

    @property
    def tokenizer(self) -> Any:
        """Transformers' tokenizer of the checkpoint.

        Raises:
            ValueError: none can be read.
        """
        return self.reader.tokenizer

    @property
    def config(self) -> Any:
        """Transformers' config of the module."""
        return self.module.config

    @property
    def topk(self) -> int:
        """The number of tokens that a query selects, k."""
        return int(self.config.index_topk)

    @property
    def layers(self) -> int:
        """The number of decoder layers, which is the length of a pattern."""
        return len(decoder_layers(self.module))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without special tokens."""
        return self.reader.encode(text)

    def batches(
        self,
        source: str | Path = "heldout",
        *,
        split: str | None = None,
        length: int | None = None,
        sequences: int | None = None,
        batch: int = 1,
        seed: int = 0,
        patterns: Iterable[Pattern | str] = (),
    ) -> list[Batch]:
        """Cut text into batches of token sequences for this model.

        Args:
            source: "heldout" or "calibration" for the text that the package ships, or a file or
                a folder (see `indexcache.data`).
            split: the documents to take: "calibration", "heldout" or "all", which is the default.
            length: tokens of a sequence. The default is 4 k, or 4 pools if one of the patterns has
                R layers, at least 1024, and at most the model's context.
            sequences: number of sequences in all batches together; the default is one
                of each document, 36 of a domain at most, the least for a verdict.
            batch: max number of sequences in a batch.
            seed: random seed for the order in which documents are taken.
            patterns: what is to be measured on the batches.

        Raises:
            ValueError: the source cannot be read or has too little text, or the sequences are
                longer than the context, or too short for k or for the pool of a pattern.
        """
        return self.reader.batches(
            source,
            self.config,
            split=split,
            length=length,
            sequences=sequences,
            batch=batch,
            seed=seed,
            patterns=patterns,
        )

    def retrieval(
        self,
        kinds: Sequence[str] = ("all",),
        source: str | Path | None = None,
        *,
        split: str | None = None,
        length: int | None = None,
        sequences: int = 6,
        batch: int = 1,
        seed: int = 0,
    ) -> list[Batch]:
        """Make retrieval sequences in this model's tokenizer (see `indexcache.data.retrieval`).

        They go beside the batches of a text, into a search or an evaluation.

        Args:
            kinds: passkey, needles, key-value, variables, common-words, frequent-words, graph,
                repeat, or all of them.
            source: the text between facts, as in `batches`; None takes sentences without meaning.
            split, length, batch, seed: as in `batches`; the sequences of each split are others.
            sequences: number of sequences of each kind.

        Raises:
            ValueError: see `retrieval_batches`, or the source cannot be read.
        """
        return self.reader.retrieval(
            kinds,
            self.config,
            source=source,
            split=split,
            length=length,
            sequences=sequences,
            batch=batch,
            seed=seed,
        )

    def generate(
        self, prompt: str, *, max_new_tokens: int = 50, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """Continue `prompt` under the pattern in force, and return the new text.

        An accelerated model decodes from a `FastCache`; any other runs transformers' `generate`.

        Args:
            prompt: text that is encoded without special tokens.
            max_new_tokens: max number of tokens to generate; an end token stops earlier.
            temperature: 0 takes the best token; otherwise a token is drawn from
                softmax(logits / temperature).
            seed: random seed for sampling; the global random state is neither read nor changed.

        Raises:
            ValueError: the prompt is empty, `max_new_tokens` is below 1, the temperature is
                negative, or the model's context is too short for both.
        """
        from indexcache.models.fast.generate import new_tokens

        tokens = new_tokens(
            self.module,
            self.encode(prompt),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        return self.tokenizer.decode(list(tokens))
