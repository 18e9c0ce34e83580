"""Turn text and chats into token ids with the tokenizer of a checkpoint, and into batches."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from indexcache.checkpoint import read_config
from indexcache.data import Batch, Tokenizing, batches, load_documents, named_source, scan
from indexcache.data.batches import SHIPPED
from indexcache.data.documents import Document
from indexcache.data.records import Message
from indexcache.data.retrieval import filler_documents, parse_kinds, retrieval_batches
from indexcache.models.tokenizer import load_tokenizer
from indexcache.pattern import Pattern
from indexcache.vacuity import check_length

DECIDING = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab.*|merges.*|.*\.model"
    r"|.*\.tiktoken|.*\.py"
)
"""The files of a checkpoint that decide what a text's token ids are."""


@dataclass(eq=False)
class Reader:
    """Reads text with the tokenizer of a checkpoint, which is loaded when text needs it.

    Token ids need none. The model is not needed either.

    Attributes:
        path: the checkpoint folder.
        loaded: transformers' tokenizer where it is loaded already.
    """

    path: Path
    loaded: Any = field(default=None, repr=False)

    @cached_property
    def tokenizer(self) -> Any:
        """Transformers' tokenizer.

        Raises:
            ValueError: none can be read.
        """
        return self.loaded if self.loaded is not None else load_tokenizer(self.path)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def chat(self, messages: list[Message]) -> str:
        """Return the text of a chat, as the tokenizer's template writes it.

        Raises:
            ValueError: there is no template, or it refuses the messages.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                f"is a chat, but the tokenizer of {self.path} has no chat template; put its "
                "chat_template.jinja there, or give the chats as text."
            )
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # A template raises whatever its author and jinja meet.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the chat template refuses this chat ({reason:.200}).") from None

    @cached_property
    def digest(self) -> str | None:
        """A digest of everything that decides token ids; None if it cannot be read."""
        import tokenizers
        import transformers

        h = hashlib.sha256(f"{transformers.__version__} {tokenizers.__version__}".encode())
        try:
            h.update(str(read_config(self.path).get("model_type")).encode())
            for file in sorted(self.path.iterdir()):
                if DECIDING.fullmatch(file.name) and file.is_file():
                    h.update(f"|{file.name}|{file.stat().st_size}|".encode() + file.read_bytes())
        except (OSError, ValueError):
            return None
        return h.hexdigest()

    def batches(
        self,
        source: str | Path,
        config: Any,
        *,
        split: str | None = None,
        length: int | None = None,
        sequences: int | None = None,
        batch: int = 1,
        seed: int = 0,
        patterns: Iterable[Pattern | str] = (),
        progress: bool = False,
    ) -> list[Batch]:
        """Cut text into batches; see `indexcache.data.batches`.

        Args:
            config: the config of the model, or what `describe` says of it.
        """
        return batches(
            source,
            self.encode,
            SimpleNamespace(**config) if isinstance(config, dict) else config,
            split=split,
            length=length,
            sequences=sequences,
            batch=batch,
            seed=seed,
            patterns=patterns,
            chat=self.chat,
            tokenizer=self.digest,
            progress=progress,
        )

    def retrieval(
        self,
        kinds: Sequence[str],
        config: Any,
        *,
        source: str | Path | None = None,
        split: str | None = None,
        length: int | None = None,
        sequences: int = 6,
        batch: int = 1,
        seed: int = 0,
    ) -> list[Batch]:
        """Make retrieval sequences; see `indexcache.data.retrieval`.

        Args:
            config: the config of the model, or what `describe` says of it.
            source: the text whose documents fill the space between facts; None takes sentences
                that mean nothing.
            length: tokens of a sequence; None is the default of `batches`.
            sequences: number of sequences of each kind.
        """
        values = SimpleNamespace(**config) if isinstance(config, dict) else config
        topk, context = int(values.index_topk), int(values.max_position_embeddings)
        length = check_length(length, topk, context)
        vocabulary = int(values.vocab_size)
        kinds = parse_kinds(kinds)
        documents: list[Document] = []
        if source is not None:
            how = Tokenizing(self.encode, vocabulary, self.chat, self.digest)
            tokens = 2 * length * max(sequences, 1)
            documents = filler_documents(source, how, split=split, tokens=tokens, seed=seed)
        return retrieval_batches(
            self.encode,
            vocabulary,
            kinds,
            length=length,
            sequences=sequences,
            documents=documents,
            split=str(source) if split is None and source in SHIPPED else split or "all",
            batch=batch,
            seed=seed,
        )

    def documents(
        self, source: str | Path, vocabulary: int, *, progress: bool = False
    ) -> list[Document]:
        """Read and tokenise all documents of a text; see `indexcache.data.load_documents`."""
        return load_documents(
            source,
            self.encode,
            vocabulary,
            chat=self.chat,
            tokenizer=self.digest,
            progress=progress,
        )

    def tokens(
        self, source: str | Path, vocabulary: int, count: int | None = None
    ) -> tuple[np.ndarray, str]:
        """Return the first `count` token ids of a text, or all, int64 [n], and a digest of all.

        Documents follow each other in their order; only as many are tokenised as are needed.
        """
        found = scan(named_source(source), vocabulary, progress=True)
        how = Tokenizing(self.encode, vocabulary, self.chat, self.digest)
        parts: list[np.ndarray] = []
        have = place = 0
        while place < len(found.documents) and (count is None or have < count):
            more = len(found.documents) if count is None else max(place, 1)
            for document in found.read(found.documents[place : place + more], how):
                parts.append(document.ids)
                have += len(document.ids)
                place += 1
        keys = "".join(d.key for d in found.documents)
        return np.concatenate(parts)[:count], hashlib.sha256(keys.encode()).hexdigest()
