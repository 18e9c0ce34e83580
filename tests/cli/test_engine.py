"""Check verbs with `--engine vllm` over stand-ins, and what they say where it cannot run."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from indexcache.cli import main
from indexcache.engines.vllm import engine as module
from tests.stand_ins import FakeLlm, TorchLlm, worker
from tests.support import make_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model("glm_moe_dsa").save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    lines = [json.dumps({"ids": [(7 * i + j) % 128 for j in range(1100)]}) for i in range(3)]
    path = tmp_path / "ids.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def vllm(monkeypatch):
    started = []

    def llm(model, **arguments):
        started.append(arguments)
        if arguments.get("quantization") == "nonsense":
            raise RuntimeError("Engine core initialization failed.\nSee root cause above.")
        return FakeLlm([worker()])

    stand_in = SimpleNamespace(LLM=llm, SamplingParams=lambda **kw: kw, __spec__=object())
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "0.33.0")
    return started


def run(checkpoint, text, out, *flags):
    base = ["search", str(checkpoint), "--data", str(text), "--split", "all", "--sequences", "2"]
    return main([*base, "--out", str(out), "--engine", "vllm", *flags])


def test_a_search_runs_in_the_engine(checkpoint, text, vllm, tmp_path, capsys):
    flags = ["--keep", "1/2", "--engine-arg", "gpu_memory_utilization=0.8"]
    assert run(checkpoint, text, tmp_path / "run", *flags) == 0
    arguments = vllm[0]
    assert arguments["enforce_eager"]
    assert not arguments["enable_prefix_caching"]
    assert (arguments["max_num_seqs"], arguments["gpu_memory_utilization"]) == (1, 0.8)
    assert arguments["max_model_len"] == 513
    said = capsys.readouterr()
    assert "vLLM 0.33.0" in said.err
    assert "bfloat16 on cpu, vllm path" in said.out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["frontier"][-1]["full"] == 3
    assert result["conditions"]["versions"]["vllm"] == "0.33.0"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "bfloat16"], "--dtype is a setting of this package's own path"),
        (["--no-fast"], "--fast is a setting of this package's own path"),
        (["--engine-arg", "enforce_eager=false"], "enforce_eager cannot be chosen"),
        (["--engine-arg", "quantization=nonsense"], "vLLM could not start"),
        (["--stages", "2"], "--stages 2 does not fit vLLM"),
        (["--tensor-parallel-size", "0"], "--tensor-parallel-size must be at least 1, not 0"),
        (["--pipeline-parallel-size", "-1"], "--pipeline-parallel-size must be at least 1"),
        (["--engine-arg", "logprobs_mode=raw_logits"], "logprobs_mode cannot be given"),
        (["--engine-arg", "dtype=a", "--engine-arg", "dtype=b"], "dtype is given twice"),
    ],
)
def test_what_does_not_fit_the_engine_is_refused(
    checkpoint, text, vllm, tmp_path, capsys, flags, message
):
    assert run(checkpoint, text, tmp_path / "run", *flags) == 2
    assert message in capsys.readouterr().err


def test_settings_of_an_engine_need_it(checkpoint, text, tmp_path, capsys):
    base = ["search", str(checkpoint), "--data", str(text), "--out", str(tmp_path / "run")]
    assert main([*base, "--tensor-parallel-size", "8"]) == 2
    assert "--tensor-parallel-size is a setting of vLLM; add --engine vllm" in (
        capsys.readouterr().err
    )


def test_without_vllm_the_verb_says_how_to_get_it(checkpoint, text, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name)
    )
    assert run(checkpoint, text, tmp_path / "run") == 2
    assert "pip install indexcache[vllm]" in capsys.readouterr().err


@pytest.fixture
def torch_vllm(checkpoint, vllm, monkeypatch):
    """A vLLM that runs the checkpoint."""

    def llm(model, **arguments):
        vllm.append(arguments)
        return TorchLlm(make_model("glm_moe_dsa"), [worker()])

    monkeypatch.setattr(sys.modules["vllm"], "LLM", llm)
    return vllm


def evaluate(checkpoint, text, *flags):
    base = ["evaluate", str(checkpoint), "--data", str(text), "--split", "all", "--length", "40"]
    return main([*base, "--engine", "vllm", *flags])


def test_evidence_comes_from_the_engine(checkpoint, tmp_path, torch_vllm, capsys):
    text = tmp_path / "ids.jsonl"
    rows = np.random.default_rng(0).integers(0, 128, (40, 50)).tolist()
    text.write_text("\n".join(json.dumps({"ids": row}) for row in rows))
    out = tmp_path / "out"
    flags = ["--pattern", "FSSFSS", "FSFFSS", "--out", str(out), "--against", "FFFFSF"]
    assert evaluate(checkpoint, text, *flags, "--most", "0.5", "--allow-blind") == 0
    assert torch_vllm[0]["max_logprobs"] == 64
    said = capsys.readouterr()
    assert "vllm path, indexcache" in said.out
    assert "lower bound of the KL" in said.out
    assert "The gate is passed" in said.out
    found = json.loads((out / "evidence.json").read_text())
    assert (found["path"], found["noise"], found["engine"]["vllm"]) == ("vllm", 0, "0.33.0")
    assert found["baseline"] == "FFFFSF"
    assert len(found["rows"]) == 4
    assert found["gate"]["passed"]
    assert evaluate(checkpoint, text, *flags, "--most", "-0.5", "--allow-blind") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["FRRFRR@2"], "FRRFRR@2 cannot run in vLLM: Layer 1 is R (re-index)"),
        (["FSSFSS", "--against", "1/2+R2"], "but the engine knows only F and S"),
        (["FSSSSF", "--pipeline-parallel-size", "2"], "A pipeline stage begins at layer 3"),
        (["FSSFSS", "--pipeline-parallel-size", "9"], "cannot be cut into 9 pipeline stages"),
        (["FSSFSS", "--delta", "d.safetensors"], "--delta cannot be given with --engine vllm"),
        (["FSSFSS", "--device", "cuda"], "--device is a setting of this package's own path"),
        (["FSSFSS", "--engine-arg", "max_num_seqs=8"], "max_num_seqs cannot be chosen"),
    ],
)
def test_an_evaluation_that_the_engine_cannot_run_is_refused_before_it_starts(
    checkpoint, text, torch_vllm, capsys, flags, message
):
    assert evaluate(checkpoint, text, "--pattern", *flags) == 2
    assert message in capsys.readouterr().err
    assert not torch_vllm


def test_without_vllm_an_evaluation_says_how_to_get_it(checkpoint, text, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name)
    )
    assert evaluate(checkpoint, text, "--pattern", "FSSFSS") == 2
    assert "pip install indexcache[vllm]" in capsys.readouterr().err
