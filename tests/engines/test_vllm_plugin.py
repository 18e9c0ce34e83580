"""Check the plugin over a stand-in for vLLM that has the shape of its modules and their faults."""

import importlib
import logging
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from indexcache.engines.vllm import plugin

DECODER = """
class DeepseekV32Model:
    def __init__(self, *, vllm_config, prefix=""):
        self.config = vllm_config.model_config.hf_config
        pattern = getattr(self.config, "index_topk_pattern", None) or "F" * 4
        self.names = [f"layers.{i}.self_attn.o_proj.weight" for i in range(4)]
        self.names += [
            f"layers.{i}.self_attn.indexer.{part}.weight"
            for i in range(4) if pattern[i] == "F" for part in ("wq_b", "k_norm")
        ]

    def named_parameters(self):
        return [(name, None) for name in self.names]

    def load_weights(self, weights):
        params = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            params[name]
            loaded.add(name)
        return loaded
"""
CONFIG = """
class VllmConfig:
    def __init__(self, model_config, parallel_config):
        self.model_config = model_config
        self.parallel_config = parallel_config
        self.try_verify_and_update_config()

    def try_verify_and_update_config(self):
        pass
"""
UTILS = """
def get_pp_indices(layers, rank, size):
    each = layers // size
    return rank * each, (rank + 1) * each
"""
FILES = {
    "models/deepseek_v32/nvidia/model.py": DECODER,
    "config/vllm.py": CONFIG,
    "distributed/utils.py": UTILS,
    "models/other.py": "class Other: pass",
}
NAMES = [f"layers.{i}.self_attn.o_proj.weight" for i in range(4)] + [
    f"layers.{i}.self_attn.indexer.{p}.weight" for i in range(4) for p in ("wq_b", "k_norm")
]


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """Put a stand-in for vLLM on the path, and forget it and the plugin's finder afterwards."""
    for name, text in FILES.items():
        path = tmp_path / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        for folder in path.relative_to(tmp_path).parents:
            if folder.name:
                (tmp_path / folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(plugin.metadata, "version", lambda name: "0.33.0")
    yield tmp_path
    for name in [n for n in sys.modules if n == "vllm" or n.startswith("vllm.")]:
        del sys.modules[name]


class Config:
    def __init__(self, **keys):
        self.__dict__.update({"num_hidden_layers": 4, "index_topk": 8, **keys})

    def to_dict(self):
        return {k: v.to_dict() if isinstance(v, Config) else v for k, v in self.__dict__.items()}


def model_config(**keys):
    config = Config(**keys)
    return SimpleNamespace(
        hf_config=config, hf_text_config=config, model="absent", served_model_name="m"
    )


def vllm_config(stages=1, **keys):
    parallel = SimpleNamespace(pipeline_parallel_size=stages)
    return SimpleNamespace(model_config=model_config(**keys), parallel_config=parallel)


def decoder():
    return importlib.import_module("vllm.models.deepseek_v32.nvidia.model").DeepseekV32Model


def test_without_the_plugin_a_shared_pattern_stops_at_a_surplus_tensor(vllm):
    model = decoder()(vllm_config=vllm_config(index_topk_pattern="FSFS"))
    with pytest.raises(KeyError, match=r"layers\.1\.self_attn\.indexer"):
        model.load_weights((n, None) for n in NAMES)


@pytest.mark.parametrize("early", [True, False], ids=["before the import", "after the import"])
def test_surplus_indexer_tensors_are_left_out(vllm, early):
    if not early:
        decoder()
    plugin.register()
    plugin.register()  # vLLM may call it more than once.
    model = decoder()(vllm_config=vllm_config(index_topk_pattern="FSFS"))
    loaded = model.load_weights((n, None) for n in NAMES)
    assert loaded == {n for n in NAMES if "indexer" not in n or n[7] in "02"}
    full = decoder()(vllm_config=vllm_config())
    assert full.load_weights((n, None) for n in NAMES) == set(NAMES)
    with pytest.raises(KeyError, match="surprise"):  # Other unknown tensors still stop it.
        full.load_weights([("layers.0.surprise", None)])


def test_other_modules_are_imported_as_they_are(vllm):
    plugin.register()
    assert "vllm" not in sys.modules
    other = importlib.import_module("vllm.models.other")
    assert not hasattr(other.Other, "_indexcache")


def test_a_wrong_pattern_stops_before_the_layers_are_built(vllm):
    plugin.register()
    with pytest.raises(ValueError, match="has 3 roles, but the model has 4 layers"):
        decoder()(vllm_config=vllm_config(index_topk_pattern="FSS"))
    with pytest.raises(ValueError, match="layer 2, the first of a pipeline stage"):
        decoder()(vllm_config=vllm_config(stages=2, index_topk_pattern="FFSS"))


def test_the_process_that_was_started_checks_and_logs_once(vllm, caplog):
    plugin.register()
    cls = importlib.import_module("vllm.config.vllm").VllmConfig
    parallel = SimpleNamespace(pipeline_parallel_size=1)
    with caplog.at_level(logging.INFO, logger="vllm.indexcache"):
        config = cls(model_config(index_topk_pattern="FSFS"), parallel)
        config.try_verify_and_update_config()
        cls(model_config(), parallel)
    assert [r.message for r in caplog.records] == ["2 of 4 layers run their indexer: FSFS"]
    with pytest.raises(ValueError, match="indexer_types alone"):
        cls(model_config(indexer_types=["full", "shared"] * 2), parallel)


def test_an_untested_version_is_warned_of(vllm, monkeypatch, caplog):
    monkeypatch.setattr(plugin.metadata, "version", lambda name: "0.51.2")
    plugin.register()
    cls = importlib.import_module("vllm.config.vllm").VllmConfig
    with caplog.at_level(logging.INFO, logger="vllm.indexcache"):
        cls(model_config(index_topk_pattern="FSFS"), SimpleNamespace(pipeline_parallel_size=1))
    assert "0.25 to 0.33, not with 0.51.2" in caplog.records[0].message


def test_a_model_without_an_indexer_is_left_alone(vllm):
    plugin.register()
    decoder()(vllm_config=vllm_config(index_topk=None, index_topk_freq=3))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "hy_v4", "indexer_types": ["full", "shared"] * 2}, None),  # as published
        ({"model_type": "hy_v4"}, None),
        ({"model_type": "hy_v4_mtp", "indexer_types": ["full", "shared"] * 2}, None),
        ({"model_type": "deepseek_mtp", "index_topk_pattern": "FS"}, None),  # a draft
        ({"model_type": "glm5_next", "layer_types": ["linear_attention"] * 4}, None),
        ({"model_type": "deepseek_v41", "index_source_layer_ids": [0]}, None),
        ({"model_type": "hy_v4", "index_topk_pattern": "FSFS"}, "asks for FSFS, .* indexer_types"),
        ({"model_type": "glm5_next", "index_topk_freq": 2, "layer_types": [""] * 4}, "no key that"),
    ],
)
def test_other_families_start_unless_a_key_is_ignored(vllm, keys, message):
    """Hy4 shares by indexer_types, which the classes of V3.2 and GLM ignore."""
    plugin.register()
    cls = importlib.import_module("vllm.config.vllm").VllmConfig
    parallel = SimpleNamespace(pipeline_parallel_size=1)
    if message is None:
        cls(model_config(**keys), parallel)
    else:
        with pytest.raises(ValueError, match=message):
            cls(model_config(**keys), parallel)


