"""Compare the reader of block-scaled FP8 with an independent one, and run every verb on it."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
import torch

from indexcache.checkpoint import read_config
from indexcache.cli import main
from indexcache.exporting.transformers import shard_layout, write
from indexcache.models.fp8 import dequantize
from indexcache.models.lm import hidden_states, token_losses
from indexcache.models.loading import describe, load, open_weights
from indexcache.models.stream.loading import stream_of
from indexcache.models.stream.run import Variant
from indexcache.pattern import Pattern
from tests.fp8_support import (
    FP8,
    e4m3_table,
    edit_config,
    read_otherwise,
    read_raw,
    save_sharded,
    write_fp8,
)
from tests.support import FAMILIES, refused


@pytest.fixture(scope="module", params=FAMILIES)
def fp8_folder(request, tmp_path_factory):
    return write_fp8(tmp_path_factory.mktemp(request.param) / "fp8", request.param)


@pytest.fixture
def damaged(tmp_path):
    """A GLM checkpoint in FP8 that a test may damage, and its tensors."""
    from safetensors.torch import load_file

    folder = write_fp8(tmp_path / "fp8", "glm_moe_dsa")
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return folder, tensors


def expected_state(folder, module):
    """Fuse the experts of an independent reading into the names of the module."""
    arrays = {n: torch.from_numpy(a.copy()) for n, a in read_otherwise(folder).items()}
    out = {}
    for name in module.state_dict():
        if name.endswith(".experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            out[name] = torch.stack(
                [
                    torch.cat([arrays[f"{stem}{e}.{p}.weight"] for p in ("gate_proj", "up_proj")])
                    for e in range(4)
                ]
            )
        elif name.endswith(".experts.down_proj"):
            stem = name.removesuffix("down_proj")
            out[name] = torch.stack([arrays[f"{stem}{e}.down_proj.weight"] for e in range(4)])
        else:
            out[name] = arrays[name]
    return out


def test_the_test_reader_knows_every_value_of_e4m3():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(torch.from_numpy(e4m3_table()).nan_to_num(1e9), every.nan_to_num(1e9))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_equal_an_independent_reading(fp8_folder, dtype):
    module = load(fp8_folder, dtype=dtype).module
    expected = expected_state(fp8_folder, module)
    raw = read_raw(fp8_folder)
    assert raw["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"][:2] == ("F8_E4M3", [576, 64])
    assert raw["model.layers.0.self_attn.kv_b_proj.weight"][:2] == ("F8_E4M3", [192, 512])
    assert any(".layers.3." in n for n in raw), "There is no next-token layer."
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    kinds = {t.dtype for t in module.state_dict().values()}
    assert torch.float8_e4m3fn not in kinds
    assert getattr(module, "hf_quantizer", None) is None
    assert not hasattr(module.config, "quantization_config")


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_those_of_weights_that_transformers_dequantises(family, tmp_path):
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    # transformers takes sizes alone that are multiples of a block.
    folder = write_fp8(
        tmp_path,
        family,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_rope_head_dim=128,
        num_attention_heads=2,
        num_key_value_heads=2,
        index_head_dim=128,
        qk_nope_head_dim=64,
        v_head_dim=64,
    )
    ids = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    expected = token_losses(theirs, hidden_states(theirs, ids), ids)
    ours = load(folder, dtype="float32")
    assert torch.equal(token_losses(ours, hidden_states(ours, ids), ids), expected)
    streamed = load(folder, dtype="float32", stream=True)
    found = []
    stream_of(streamed).run(
        [Variant(Pattern("FFF"))],
        [ids],
        lambda finals: found.append(token_losses(streamed, finals.get(0, 0), ids)),
    )
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (256, 300), (576, 192), (3, 5)])
@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
def test_blocks_at_every_edge(shape, block):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1]), generator=generator)
    got = dequantize(weight, scales, block)
    for r in {0, shape[0] // 2, shape[0] - 1}:
        for c in {0, shape[1] // 2, shape[1] - 1}:
            assert got[r, c] == weight[r, c].float() * scales[r // block[0], c // block[1]]
    stacked = dequantize(torch.stack([weight] * 2), torch.stack([scales, 2 * scales]), block)
    assert torch.equal(stacked, torch.stack([got, 2 * got]))


def test_long_matrices_are_dequantised_in_pieces(monkeypatch):
    weight = torch.randn(576, 130).to(torch.float8_e4m3fn)
    scales = torch.rand(5, 2)
    whole = dequantize(weight, scales, (128, 128))
    monkeypatch.setattr("indexcache.models.fp8.ELEMENTS", 1)
    assert torch.equal(dequantize(weight, scales, (128, 128)), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_blocks_are_dequantised_into_a_place(dtype, monkeypatch):
    """They take another way than partial blocks, and than a place with gaps."""
    monkeypatch.setattr("indexcache.models.fp8.ELEMENTS", 128 * 256)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(384, 256, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, generator=generator)
    whole = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    expected = (weight.float() * whole).to(dtype)
    for place in (torch.empty(2, 384, 256, dtype=dtype)[1], torch.empty(256, 384, dtype=dtype).T):
        found = dequantize(weight, scales, (128, 128), dtype, place)
        assert found is place
        assert torch.equal(place, expected)


def test_scales_in_e8m0_and_fused_experts_are_read(damaged):
    folder, tensors = damaged
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        tensors[name] = tensors[name].to(torch.float8_e8m0fnu)
    save_sharded(folder, tensors, 3)
    module = load(folder).module
    expected = expected_state(folder, module)
    state = module.state_dict()
    assert all(torch.equal(state[n], expected[n]) for n in state)

    stem = "model.layers.1.mlp.experts."
    for suffix in ("weight", "weight_scale_inv"):
        per = {
            part: [tensors.pop(f"{stem}{e}.{part}.{suffix}") for e in range(4)]
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        end = suffix.removeprefix("weight")
        # 160 rows are no whole blocks, so gate and up cannot lie in one matrix; down can.
        tensors[f"{stem}down_proj{end}"] = torch.stack(per["down_proj"])
        for e in range(4):
            for part in ("gate_proj", "up_proj"):
                tensors[f"{stem}{e}.{part}.{suffix}"] = per[part][e]
    save_sharded(folder, tensors, 3)
    state = load(folder).module.state_dict()
    assert all(torch.equal(state[n], expected[n]) for n in state)


def test_tensors_can_be_read_layer_by_layer(fp8_folder):
    weights = open_weights(describe(fp8_folder))
    expected = read_otherwise(fp8_folder)
    names = weights.layer(1)
    assert names
    assert {n for i in range(3) for n in weights.layer(i)} == {
        n for n in expected if "layers." in n and "layers.3." not in n
    }
    for name in names:
        got = weights.read(name, dtype=torch.bfloat16)
        assert torch.equal(got, torch.from_numpy(expected[name].copy()).bfloat16())
    assert set(weights.mtp) == {n for n in expected if "layers.3." in n}
    for name in weights.mtp:
        assert torch.equal(weights.read(name).float(), torch.from_numpy(expected[name].copy()))


def write_text(folder, documents=16):
    letters = np.random.default_rng(0).integers(97, 123, (documents, 140)).tolist()
    rows = [{"text": "".join(map(chr, line))} for line in letters]
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompt.txt").write_text("hello")
    return path


VERBS = [
    "inspect {m}",
    "evaluate {m} --pattern FSF --data {t} --length 32 --sequences 2",
    "overlap {m} --data {t} --length 32 --sequences 2 --out {o}/overlap",
    "search {m} --data {t} --length 32 --sequences 2 --keep 1/2 --out {o}/search",
    "distill {m} --data {t} --pattern FSF --length 32 --steps 1 --out {o}/distilled",
    "export {m} --pattern FSF --engine vllm --out {o}/export",
    "bench {m} --patterns FSF --contexts 32 --decode-tokens 2 --no-plot",
    "generate {m} --prompt-file {o}/prompt.txt --pattern FSF --max-new-tokens 2",
    "plan {m} --gpu H200 --context 256 --output-tokens 8 --price 3",
    "doctor {m} --engine sglang --pattern FSF",
    "evaluate {m} --stream --pattern FSF FRF@2 --data {t} --length 32 --sequences 2",
    "overlap {m} --stream --data {t} --length 32 --sequences 2 --out {o}/streamed",
    "search {m} --stream --data {t} --length 32 --sequences 2 --keep 1/2 --out {o}/streamed",
    "distill {m} --stream --data {t} --pattern FSF --length 32 --steps 1 --out {o}/streamed",
]
NAMES = [" ".join(w for w in v.split() if w in (v.split()[0], "--stream")) for v in VERBS]
CERTIFY = (
    "evaluate {m} --stream --pattern FSF --data {t} --split all --length 32 --sequences 40 "
    "--batch 40 --allow-blind --most 100 --out {o} --certificate"
)


def test_a_certificate_holds_for_a_checkpoint_in_fp8(fp8_folder, tmp_path, capsys):
    text = write_text(tmp_path, 40)
    doctor = "doctor {m} --engine sglang --certificate {o}/certificate.json"
    for verb in (CERTIFY, doctor):
        code = main(shlex.split(verb.format(m=fp8_folder, t=text, o=tmp_path)))
        assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS, ids=NAMES)
def test_every_verb_runs(fp8_folder, tmp_path, verb, capsys):
    text = write_text(tmp_path)
    command = shlex.split(verb.format(m=fp8_folder, t=text, o=tmp_path))
    code = main(command)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    if verb.startswith("inspect"):
        assert "fp8" in captured.out
        assert "128 x 128" in captured.out


def test_export_keeps_fp8_and_prunes_scales_with_their_weights(fp8_folder, tmp_path):
    pattern = Pattern("FSF")
    shards = shard_layout(fp8_folder, pattern, prune=True)
    write(fp8_folder, read_config(fp8_folder), pattern, shards, tmp_path / "out")
    before, after = read_raw(fp8_folder), read_raw(tmp_path / "out")
    gone = {n for n in before if n not in after}
    assert gone == {n for n in before if "layers.1.self_attn.indexer." in n}
    assert any(n.endswith("_scale_inv") for n in gone)
    assert all(after[n] == before[n] for n in after)
    config = read_config(tmp_path / "out")
    assert config["quantization_config"] == FP8
    if config["model_type"] == "glm_moe_dsa":
        module = load(tmp_path / "out").module
        assert module.model.layers[1].self_attn.indexer is None


REFUSED = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "auto-round": {"quant_method": "auto-round", "bits": 4},
    "quark": {"quant_method": "quark"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "mxfp4": {"quant_method": "mxfp4"},
    "torchao": {"quant_method": "torchao", "quant_type": "int8"},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
    "static": FP8 | {"activation_scheme": "static"},
    "e5m2": FP8 | {"fmt": "e5m2"},
    "whole tensor": FP8 | {"weight_block_size": None},
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_other_quantisation_is_refused_by_name_before_loading(
    fp8_folder, name, tmp_path, monkeypatch, capsys
):
    import shutil

    folder = shutil.copytree(fp8_folder, tmp_path / "copy")
    edit_config(folder, quantization_config=REFUSED[name])
    monkeypatch.setattr("indexcache.models.loading.Weights", None)  # Nothing may be opened.
    refused(lambda: load(folder), str(folder), name, "not read here")
    assert main(["inspect", str(folder)]) == 0
    assert "not read here" in capsys.readouterr().out


def test_fp8_that_nobody_would_scale_is_refused(damaged):
    folder, tensors = damaged
    edit_config(folder, quantization_config=None)
    refused(lambda: load(folder), "_scale_inv would be read by nobody", "no quantization_config")
    edit_config(folder, quantization_config=FP8)
    name = "model.layers.0.self_attn.o_proj.weight"

    def changed(**changes):
        kept = {n: t for n, t in (tensors | changes).items() if t is not None}
        save_sharded(folder, kept, 3)
        return lambda: load(folder)

    scale = f"{name}_scale_inv"
    good = tensors[scale]
    refused(changed(**{scale: None}), name, "no scales")
    refused(changed(**{name: tensors[name].float()}), scale, "by nobody")
    refused(changed(**{scale: good[:, :0].contiguous()}), scale, "[1, 1]")
    refused(changed(**{name: tensors[name].flatten()}), name, "no matrix")
    refused(changed(**{scale: good.double()}), scale, "F64")
    refused(changed(**{scale: good * float("nan")}), scale, "NaN")
    refused(changed(**{scale: -good}), scale, "negative")
    refused(changed(**{scale: 0 * good}), scale, "0 for a block")
    refused(changed(**{name: tensors[name].view(torch.int8)}), name, "I8")
    refused(changed(**{name: tensors[name].view(torch.float8_e5m2)}), name, "F8_E5M2")


def test_scales_of_one_tensor_are_refused_by_what_they_are(damaged):
    folder, tensors = damaged
    edit_config(folder, quantization_config=None)
    per_tensor = {
        n.replace("_scale_inv", "_scale"): t.amax() if n.endswith("_scale_inv") else t
        for n, t in tensors.items()
    }
    save_sharded(folder, per_tensor, 3)
    refused(lambda: load(folder), "F8_E4M3", "no quantization_config")
    # The weights were converted to bf16, the scales left.
    save_sharded(
        folder,
        {n: t.bfloat16() if t.dtype == torch.float8_e4m3fn else t for n, t in per_tensor.items()},
        3,
    )
    refused(lambda: load(folder), "by nobody", "weight_scale", "a scale of FP8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_on_a_gpu(fp8_folder, tmp_path, dtype):
    """The weights on the GPU equal an independent reading, and an evaluation runs."""
    from indexcache.models.fast.accelerate import accelerate

    weights = open_weights(describe(fp8_folder))
    for name in weights.scales:
        assert torch.equal(weights.read(name, device="cuda").cpu(), weights.read(name))
    loaded = load(fp8_folder, dtype=dtype, device="cuda")
    expected = expected_state(fp8_folder, loaded.module)
    for name, tensor in loaded.module.state_dict().items():
        assert tensor.is_cuda
        assert torch.equal(tensor.cpu(), expected[name].to(tensor.dtype)), name
    accelerate(loaded.module)
    text = write_text(tmp_path)
    command = (
        f"evaluate {fp8_folder} --pattern FSF --data {text} --length 32 "
        f"--sequences 2 --device cuda --dtype {dtype}"
    )
    assert main(shlex.split(command)) == 0
