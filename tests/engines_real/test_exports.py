"""Give what `export` writes to the engines' own code: config overrides, and vLLM's loader."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from indexcache.checkpoint import indexer_part, tensor_names
from indexcache.engines.vllm.plugin import without_surplus
from indexcache.exporting import export
from indexcache.exporting.engines import FLAGS
from indexcache.exporting.transformers import merged_config
from indexcache.pattern import Pattern
from tests.engines.shapes import DEEPSEEK, GLM
from tests.fp8_support import edit_config, write_fp8

from .code import condition, functions, method, statements, text
from .test_rules import (
    CLASSES,
    needs_wheels,
    of_vllm_class,
    sglang_functions,
    theirs,
    with_sglang_overrides,
)

LAYERS = 6
FREQ = {"index_topk_freq": 3, "index_skip_topk_offset": 2}
ROLES = ["FSSFSS", "FFFSFS", "FFSFFS", "FSSSSS", "FFFFFF"]
BASES: dict[str, dict[str, Any]] = {
    "deepseek_v32": DEEPSEEK | {"num_hidden_layers": LAYERS},
    "glm_moe_dsa": GLM | {"num_hidden_layers": LAYERS},
    "deepseek_v32 with a frequency": DEEPSEEK | {"num_hidden_layers": LAYERS} | FREQ,
    "glm_moe_dsa that shares": GLM
    | {"num_hidden_layers": LAYERS, "indexer_types": ["full", "shared"] * 3}
    | FREQ,
}
BASES |= {f"nested {n}": {"model_type": "llava", "text_config": c} for n, c in BASES.items()}


def built(config: dict[str, Any]) -> Any:
    """Return the config object of transformers, on which engines set overrides."""
    return transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))


def with_vllm_overrides(config: Any, overrides: dict[str, Any]) -> None:
    """Apply overrides to a config object by the statements of vLLM's ModelConfig and get_config."""
    module = "vllm/config/model.py"
    divide = statements(
        module, "__post_init__",
        lambda s: text(s).startswith("if callable(self.hf_overrides)"),
    )  # fmt: skip
    found = divide(self=SimpleNamespace(hf_overrides=overrides))
    update = statements(
        "vllm/transformers_utils/config.py", "get_config",
        lambda s: text(s).startswith("if hf_overrides_kw:"),
    )  # fmt: skip
    logger = SimpleNamespace(debug=lambda *_: None)
    update(config=config, hf_overrides_kw=found["hf_overrides_kw"], logger=logger)
    target = SimpleNamespace()
    target._update_nested = partial(method(module, "ModelConfig", "_update_nested"), target)
    apply = method(module, "ModelConfig", "_apply_dict_overrides")
    apply(target, config, found["dict_overrides"])


def vllm_roles(config: Any, module: str) -> str | None:
    """Return the roles that a vLLM class reads from a config object's text part."""
    code = functions("vllm/transformers_utils/config.py", "get_hf_text_config")
    seen = vars(code.get_hf_text_config(config))
    return of_vllm_class(seen | {"model_type": "deepseek_v32"}, module)


def sglang_roles(config: Any) -> str | None:
    """Return the roles by SGLang's own function, which must not fail on any part of a config."""
    config.architectures = ["GlmMoeDsaForCausalLM"]
    config.index_topk = 2048
    layers = {"model_type": "glm_moe_dsa", "num_hidden_layers": LAYERS}
    return theirs(lambda i: sglang_functions().dsa_layer_skips_topk(config, i), layers)


@needs_wheels
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("name", BASES)
def test_overrides_give_the_pattern_by_the_engines_own_code(name, roles):
    base, pattern = BASES[name], Pattern(roles)
    config = built(base)
    with_vllm_overrides(config, FLAGS["vllm"][1](base, pattern))
    for module in CLASSES:
        assert vllm_roles(config, module) == roles
    config = built(base)
    with_sglang_overrides(config, FLAGS["sglang"][1](base, pattern))
    # The model reads the text part, and the memory pools what lies at the top.
    assert sglang_roles(config.get_text_config()) == sglang_roles(config) == roles


@needs_wheels
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("name", BASES)
def test_an_exported_config_gives_the_pattern_by_the_engines_own_code(name, roles):
    config = built(merged_config(BASES[name], Pattern(roles)))
    for module in CLASSES:
        assert vllm_roles(config, module) == roles
    section = config.get_text_config()
    if "glm" in name:
        assert section.indexer_types == Pattern(roles).to_types()
    assert sglang_roles(section) == roles


# -- vLLM's loader --------------------------------------------------------------------------------


