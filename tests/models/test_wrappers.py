"""Test models in wrappers: adapters, compilers, averages, data parallelism, and bare decoders."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings

import pytest
import torch

import indexcache as ic
from indexcache.data import make_batches
from indexcache.distilling.rows import pack_rows
from indexcache.models.wrappers import unwrapped
from tests.models.test_recompute import checkpointing, gradients, loss_of, same
from tests.models.test_scopes import clean, under
from tests.support import FAMILIES, documents, logits, make_model, refused

peft = pytest.importorskip("peft")


def small(family):
    return make_model(family, num_hidden_layers=4, first_k_dense_replace=3)


@pytest.fixture(scope="module", params=FAMILIES)
def four(request):
    return small(request.param)


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def batches():
    return make_batches(documents(16, 64), length=64, sequences=16, batch=8)


def lora(model, **changes):
    """Wrap a copy of a model in LoRA whose deltas are not zero."""
    targets = ["q_a_proj", "kv_b_proj", "o_proj", "wq_b", "wk"]
    config = peft.LoraConfig(**({"target_modules": targets, "r": 4} | changes))
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.3)
    return wrapped.eval()


def distributed(model):
    return torch.nn.parallel.DistributedDataParallel(model)


@pytest.fixture(scope="module")
def one_process():
    file = tempfile.NamedTemporaryFile(delete=False)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file.name}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()
    os.unlink(file.name)


WRAPPERS = {
    "averaged": torch.optim.swa_utils.AveragedModel,
    "data parallel": torch.nn.DataParallel,
    "distributed": distributed,
    "LoRA": lora,
    "distributed LoRA": lambda model: distributed(lora(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_runs_as_the_model(four, text, batches, one_process, name):
    wrapped = WRAPPERS[name](four)
    inner = unwrapped(wrapped)
    assert type(inner) is type(four)
    stock, shared = logits(inner, text), under(inner, "FRSF@2", text)
    assert not torch.equal(stock, shared)
    assert torch.equal(logits(wrapped, text), stock)
    with ic.use_pattern(wrapped, "FRSF@2"):
        assert torch.equal(logits(wrapped, text), shared)
    assert torch.equal(logits(wrapped, text), stock)
    with ic.accelerate(wrapped), ic.use_pattern(wrapped, "FSSF"):
        fast = logits(inner, text)
        assert torch.equal(logits(wrapped, text), fast)
    found = ic.evaluate(wrapped, ["FSSF"], batches[:1])
    assert found.to_json() == ic.evaluate(inner, ["FSSF"], batches[:1]).to_json()
    assert ic.overlap(wrapped, batches[:1]).to_json() == ic.overlap(inner, batches[:1]).to_json()
    assert clean(inner)


def test_search_and_distillation_of_wrapped_models(four, batches, tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(four)
    settings = ic.SearchSettings(keep=0.5, uniform=False)
    found = [
        ic.search(model, batches[:1], tmp_path / name, settings).to_json()
        for name, model in (("a", averaged), ("b", four))
    ]
    assert found[0] == found[1]
    rows = pack_rows(documents(4, 64), 64)
    once = ic.DistillSettings(steps=1, freeze_backbone=True, eval_every=0)
    assert ic.distill(averaged, "FSSF", rows, tmp_path / "c", once)
    adapted = lora(four)
    refused(lambda: ic.distill(adapted, "FSSF", rows, tmp_path / "d", once), "merge_and_unload")


def test_a_bare_decoder(four, text, batches, tmp_path):
    with ic.use_pattern(four, "FSSF"), torch.no_grad():
        expected = four.model(text).last_hidden_state
    with ic.use_pattern(four.model, "FSSF"), torch.no_grad():
        assert torch.equal(four.model(text).last_hidden_state, expected)
        # The model around it is the same model.
        assert torch.equal(four.model(text).last_hidden_state, expected)
        refused(lambda: ic.accelerate(four), "outside of use_pattern")
    calls = [
        lambda: ic.accelerate(four.model),
        lambda: ic.evaluate(four.model, ["FSSF"], batches),
        lambda: ic.overlap(four.model, batches),
        lambda: ic.search(four.model, batches, tmp_path / "x"),
        lambda: ic.distill(four.model, "FSSF", pack_rows(documents(4, 64), 64), tmp_path / "y"),
    ]
    for call in calls:
        refused(call, type(four.model).__name__, "ForCausalLM")


def test_what_is_no_model_is_refused(four, batches, tmp_path):
    for wrong in (torch.nn.Linear(2, 2), torch.nn.Sequential(four), four.config, "tiny", None):
        name = type(wrong).__name__
        for call in (
            lambda: ic.use_pattern(wrong, "FSSF").__enter__(),  # noqa: B023
            lambda: ic.accelerate(wrong),  # noqa: B023
            lambda: ic.evaluate(wrong, ["FSSF"], batches),  # noqa: B023
            lambda: ic.overlap(wrong, batches),  # noqa: B023
            lambda: ic.search(wrong, batches, tmp_path / "x"),  # noqa: B023
        ):
            refused(call, name)
    refused(lambda: ic.export(four, "FSSF", tmp_path / "y"), type(four).__name__, "save")


def test_wrappers_that_run_something_else_are_refused(four):
    prompts = peft.get_peft_model(
        copy.deepcopy(four), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    refused(lambda: ic.use_pattern(prompts, "FSSF").__enter__(), "virtual tokens")
    several = torch.nn.DataParallel(four)
    several.device_ids = [0, 1]
    refused(lambda: ic.use_pattern(several, "FSSF").__enter__(), "DistributedDataParallel")
    flat = type("FullyShardedDataParallel", (torch.nn.Module,), {})()
    flat.module = four
    refused(lambda: ic.use_pattern(flat, "FSSF").__enter__(), "fully_shard")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_of_adapters_with_checkpointing(four, text, reentrant):
    model = lora(four)

    def backward():
        with ic.use_pattern(model, "FSRF@2"):
            loss = loss_of(model, text)
        loss.backward()

    with checkpointing(model, None):
        expected = gradients(model, backward)
    with checkpointing(model, reentrant):
        assert same(gradients(model, backward), expected)


def test_an_adapter_that_comes_inside_the_context(four, text):
    """Linear layers may be wrapped; an indexer that is replaced as a whole is noticed."""
    model = copy.deepcopy(four)
    with ic.use_pattern(model, "FSSF"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["wq_b", "q_a_proj"]))
        assert torch.equal(logits(model, text), under(four, "FSSF", text))
    other = copy.deepcopy(four)
    whole = peft.LoraConfig(target_modules=["q_a_proj"], modules_to_save=["indexer"])
    with ic.use_pattern(other, "FSSF"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(other, whole)
        refused(lambda: logits(other, text), "indexer of layer 0 was replaced")
    with ic.use_pattern(other, "FSSF"):
        assert torch.equal(logits(other, text), under(four, "FSSF", text))


def test_an_adapter_is_saved_beside_its_pattern(four, text, tmp_path):
    model = lora(four)
    with ic.use_pattern(model, "FRSF@2"):
        with pytest.warns(UserWarning, match=r"FRSF@2.*config cannot say"):
            model.save_pretrained(tmp_path)
        trained = logits(model, text)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(four), tmp_path).eval()
    with ic.use_pattern(again, ic.Pattern.from_file(tmp_path / "pattern.json")):
        assert torch.equal(logits(again, text), trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "stock")
    assert not (tmp_path / "stock" / "pattern.json").exists()


@pytest.mark.long
def test_compiled_models_follow_the_pattern(text):
    """Code that was compiled before the context does not run inside of it, nor after it."""
    model = make_model("glm_moe_dsa", num_hidden_layers=2)
    compiled = torch.compile(model, backend="eager")
    assert unwrapped(compiled) is model
    stock = logits(model, text)
    assert torch.equal(logits(compiled, text), stock)
    with ic.use_pattern(compiled, "FS"):
        assert torch.equal(logits(compiled, text), under(model, "FS", text))
    assert torch.equal(logits(compiled, text), stock)
    assert not torch.equal(stock, under(model, "FS", text))


@pytest.mark.long
def test_compiled_for_training(four, text):
    """A compiled model with and without checkpoints."""
    compiled = torch.compile(four, backend="aot_eager")

    def backward(model):
        with ic.use_pattern(model, "FRSF@2"):
            loss_of(model, text).backward()

    for reentrant in (None, False):
        with checkpointing(four, reentrant):
            expected = gradients(four, lambda: backward(four))
            assert same(gradients(four, lambda: backward(compiled)), expected)
