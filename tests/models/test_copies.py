"""Test copies, pickles and checkpoints of models that are patched: independent, or refused."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import warnings

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from indexcache import Pattern, accelerate, use_pattern
from indexcache.models.family import indexers
from tests.models.test_scopes import clean, under
from tests.support import FAMILIES, logits, make_model, refused, relative


@pytest.fixture(scope="module", params=FAMILIES)
def four(request):
    return make_model(request.param, num_hidden_layers=4, first_k_dense_replace=3)


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, 128, (1, 40), generator=torch.Generator().manual_seed(3))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "averaged": lambda model: AveragedModel(model).module,
}


@pytest.mark.parametrize(("how", "fast"), [*((h, False) for h in COPIES), ("deepcopy", True)])
def test_a_copy_is_independent_and_unpatched(four, text, how, fast):
    stock, shared = logits(four, text), under(four, "FSSF", text)
    undo = accelerate(four).undo if fast else lambda: None
    with use_pattern(four, "FSSF"), pytest.warns(UserWarning, match="the copy has none"):
        other = COPIES[how](four)
    undo()
    assert clean(other) and clean(four)
    assert torch.equal(logits(other, text), stock)
    assert torch.equal(under(other, "FSSF", text), shared)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    changed = logits(other, text)
    with use_pattern(four, "FSSF"):  # A pattern on one is none on the other.
        assert torch.equal(logits(other, text), changed)
        with use_pattern(other, "FFSS"):
            logits(other, text)
        assert torch.equal(logits(four, text), shared)
    assert torch.equal(logits(four, text), stock)
    assert not torch.equal(changed, stock)


def test_a_copy_of_an_accelerated_model_can_be_accelerated(four, text):
    with accelerate(four):
        fast = logits(four, text)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # It computes the same, so that there is no warning.
            other = copy.deepcopy(four)
        assert clean(other)
        with accelerate(other):
            assert torch.equal(logits(other, text), fast)
        assert torch.equal(logits(four, text), fast)


def test_a_shallow_copy_shares_layers_and_pattern(four, text):
    other = copy.copy(four)
    assert torch.equal(under(other, "FSSF", text), under(four, "FSSF", text))
    with use_pattern(four, "FSSF"), use_pattern(other, "FFSS"):
        assert torch.equal(logits(four, text), logits(other, text))
    assert clean(four)


def test_a_reference_model_for_preference_training(four, text):
    """Policy and reference under one pattern: the reference is not moved by training."""
    with use_pattern(four, "FSSF"):
        with pytest.warns(UserWarning, match="the copy has none"):
            reference = copy.deepcopy(four)
        with use_pattern(reference, "FSSF"):
            before = logits(reference, text)
            assert torch.equal(before, logits(four, text))
            with torch.no_grad():
                four.lm_head.weight.mul_(2)
            assert torch.equal(before, logits(reference, text))
            assert not torch.equal(before, logits(four, text))
    with torch.no_grad():
        four.lm_head.weight.mul_(0.5)


def test_what_remains_after_the_context_does_not_go_into_copies(four, text):
    """A guarded cache and a graph that waits for its backward pass."""
    with use_pattern(four, "FSSF"), torch.no_grad():
        cache = four(text, use_cache=True).past_key_values
    four.train()
    four.gradient_checkpointing_enable({"use_reentrant": False})
    with use_pattern(four, "FSSF"):
        loss = four(text, labels=text, use_cache=False).loss
    four.gradient_checkpointing_disable()
    if hasattr(four, "_require_grads_hooks"):  # Hooks of transformers, which cannot be pickled.
        four.disable_input_require_grads()
    four.eval()
    assert four.model._forward_pre_hooks and "forward" in four.model.__dict__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        others = [copies(four) for copies in COPIES.values()]
    assert all(clean(other) for other in others)
    with pytest.raises(ValueError, match="start a new cache"):
        logits(four, text[:, :1], past_key_values=cache)
    del loss
    del cache
    gc.collect()
    logits(four, text)
    assert clean(four)


def test_state_dicts_and_dtypes_under_a_pattern(four, text):
    other = make_model(four.config.model_type, 1, num_hidden_layers=4, first_k_dense_replace=3)
    with use_pattern(four, "FSSF"), use_pattern(other, "FSSF"):
        other.load_state_dict(four.state_dict())
        assert torch.equal(logits(other, text), logits(four, text))
        other.bfloat16()
        half = logits(other, text)
    before = copy.deepcopy(four).bfloat16()
    assert torch.equal(half, under(before, "FSSF", text))
    other.float().load_state_dict(four.state_dict())
    with accelerate(other), accelerate(before):
        other.to(torch.bfloat16)  # The fast path reads the weights that the model has now.
        assert torch.equal(logits(other, text), logits(before, text))


def test_a_replaced_forward_by_itself_is_not_copied(four):
    with use_pattern(four, "FSSF"):
        refused(lambda: copy.deepcopy(indexers(four)[0].forward), "replaced by indexcache")


def _forked(model, text, queue):
    queue.put(logits(model, text).sum().item())


def test_a_forked_process_keeps_the_pattern(four, text):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with use_pattern(four, "FSSF"):
        process = context.Process(target=_forked, args=(four, text, queue))
        process.start()
        got = queue.get()
        process.join()
        assert got == logits(four, text).sum().item()


# -- saving


def test_a_saved_model_is_the_one_that_ran(four, text, tmp_path):
    with use_pattern(four, "FSSF"):
        shared = logits(four, text)
        if four.config.model_type == "glm_moe_dsa":
            four.save_pretrained(tmp_path)
            with use_pattern(four, "FFSS"):
                four.save_pretrained(tmp_path / "inner")
        else:
            with pytest.warns(UserWarning, match="does not read it"):
                four.save_pretrained(tmp_path)
    again = type(four).from_pretrained(tmp_path).eval()
    assert again.config.index_topk_pattern == "FSSF"
    if four.config.model_type == "glm_moe_dsa":
        assert torch.equal(logits(again, text), shared)
        inner = type(four).from_pretrained(tmp_path / "inner").eval()
        assert torch.equal(logits(inner, text), under(four, "FFSS", text))
    else:
        assert torch.equal(under(again, "FSSF", text), shared)
    four.save_pretrained(tmp_path / "stock")
    stock = type(four).from_pretrained(tmp_path / "stock").eval()
    assert torch.equal(logits(stock, text), logits(four, text))
    assert not hasattr(four.config, "index_topk_pattern")
    assert clean(four)


def test_a_pattern_that_no_config_can_say_lies_beside_the_weights(four, text, tmp_path):
    with use_pattern(four, "FRSF@2"):
        ran = logits(four, text)
        with pytest.warns(UserWarning, match=r"FRSF@2.*pattern\.json has it"):
            four.save_pretrained(save_directory=tmp_path / "x")
        with use_pattern(four, "FFFF"):
            four.save_pretrained(tmp_path / "full")
    again = type(four).from_pretrained(tmp_path / "x").eval()
    assert not hasattr(again.config, "index_topk_pattern")
    assert torch.equal(under(again, Pattern.from_file(tmp_path / "x" / "pattern.json"), text), ran)
    assert not (tmp_path / "full" / "pattern.json").exists()


def test_trainer_trains_and_saves_under_a_pattern(four, text, tmp_path):
    """With checkpoints, as Trainer sets them up: the same steps as without, and the same model."""
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": text[0] + i, "labels": text[0] + i} for i in range(2)]
    data = [{k: v % 128 for k, v in row.items()} for row in data]
    trained = []
    for checkpointing in (False, True):
        model = copy.deepcopy(four)
        model.config.use_cache = False
        arguments = TrainingArguments(
            tmp_path / f"run{checkpointing}",
            max_steps=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing},
            optim="sgd",
            learning_rate=0.5,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        with use_pattern(model, "FSSF"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(model, arguments, train_dataset=data)
            trainer.train()
            trainer.save_model()
            model.eval()
            trained.append(logits(model, text))
    assert relative(trained[1], trained[0]) < 1e-5
    again = type(four).from_pretrained(tmp_path / "runTrue").eval()
    with use_pattern(again, again.config.index_topk_pattern):
        assert torch.equal(logits(again, text), trained[1])
    if four.config.model_type == "glm_moe_dsa":
        assert torch.equal(logits(again, text), trained[1])