class Loading:
    """What vLLM's `load_weights` needs of a model: parameters that note what is put into them."""

    def __init__(self, folder: Path, roles: str):
        config = json.loads((folder / "config.json").read_text())
        self.config = SimpleNamespace(**config)
        self.num_redundant_experts = 0
        self.put: dict[str, int] = {}
        self.names = set()
        for name in tensor_names(folder):
            part = indexer_part(name)
            outside = name.startswith(tuple(f"model.layers.{i}." for i in (4, 5)))
            if outside or (part is not None and roles[part[0]] == "S"):
                continue
            if ".experts." in name:
                continue  # They are fused by another mapping, which this does not test.
            fused = re.sub(r"\.(gate|up)_proj\.", ".gate_up_proj.", name)
            fused = re.sub(r"\.(q_a_proj|kv_a_proj_with_mqa)\.", ".fused_qkv_a_proj.", fused)
            if ".indexer.wk." in name or ".indexer.weights_proj." in name:
                fused = name.split(".indexer.")[0] + ".indexer.wk_weights_proj.weight"
            self.names.add(fused)

    def named_parameters(self) -> list[tuple[str, Any]]:
        return [(name, self.parameter(name)) for name in self.names]

    def parameter(self, name: str) -> Any:
        def put(*_args: Any) -> None:
            self.put[name] = self.put.get(name, 0) + 1

        return SimpleNamespace(weight_loader=put)


def load_weights(model: Loading, folder: Path, wrap: Any = lambda method: method) -> set[str]:
    """Run vLLM's `DeepseekV32Model.load_weights` on the tensors of a checkpoint."""
    deepseek_v2 = functions(
        "vllm/model_executor/models/deepseek_v2.py",
        "_try_load_fp8_indexer_wk",
        torch=torch,
        GroupShape=lambda *shape: shape,
        scaled_dequantize=lambda weight, *_args, **_keys: weight,
    )
    utils = functions("vllm/model_executor/models/utils.py", "get_spec_layer_idx_from_weight_name")
    run = method(
        "vllm/models/deepseek_v32/nvidia/model.py",
        "DeepseekV32Model",
        "load_weights",
        torch=torch,
        fused_moe_make_expert_params_mapping=lambda *_args, **_keys: [],
        get_pp_missing_layer_names=lambda _model: [],
        is_pp_missing_parameter=lambda _name, _model: False,
        maybe_remap_kv_scale_name=lambda name, _params: name,
        default_weight_loader=None,
        **vars(deepseek_v2),
        **vars(utils),
    )
    weights = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            weights += [(n, f.get_tensor(n)) for n in f.keys()]  # noqa: SIM118
    kept = [(n, w) for n, w in weights if ".experts." not in n]
    return wrap(run)(model, kept)


@pytest.fixture(scope="module", params=["deepseek_v32", "glm_moe_dsa"])
def checkpoint(request, tmp_path_factory) -> Path:
    folder = write_fp8(tmp_path_factory.mktemp("base") / "b", request.param, num_hidden_layers=4)
    edit_config(folder, num_nextn_predict_layers=2)
    return folder


@needs_wheels
@pytest.mark.parametrize("roles", ["FSFS", "FSSS"])
def test_the_loader_of_vllm_takes_a_pruned_checkpoint_whole(checkpoint, tmp_path, roles):
    result = export(checkpoint, roles, tmp_path / "out", engines=None)
    (folder,) = result.files.get("transformers") or result.files["checkpoint"]
    model = Loading(Path(folder), roles)
    loaded = load_weights(model, Path(folder))
    assert loaded == model.names  # Nothing is missing, and the rest would be a KeyError.
    assert model.put["model.layers.0.self_attn.indexer.wk_weights_proj.weight"] == 2
    assert not any(".layers.1.self_attn.indexer." in name for name in loaded)


@needs_wheels
def test_the_loader_of_vllm_stops_at_surplus_tensors_without_the_plugin(checkpoint):
    with pytest.raises(KeyError, match="indexer"):
        load_weights(Loading(checkpoint, "FSFS"), checkpoint)
    model = Loading(checkpoint, "FSFS")
    assert load_weights(model, checkpoint, without_surplus) == model.names


@needs_wheels
def test_the_loader_of_sglang_drops_what_a_pruned_checkpoint_lacks(checkpoint, tmp_path):
    """It loads either; the pruned one has nothing that it would drop."""
    dropped = condition(
        "sglang/srt/models/deepseek_common/deepseek_weight_loader.py",
        "'.indexer.' in name and name.rsplit('.indexer.', 1)[0] not in indexer_present_prefixes",
    )
    built = {f"model.layers.{i}.self_attn" for i in (0, 2, 4)}  # The last is an MTP layer.

    def lost(folder: Path) -> set[str]:
        names = tensor_names(folder)
        return {n for n in names if dropped(name=n, indexer_present_prefixes=built)}

    result = export(checkpoint, "FSFS", tmp_path / "out", engines=None)
    (folder,) = result.files.get("transformers") or result.files["checkpoint"]
    assert lost(checkpoint) == set(tensor_names(checkpoint)) - set(tensor_names(folder))
    assert lost(checkpoint)
    assert not lost(Path(folder))
