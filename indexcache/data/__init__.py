"""Turn text into batches of token ids: read documents, split them, and cut them into sequences.

A source of text is a file or a folder of files. Read are, also packed with gzip:

- `.jsonl`, `.ndjson`, `.json` and `.csv`, and without gzip `.parquet` and `.arrow` (with the extra
  `data`): every record is a document, in the first of the fields `ids` or `input_ids` (token ids),
  `text` or `content`, `messages` (`role` and `content`) or `conversations` (`from` and `value`),
  which go through the tokenizer's chat template. `domain` names the kind of text.
- `.txt`, `.md` and `.rst`: one document.

A `.npy` file is one document of token ids. In a folder the name of the sub-folder is the domain.
Hidden files and folders, the cards and metadata of data sets, pipes, devices, and links out of the
folder are never text; which files were read and which left out is logged.

Everything is a function of the text and the random seed: no global random state is read or changed.
"""

from indexcache.data.batch import Batch, digest_of
from indexcache.data.batches import (
    SHIPPED,
    batches,
    make_batches,
    named_source,
    shipped_text,
    text_for,
)
from indexcache.data.documents import SPLITS, Document, split_documents
from indexcache.data.folders import SUFFIXES, TEXT_SUFFIXES
from indexcache.data.leaks import (
    check_unseen,
    close_documents,
    document_groups,
    near_copies,
    seen_in,
    seen_in_documents,
)
from indexcache.data.records import ALL, Chat, Encode
from indexcache.data.retrieval import parse_kinds, retrieval_batches
from indexcache.data.sources import Source, Tokenizing, load_documents, scan
from indexcache.vacuity import check_context, check_length, default_length

__all__ = [
    "ALL",
    "SHIPPED",
    "SPLITS",
    "SUFFIXES",
    "TEXT_SUFFIXES",
    "Batch",
    "Chat",
    "Document",
    "Encode",
    "Source",
    "Tokenizing",
    "batches",
    "check_context",
    "check_length",
    "check_unseen",
    "close_documents",
    "default_length",
    "digest_of",
    "document_groups",
    "load_documents",
    "make_batches",
    "named_source",
    "near_copies",
    "parse_kinds",
    "retrieval_batches",
    "scan",
    "seen_in",
    "seen_in_documents",
    "shipped_text",
    "split_documents",
    "text_for",
]
