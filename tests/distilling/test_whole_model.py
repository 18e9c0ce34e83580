"""Test what training of the whole model has beside the paper's loss, and how its rows run."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from indexcache import Pattern
from indexcache.distilling import DistillSettings, Row, distill
from indexcache.distilling import trainer as trainer_module
from indexcache.distilling.parallel import open_world
from indexcache.distilling.trainer import Trainer
from tests.distilling import worker
from tests.distilling.worker import row_of, steps
from tests.support import make_model, refused

pytestmark = pytest.mark.usefixtures("one_thread")

PATTERNS = ("FSFRSS@2", "FSSFSS")


def trained(out, **changes):
    """Train the whole small model, and return its weights and the lines of its steps."""
    fields = {"pattern": "FSFRSS@2", "steps": 3, "eval_every": 0, "save_every": 2} | changes
    _, result = worker.train(out, "full", **fields)
    return result.weights, steps(out)[0]


def test_the_language_modelling_loss_alone_leaves_the_indexers(tmp_path):
    start = make_model("glm_moe_dsa").state_dict()
    alone, lines = trained(tmp_path / "none", objective="none")
    multi, other = trained(tmp_path / "multi")
    indexers = [name for name in start if ".indexer." in name]
    assert all(torch.equal(alone[name], start[name]) for name in indexers)
    assert not all(torch.equal(multi[name], start[name]) for name in indexers)
    others = [name for name in start if ".indexer." not in name and start[name].dim() == 2]
    assert not any(torch.equal(alone[name], start[name]) for name in others)
    # The first step has the same losses, and the rest of the model the same gradients.
    for key in ("kl", "lm_loss", "backbone_norm"):
        assert lines[0][key] == other[0][key]
    assert [e["norm"] for e in lines] == [0.0] * 3
    assert other[0]["norm"] > 0


def test_a_killed_run_without_indexers_goes_on(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dies(self, entry, kind, _log=Trainer._log):
        _log(self, entry, kind)
        if entry["step"] == 3:
            raise Killed

    whole, _ = trained(tmp_path / "whole", objective="none", steps=4)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(trainer_module.Trainer, "_log", dies)
        trained(tmp_path / "killed", objective="none", steps=4)
    assert list((tmp_path / "killed").glob("state-*"))
    resumed, lines = trained(tmp_path / "killed", objective="none", steps=4)
    assert [e["step"] for e in lines] == [1, 2, 3, 4]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_recomputing_changes_no_number(tmp_path):
    kept, lines = trained(tmp_path / "kept", recompute=False)
    again, other = trained(tmp_path / "again")
    assert [e["lm_loss"] for e in lines] == [e["lm_loss"] for e in other]
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    # Runs of earlier versions have no such key, and go on.
    assert "recompute" not in json.loads((tmp_path / "again" / "settings.json").read_text())
    assert json.loads((tmp_path / "kept" / "settings.json").read_text())["recompute"] is False


def gradients(rows, pattern, tmp_path, **changes):
    """Return the gradients of one step over these rows, by name, and its losses."""
    model = make_model("glm_moe_dsa")
    fields = {"stage": "sparse", "steps": 1, "rows": len(rows), "eval_every": 0, "clip": 1e9}
    settings = DistillSettings(**(fields | changes))
    with open_world(torch.device("cpu"), sharded=False) as world:
        trainer = Trainer(model, Pattern(pattern), rows, tmp_path, settings, [], world, None)
        facts = trainer.compute_gradients()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    grads |= {f"indexers.{n}": p.grad for n, p in trainer.indexers.named_parameters()}
    return grads, facts


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("freeze", [False, True])
def test_documents_of_one_length_run_as_a_batch(pattern, freeze, tmp_path):
    documents = [row_of(64, seed).ids for seed in range(3)]
    alone = gradients([Row.one_document(d) for d in documents], pattern, tmp_path)
    joined = [Row.of_documents(documents)]
    assert joined[0].cuts == ((0, 64), (64, 128), (128, 192))
    together = gradients(joined, pattern, tmp_path, freeze_backbone=freeze)
    assert together[1]["kl"] == pytest.approx(alone[1]["kl"], rel=1e-5)
    compared = [name for name in together[0] if together[0][name] is not None]
    assert len(compared) > (9 if freeze else 60)
    for name in compared:
        a, b = together[0][name], alone[0][name]
        assert float((a - b).norm()) <= 2e-4 * float(b.norm()) + 1e-7, name


def test_a_row_may_be_longer_than_the_context_where_no_document_is(tmp_path):
    model = make_model("glm_moe_dsa", max_position_embeddings=64)
    settings = DistillSettings(stage="sparse", steps=1, rows=1, eval_every=0)
    documents = [row_of(64, seed).ids for seed in range(2)]
    rows = [Row.of_documents(documents)]
    assert distill(model, "FSSFSS", rows, tmp_path / "run", settings).tokens == 128
    longer = [Row.of_documents([np.concatenate(documents)[:65], documents[0]])]
    refused(
        lambda: distill(
            make_model("glm_moe_dsa", max_position_embeddings=64),
            "FSSFSS",
            longer,
            tmp_path / "longer",
            settings,
        ),
        "65 tokens",
        "context of 64",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage": "warmup"}, ("none", "--stage sparse")),
        ({"stage": "sparse", "freeze_backbone": True}, ("none", "nothing would train")),
        ({"stage": "sparse", "layer_weights": (1.0,) * 6}, ("none", "no weights")),
    ],
)
def test_what_the_loss_none_cannot_do_is_refused(changes, words):
    refused(DistillSettings(objective="none", **changes).check, *words)


def test_the_maximum_differs_from_the_mean_where_layers_do(tmp_path):
    def indexer(**changes):
        model, _ = worker.train(
            tmp_path / str(len(list(tmp_path.iterdir()))),
            "frozen",
            steps=2,
            eval_every=0,
            **changes,
        )
        return model.model.layers[0].self_attn.indexer.wk.weight

    objectives = ("multi", "max", "cover")
    shared = [indexer(pattern="FSSFSS", objective=o) for o in objectives]
    alone = [indexer(pattern="FFFFFF", objective=o) for o in objectives]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(shared[i], shared[j])
        torch.testing.assert_close(alone[i], alone[j])


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_the_queries_that_must_find_an_answer_count_more(stage, tmp_path):
    """The term is the mean over them: those of all rows, by documents, and none at the edges."""
    batch = [row_of(64, seed).ids for seed in range(2)]
    uneven = Row.of_documents([row_of(40, 2).ids, row_of(88, 3).ids])
    for number, row in enumerate((Row.of_documents(batch), uneven)):
        # Every query but the last of the row is asked, so the term is nearly the loss itself.
        whole = [(1, row.cuts[0][1]), (row.cuts[1][0] + 1, 128)]
        asked = [replace(row, answers=tuple(whole)), replace(row, answers=((64, 65),))]
        options = {"stage": stage, "freeze_backbone": True}
        plain, facts = gradients([row], "FSSFSS", tmp_path, **options)
        all_asked, same = gradients([asked[0]], "FSSFSS", tmp_path, answer_weight=3.0, **options)
        one, _ = gradients([asked[1]], "FSSFSS", tmp_path, answer_weight=3.0, **options)
        assert facts["kl"] == same["kl"]  # The journal has the loss without the term.
        for name, grad in plain.items():
            ratio = float((all_asked[name] - grad).norm() / grad.norm())
            assert ratio == pytest.approx(3.0, rel=0.15), (number, name)
            assert not torch.equal(one[name], grad)