def test_types_that_transformers_computed_are_no_disagreement(vllm, tmp_path):
    """GlmMoeDsaConfig fills indexer_types for a config.json that gives none."""
    plugin.register()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"num_hidden_layers": 4, "index_topk": 8}')
    computed = {"index_topk_pattern": "FSFS", "indexer_types": ["full"] * 4}
    config = vllm_config(**computed)
    config.model_config.model = str(folder)
    config.model_config.hf_overrides = {"index_topk_pattern": "FSFS"}
    assert str(plugin.check_vllm(config)) == "FSFS"
    config.model_config.hf_overrides = computed
    with pytest.raises(ValueError, match="disagrees"):
        plugin.check_vllm(config)


def test_weights_of_a_local_checkpoint_are_asked(vllm, tmp_path):
    from safetensors.torch import save_file

    plugin.register()
    folder = tmp_path / "pruned"
    folder.mkdir()
    (folder / "config.json").write_text('{"num_hidden_layers": 4, "index_topk": 8}')
    save_file(
        {f"model.layers.{i}.self_attn.indexer.wk.weight": torch.zeros(1) for i in (0, 2)},
        folder / "model.safetensors",
    )
    config = vllm_config(index_topk_pattern="FSFS")
    config.model_config.model = str(folder)
    assert str(plugin.check_vllm(config)) == "FSFS"
    config = vllm_config(index_topk_pattern="FFSS")
    config.model_config.model = str(folder)
    with pytest.raises(ValueError, match="makes layer 1 full"):
        plugin.check_vllm(config)
