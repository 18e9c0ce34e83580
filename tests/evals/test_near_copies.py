"""Near copies among held-out documents are named."""

from __future__ import annotations

import numpy as np
import torch

from indexcache import evaluate
from indexcache.data import Batch, document_groups
from tests.support import make_model

PATTERN = "FSSFSS"


def batches_of(rows: list[np.ndarray], domain: str = "a") -> list[Batch]:
    return [
        Batch(torch.from_numpy(row)[None], domain, units=(f"{domain}{i}",), digests=(f"{i:064x}",))
        for i, row in enumerate(rows)
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
