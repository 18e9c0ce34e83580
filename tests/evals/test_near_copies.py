"""Near copies among held-out documents are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from indexcache import evaluate
from indexcache.data import Batch, check_unseen, document_groups, near_copies
from indexcache.data.documents import Document
from indexcache.data.leaks import close_documents, seen_in
from indexcache.models.loading import describe
from indexcache.models.reader import Reader
from tests.support import make_model

PATTERN = "FSSFSS"


def batches_of(rows: list[np.ndarray], domain: str = "a") -> list[Batch]:
    names = [f"{domain}{i}" for i in range(len(rows))]
    return [
        Batch(torch.from_numpy(row)[None], domain, units=(name,), digests=(name,))
        for name, row in zip(names, rows, strict=True)
    ]


def test_forms_and_revisions_of_one_document_are_named(caplog):
    """Forms that differ at their beginning alone, beside documents of their own."""
    rng = np.random.default_rng(0)
    body = rng.integers(0, 128, 120)
    forms = [np.concatenate([rng.integers(0, 128, 8 + i % 3), body])[:120] for i in range(4)]
    own = batches_of([rng.integers(0, 128, 120) for _ in range(3)], "own")
    model = make_model("glm_moe_dsa")
    evaluate(model, PATTERN, own)
    assert not caplog.records
    evaluate(model, PATTERN, [*batches_of(forms, "forms"), *own])
    (record,) = caplog.records
    assert record.getMessage().startswith("3 of 7 documents share half of their passages")


def test_a_licence_header_makes_no_copies_and_copies_cross_domains():
    rng = np.random.default_rng(1)
    header = rng.integers(0, 128, 60)
    files = [np.concatenate([header, rng.integers(0, 128, 90)]) for _ in range(4)]
    batches = batches_of(files)
    assert len(set(document_groups(batches).values())) == 4
    copied = batches_of([files[0], rng.integers(0, 128, 150)], "b")
    groups = document_groups([*batches, *copied])
    assert groups["b", "b0"] == ("a", "a0")
    assert len(set(groups.values())) == 5


def test_long_sequences_are_compared_by_a_sample():
    rng = np.random.default_rng(2)
    long = rng.integers(0, 128, 4000)
    rows = [long[:3000], long[500:3500], long[1000:], rng.integers(0, 128, 3000)]
    assert len(set(document_groups(batches_of(rows)).values())) == 2


@pytest.mark.parametrize("length", [64, 256, 1024, 8192])
@pytest.mark.parametrize("searched", [4, 64])
def test_a_licence_header_is_no_near_copy_at_any_length(length, searched):
    """The header has as many words as the longest shipped one, and the search keeps a sample."""
    rng = np.random.default_rng(3)
    header = rng.integers(0, 128, min(70, 32 + (length - 31) // 3))

    def rows(count: int, start: np.ndarray) -> list[np.ndarray]:
        rest = length - len(start)
        return [np.concatenate([start, rng.integers(0, 128, rest)]) for _ in range(count)]

    chosen = rows(searched, header)
    seen = seen_in(batches_of(chosen))
    check_unseen(batches_of(rows(8, header), "other"), seen)
    copied = chosen[1][: 31 + (length - 31) * 3 // 4]
    close = near_copies(batches_of(rows(1, copied), "other"), seen)
    assert [unit for _, unit in close] == ["other0"]


def test_half_a_page_in_common_is_a_near_copy_of_a_document():
    def document(name: str, ids: np.ndarray) -> Document:
        return Document(ids, "a", name, name)

    rng = np.random.default_rng(4)
    page = rng.integers(0, 128, 256)
    own = rng.integers(0, 128, 400)
    header, third = (document(str(n), np.concatenate([page[:n], own])[:256]) for n in (77, 107))
    assert close_documents([header, third], [document("page", page)]) == [third]


def test_the_shipped_texts_are_held_out_of_each_other():
    """Their Go files begin with one licence header, a seventh of 256 tokens."""
    facts = describe("tiny")
    reader = Reader(Path(facts["path"]))
    for length, sequences in ((128, 24), (256, 24), (256, 96), (1024, 24)):
        chosen, held_out = (
            reader.batches(text, facts, length=length, sequences=count, seed=3)
            for text, count in (("calibration", sequences), ("heldout", None))
        )
        check_unseen(held_out, seen_in(chosen))
