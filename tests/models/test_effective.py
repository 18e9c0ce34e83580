"""Test that the fast path honours or refuses what forwards do beside their product."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.utils.prune
from accelerate import dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from indexcache.models.fast import accelerate as fast_path
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.decode import Decoder
from indexcache.models.fast.frozen import Frozen
from indexcache.models.fast.prefill import prefill
from indexcache.models.lm import hidden_states, logit_chunks
from indexcache.models.seam import use_pattern
from tests.support import FAMILIES, logits, make_model, refused, relative

SHORT = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
KV = "model.layers.1.self_attn.kv_b_proj"
ROUTER = "model.layers.1.mlp.gate"


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.5


class QuantisedInput(nn.Linear):
    def forward(self, x):
        step = x.abs().amax(-1, keepdim=True) / 127 + 1e-9
        return super().forward((x / step).round() * step)


class Int8(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().amax(1, keepdim=True) / 20
        self.qweight = (linear.weight / self.scale).round().to(torch.int8)

    def forward(self, x):
        return x @ (self.qweight.float() * self.scale).T


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def linear(kind, old, bias=False):
    new = kind(old.in_features, old.out_features, bias=bias)
    new.weight = old.weight
    return new


def put(make):
    def change(model):
        parent, _, name = KV.rpartition(".")
        setattr(model.get_submodule(parent), name, make(model.get_submodule(KV)))

    return change


def raw_fp8(module):
    module.weight = nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return module


def times(name, factor):
    def change(model):
        module = model.get_submodule(name)
        stock = module.forward
        module.forward = lambda x: _times(stock(x), factor)

    return change


def _times(out, factor):
    return (out[0], out[1] * factor, out[2]) if isinstance(out, tuple) else out * factor


def hooked(name, hook, pre=False):
    def change(model):
        module = model.get_submodule(name)
        (module.register_forward_pre_hook if pre else module.register_forward_hook)(hook)

    return change


def another_class(model):
    router = model.get_submodule(ROUTER)

    class Router(type(router)):
        def forward(self, x):
            return _times(super().forward(x), 3)

    router.__class__ = Router


class DoubledInput(ModelHook):
    def pre_forward(self, module, *args, **kwargs):
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] * 2}


def weight_norm(model):
    torch.nn.utils.weight_norm(model.get_submodule(KV)).weight_g.data.mul_(2)


HONOURED = {
    "bias": put(lambda old: linear(nn.Linear, old, bias=True)),
    "subclass": put(lambda old: linear(Scaled, old)),
    "int8 weights": put(Int8),
    "parametrized": lambda m: parametrize.register_parametrization(
        m.get_submodule(KV), "weight", Doubled()
    ),
    "parametrized router": lambda m: parametrize.register_parametrization(
        m.get_submodule(ROUTER), "weight", Doubled()
    ),
    "orthogonal": lambda m: parametrizations.orthogonal(m.get_submodule(KV)),
    "weight norm": weight_norm,
    "pruned": lambda m: torch.nn.utils.prune.l1_unstructured(m.get_submodule(KV), "weight", 0.5),
    "replaced forward": times(KV, 3),
    "replaced forward of a router": times(ROUTER, 3),
    "another class of router": another_class,
    "hook on a router": hooked(ROUTER, lambda _m, _a, out: _times(out, 2)),
    "hook on a norm": hooked("model.layers.0.self_attn.kv_a_layernorm", lambda _m, _a, out: -out),
    "hook on attention": hooked(
        "model.layers.0.self_attn", lambda _m, _a, out: (out[0] * 2, *out[1:])
    ),
    "hook of accelerate on attention": lambda m: add_hook_to_module(
        m.model.layers[0].self_attn, DoubledInput()
    ),
    "hook on experts": hooked("model.layers.1.mlp.experts", lambda _m, _a, out: out * 2),
}
REFUSED = {
    "quantised input": (put(lambda old: linear(QuantisedInput, old)), "QuantisedInput"),
    "raw fp8": (put(raw_fp8), "float8_e4m3fn"),
    "hook": (hooked(KV, lambda _m, _a, out: out * 2), "hook"),
    "hook before": (hooked(KV, lambda _m, args: (args[0] * 2,), pre=True), "hook"),
    "on the meta device": (put(lambda old: old.to("meta")), "weights"),
    "tanh": (times(KV, lambda x: x.tanh()), "TypeError"),
}


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_honoured(family, later, ids):
    for name, change in HONOURED.items():
        model = make_model(family, **SHORT)
        plain = logits(model, ids)
        handle = accelerate(model) if later else None
        change(model)
        handle = handle or accelerate(model)
        got = logits(model, ids)
        other = make_model(family, **SHORT)
        change(other)
        stock = logits(other, ids)
        assert relative(got, stock) < 1e-5, name
        assert relative(stock, plain) > 0.01, name
        handle.undo()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_name(name, ids):
    change, part = REFUSED[name]
    model = make_model("glm_moe_dsa", **SHORT)
    with accelerate(model):
        change(model)
        refused(lambda: logits(model, ids), KV, part)
    refused(lambda: accelerate(model), KV, part)


@pytest.mark.parametrize("part", ["self_attn", "self_attn.indexer"])
def test_parts_that_are_not_stock_are_refused(part, ids):
    model = make_model("deepseek_v32", **SHORT)
    module = model.get_submodule(f"model.layers.1.{part}")
    stock = module.forward
    module.forward = lambda *args, **kwargs: stock(*args, **kwargs)  # type: ignore[method-assign]
    refused(lambda: accelerate(model), f"model.layers.1.{part}")
    del module.forward
    if part.endswith("indexer"):
        add_hook_to_module(module, ModelHook())
        refused(lambda: accelerate(model), f"model.layers.1.{part}")
        remove_hook_from_module(module)
    module.__class__ = type("Mine", (type(module),), {"forward": lambda self, *a, **k: None})
    refused(lambda: accelerate(model), f"model.layers.1.{part}", "Mine")


def device_map(model, **parts):
    """Return a map of devices for the library accelerate, which force_hooks obeys on a CPU."""
    names = ["embed_tokens", "norm", "rotary_emb", *(f"layers.{i}" for i in range(2))]
    devices = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
    for name, device in parts.items():
        for i in range(2) if name != "layers" else ():
            del devices[f"model.layers.{i}"]
            for child, _ in model.model.layers[i].named_children():
                devices[f"model.layers.{i}.{child}"] = device if child == name else "cpu"
        if name == "layers":
            devices |= {f"model.layers.{i}": device for i in range(2)}
        if name in devices:
            devices[name] = device
    return devices


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("part", ["mlp", "self_attn", "layers", "lm_head", "all on the CPU"])
def test_offloaded_weights_are_loaded(part, later, ids, tmp_path):
    model = make_model("glm_moe_dsa", **SHORT)
    stock = logits(model, ids)
    parts = {} if part == "all on the CPU" else {part: "disk"}
    if part == "lm_head":
        parts = {}
    devices = device_map(model, **parts)
    if part == "lm_head":
        devices |= {"lm_head": "disk", "model.embed_tokens": "disk"}
    handle = accelerate(model) if later else None
    dispatch_model(model, devices, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert any(p.is_meta for p in model.parameters()) == (part != "all on the CPU")
    handle = handle or accelerate(model)
    assert relative(logits(model, ids), stock) < 1e-5
    cache = FastCache(model, 32, 2)
    last = prefill(model, ids, cache, chunk=20)
    assert relative(last, stock[:, -1]) < 1e-5
    assert Decoder(model, cache).generate(last, 3).shape == (2, 3)
    (_, (first,)) = next(logit_chunks(model, hidden_states(model, ids)))
    assert relative(first, stock[:, :-1]) < 1e-5
    handle.undo()
    assert torch.equal(logits(model, ids), stock)


def test_changes_under_compiled_code_are_noticed():
    """A hook, an adapter, a module, a class, a forward and, where asked for, other weights."""
    model = make_model("glm_moe_dsa", **SHORT)
    layer = model.model.layers[1]
    gate = layer.mlp.gate
    changes = {
        "model.layers.0.mlp.up_proj": lambda m: m.register_forward_hook(lambda *_: None),
        "model.layers.1.self_attn.o_proj": lambda m: setattr(m, "forward", lambda x: x),
        "model.layers.1.mlp.gate": lambda m: parametrize.register_parametrization(
            m, "weight", Doubled()
        ),
        "model.layers.0.self_attn": lambda m: setattr(m, "q_b_proj", linear(Scaled, m.q_b_proj)),
        "model.layers.0.input_layernorm": lambda m: setattr(
            m, "weight", nn.Parameter(m.weight.detach().clone())
        ),
    }
    for name, change in changes.items():
        frozen = Frozen(model.named_modules(), weights=True)
        without = Frozen(model.named_modules(), weights=False)
        with torch.no_grad():
            gate.e_score_correction_bias.add_(1)  # A change in place is seen by such code itself.
        assert frozen.changed() is None
        change(model.get_submodule(name))
        assert frozen.changed() == name
        assert without.changed() == (None if "norm" in name else name)
    peft = get_peft_model(make_model("glm_moe_dsa", **SHORT), LoraConfig(target_modules=["wk"]))
    peft.add_adapter("other", LoraConfig(target_modules=["wk"]))
    for act in (
        lambda: peft.set_adapter("other"),
        peft.base_model.disable_adapter_layers,
        lambda: next(m for m in peft.modules() if hasattr(m, "scale_layer")).scale_layer(2.0),
        lambda: next(m for m in peft.modules() if hasattr(m, "merge")).merge(),
    ):
        frozen = Frozen(peft.named_modules(), weights=False)
        act()
        assert frozen.changed().endswith("wk")


def test_compiled_functions_refuse_later_changes(monkeypatch, ids):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = make_model("glm_moe_dsa", **SHORT)
    with accelerate(model, compile=True):
        with use_pattern(model, "FS"):
            logits(model, ids)
        model.model.layers[1].mlp.shared_experts.up_proj.register_forward_hook(lambda *_: None)
        refused(lambda: logits(model, ids), "model.layers.1.mlp.shared_experts.up_proj", "undo")


def test_a_graph_is_captured_again_after_a_change(monkeypatch, ids):
    """A replay does nothing here, and captures are counted."""
    captures = []

    def capture(decoder):
        captures.append(1)
        decoder._graph = SimpleNamespace(replay=lambda: None)
        decoder._graph_logits = torch.zeros(2, 128)

    monkeypatch.setattr(Decoder, "_capture", capture)
    model = make_model("glm_moe_dsa", **SHORT)
    with accelerate(model):
        cache = FastCache(model, 64, 2)
        last = prefill(model, ids, cache)
        decoder = Decoder(model, cache)
        decoder.graph = True
        cache.layers[1].indexed = cache.layers[1].length  # Steps that write nothing.
        decoder.generate(last, 4)
        assert len(captures) == 1
        handle = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: None)
        decoder.step(last.argmax(-1))
        nn.Linear(1, 1).register_forward_hook(lambda *_: None)  # Of another module.
        decoder.step(last.argmax(-1))
        assert len(captures) == 2
        handle.remove()
        decoder.step(last.argmax(-1))
        assert len(captures) == 3
        get_peft_model(model, LoraConfig(target_modules=["q_b_proj"]))
        decoder.step(last.argmax(-1))
        decoder.step(last.argmax(-1))
        assert len(captures) == 4


@pytest.mark.parametrize("later", [False, True])
def test_fused_norms_keep_hooks_and_adapters(monkeypatch, later, ids):
    """On a GPU norms are fused, which this test forces."""
    monkeypatch.setattr(fast_path, "on_gpu", lambda _: True)

    def change(model):
        attention = model.model.layers[0].self_attn
        attention.q_a_layernorm.register_forward_hook(lambda _m, _a, out: out * 2)
        attention.kv_a_layernorm.register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
        norm = model.model.layers[1].input_layernorm
        norm.__class__ = type("Mine", (type(norm),), {"forward": lambda self, x: x * 0.7})
        get_peft_model(model, LNTuningConfig(target_modules=["layers.1.self_attn.q_a_layernorm"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "ln_tuning" in name:
                    parameter.mul_(1.5)

    model, other = (make_model("deepseek_v32", **SHORT) for _ in range(2))
    plain = logits(other, ids)
    change(other)
    stock = logits(other, ids)
    handle = accelerate(model) if later else None
    change(model)
    handle = handle or accelerate(model)
    assert relative(logits(model, ids), stock) < 1e-5
    assert relative(stock, plain) > 0.05
    handle.undo()
