"""Test what a distillation refuses and says, and its verb."""

from __future__ import annotations

import copy
import errno
import json
import re
import resource
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from indexcache import Pattern, use_pattern
from indexcache.cli import main
from indexcache.distilling import DistillSettings, apply_delta, distill, pack_rows
from indexcache.distilling.delta import FORMAT, save_checkpoint, save_delta
from indexcache.models.family import indexers
from tests.distilling import worker
from tests.distilling.worker import steps
from tests.support import make_model, one_line, refused

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_delta_that_is_not_whole_is_refused(tmp_path):
    model = make_model("glm_moe_dsa")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    path = tmp_path / "delta.safetensors"
    save_delta(make_model("glm_moe_dsa", seed=1), Pattern("FSSFSS"), path, {})
    tensors = load_file(path)
    wk = "model.layers.3.self_attn.indexer.wk.weight"

    def write(changed, pattern="FSSFSS"):
        save_file(changed, path, metadata={"format": FORMAT, "pattern": pattern})
        return lambda: apply_delta(model, path)

    refused(write({}), "no whole indexer", "layer 0")
    refused(
        write({name: v for name, v in tensors.items() if name != wk}), "no whole indexer", "layer 3"
    )
    refused(write(tensors, "FFSFSS"), "no whole indexer", "layer 1")
    refused(write(tensors | {wk: torch.full_like(tensors[wk], torch.nan)}), wk, "not finite")
    pruned = make_model("glm_moe_dsa", indexer_types=["full", "shared"] * 3)
    refused(lambda: apply_delta(pruned, path), "no place")
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    write(tensors)()


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", None])
@pytest.mark.parametrize("kind", ["state", "best", "journal"])
def test_a_damaged_run_is_refused(kind, file, tmp_path):
    run = tmp_path / "run"
    worker.train(run, "warmup", pattern="FSSSSS", steps=2, eval_every=1)
    if kind == "journal":
        lines = (run / "journal.jsonl").read_text().splitlines()
        damaged = {".metadata": lines[:-1], "__0_0.distcp": [lines[0], "{}", *lines[1:]], None: []}
        (run / "journal.jsonl").write_text("".join(line + "\n" for line in damaged[file]))
        words = ["all steps up to the 2"]
    else:
        (folder,) = run.glob(f"{kind}-*")
        words = [folder.name, "cannot be read", "begins again"]
        if file is None:
            shutil.rmtree(folder)
            words = ["best-0", "is missing"]
            if kind == "state":  # The run then begins again.
                worker.train(run, "warmup", pattern="FSSSSS", steps=2, eval_every=1)
                return
        else:
            (folder / file).write_bytes((folder / file).read_bytes()[:100])
    with pytest.raises(ValueError, match=words[0]) as caught:
        worker.train(run, "warmup", pattern="FSSSSS", steps=2, eval_every=1)
    one_line(caught.value, *words)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "when", "kept"),
    [(4, "at step 6", 3), (5, "at step 7", 3), (6, "after the last step", 6)],
)
def test_a_loss_that_is_not_finite_keeps_the_last_good_state(
    bad, when, kept, tmp_path, monkeypatch
):
    """Step 6 ruins the weights that would be saved next, and step 7 those of the result."""
    lr_scale = DistillSettings.lr_scale
    monkeypatch.setattr(
        DistillSettings,
        "lr_scale",
        lambda self, step: 1e30 if step == bad else lr_scale(self, step),
    )
    refused(
        lambda: worker.train(tmp_path / "run", "warmup", eval_every=0),
        f"not finite {when}",
        f"state-0000000{kept}",
        "--lr",
    )
    assert [e["step"] for e in steps(tmp_path / "run")[0]] == list(range(1, bad + 2))
    assert [p.name for p in (tmp_path / "run").glob("state-*")] == [f"state-0000000{kept}"]
    assert not (tmp_path / "run" / "delta.safetensors").exists()


def test_disk_errors_are_raised_as_oserrors(tmp_path):
    """torch and safetensors wrap the error. A limit on file sizes stands for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = make_model("glm_moe_dsa")
    calls = {
        "state.part": lambda: worker.train(tmp_path / "run", "warmup", eval_every=0),
        "whole": lambda: save_checkpoint(
            model, dict(model.state_dict()), tmp_path / "whole", tmp_path
        ),
    }
    for name, call in calls.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
        try:
            with pytest.raises(OSError, match=name) as caught:
                call()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.errno == errno.EFBIG
    assert not list((tmp_path / "run").glob("state-*"))
    worker.train(tmp_path / "run", "warmup", eval_every=0)  # The same command goes on.


def test_unusable_settings_models_and_texts_are_refused(tmp_path, monkeypatch):
    refused(
        lambda: worker.train(tmp_path / "w", "warmup", layer_weights=(1.0, 2.0)),
        "2 layer weights for 6 layers",
    )
    refused(lambda: DistillSettings(layer_weights=(1.0, 0.0)).check(), "above 0")
    refused(lambda: DistillSettings(layer_weights=(1.0, 1e308)).check(), "at most 1e+30")
    refused(lambda: DistillSettings(layer_weights=(1.0, 1.0), objective="own").check(), "loss own")
    refused(
        lambda: worker.train(tmp_path / "w", "warmup", pattern="FFFFFF", layer_weights=(1.0,) * 6),
        "no two layers",
    )
    model = make_model("glm_moe_dsa")
    rows = pack_rows(worker.documents(), 96)
    out = tmp_path / "run"

    def call(pattern="FSSFSS", rows=rows, model=model, held_out=(), **settings):
        return lambda: distill(
            model,
            pattern,
            rows,
            out,
            DistillSettings(**({"eval_every": 0} | settings)),
            held_out=held_out,
        )

    refused(call("FSSF"), "4 layers", "model has 6")
    refused(call(rows=pack_rows(worker.documents(), 20)), "too short for this model")
    refused(call(rows=[]), "at least one")
    refused(call(eval_every=1), "no held-out text")
    refused(call(stage="dense"), "warmup, sparse")
    refused(call(objective="sum"), "multi, avg, own")
    refused(call(steps=0), "at least 1")
    refused(call(lr=-1.0), "above 0")
    refused(call(lr=3e38), "at most 1e+30")
    with use_pattern(model, "FSSFSS"):
        refused(call(), "leave use_pattern")
    pruned = make_model("glm_moe_dsa", indexer_types=["full", "shared"] * 3)
    refused(call("FFSFSS", model=pruned), "Layer 1 is F", "no indexer weights")
    refused(
        call(stage="sparse", model=copy.deepcopy(model).bfloat16()), "float32", "--freeze-backbone"
    )
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(call(rows=rows, steps=1), "4 rows", "3 processes")
    assert not out.exists()


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text(
        "\n".join(
            json.dumps(
                {"text": f"{i} " + "".join(chr(97 + (i * j * j + j) % 26) for j in range(300))}
            )
            for i in range(16)
        )
    )
    return path


SMALL = shlex.split("--length 64 --batch-tokens 128 --steps 3 --eval-every 3 --eval-sequences 2")


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_command_writes_what_stock_transformers_loads(stage, checkpoint, text, tmp_path, capsys):
    import transformers

    more = "--whole --layer-weights 1,1,6,1,1,6" if stage == "warmup" else "--backbone-lr 1e-3"
    command = (
        f"distill {checkpoint} --data {text} --pattern uniform:1/3 --out {tmp_path / 'r'} "
        f"--stage {stage} {more} --json"
    ).split() + SMALL
    assert main(command) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["pattern"] == "FSSFSS"
    assert ("3 4 5  0.12 0.12 0.75" in out) == (stage == "warmup")
    assert (tmp_path / "r" / "delta.safetensors").exists() == (stage == "warmup")
    folder = tmp_path / "r" / "checkpoint" / "transformers"
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert stock.config.indexer_types == ["full", "shared", "shared"] * 2
    assert [indexer is None for indexer in indexers(stock)] == [False, True, True] * 2
    ids = torch.randint(0, 128, (1, 64), generator=torch.Generator().manual_seed(0))
    ours = make_model("glm_moe_dsa")
    if stage == "warmup":
        apply_delta(ours, tmp_path / "r" / "delta.safetensors", base=checkpoint)
        with use_pattern(ours, "FSSFSS"), torch.no_grad():
            assert torch.equal(stock(ids).logits, ours(ids).logits)
        refused(
            lambda: apply_delta(ours, tmp_path / "r" / "delta.safetensors", base=folder),
            "another checkpoint",
        )
        delta = tmp_path / "r" / "delta.safetensors"
        sparse = f"--stage sparse --freeze-backbone --delta {delta} --out".split()
        assert main([*command, *sparse, str(tmp_path / "s")]) == 0
        later = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert later["held_out"]["first"] == pytest.approx(result["held_out"]["best"], abs=1e-6)
        assert main([*command, *sparse, str(tmp_path / "t"), "--pattern", "FSFFSS"]) == 0
        assert "has no indexer of the layers 2; they begin" in capsys.readouterr().err
    else:
        assert not torch.equal(
            stock.model.layers[1].self_attn.o_proj.weight,
            ours.model.layers[1].self_attn.o_proj.weight,
        )
        with torch.no_grad():
            assert torch.isfinite(stock(ids).logits).all()
    assert main(command) == 0  # Nothing is trained twice.
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["held_out"] == result["held_out"]


def test_command_refuses_in_one_sentence(checkpoint, text, tmp_path, capsys):
    def says(what, *argv, model=checkpoint):
        assert main([str(a) for a in ("distill", model, "--out", tmp_path / "r", *argv)]) == 2
        captured = capsys.readouterr()
        (line,) = [x for x in captured.err.splitlines() if x.startswith("indexcache: ")]
        assert what in line, line

    base = ["--data", text, "--pattern", "FSSFSS", *SMALL]
    says("distill needs --pattern", "--data", text)
    says("4 layers, but the model has 6", *base, "--pattern", "FSSF")
    says("Layer 0 of the pattern is S", *base, "--pattern", "SSSSSS")
    says("Give the text with --data", "--pattern", "FSSFSS")
    says("too short for this model", *base, "--length", "16")
    says("longer than the model's context", *base, "--length", "4096")
    says("multiple of the 64 tokens", *base, "--batch-tokens", "100")
    says("training text too", *base, "--held-out", text)
    says("no such checkpoint folder", *base, model=tmp_path / "nowhere")
    says('"warmup", "sparse"', *base, "--stage", "dense")
    says("steps must be at least 1", *base, "--steps", "0")
    says("at most 1e+30, not nan", *base, "--layer-weights", "1,1,1,1,1,nan")
    says("no finished run", *base, "--layer-weights", tmp_path)
    says("too short for this model", *base, "--length", "0")
    says("'gpu' cannot be used here", *base, "--stage", "sparse", "--device", "gpu")
    says("File name too long", *base, "--data", tmp_path / ("x" * 300))
    assert not (tmp_path / "r").exists()
    assert main([str(a) for a in ("distill", checkpoint, "--out", tmp_path / "r", *base)]) == 0
    capsys.readouterr()
    says("leave out --no-resume", *base, "--no-resume")
    says("other settings", *base, "--seed", "1")


def test_documented_commands_run(tmp_path, monkeypatch, capsys):
    """Run the first commands of docs/distill.md, with fewer steps and shorter rows."""
    document = (Path(__file__).parents[2] / "docs" / "distill.md").read_text(encoding="utf-8")
    block = re.findall(r"```sh\n(.*?)```", document, re.DOTALL)[0].replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    smaller = {"20": "1", "512": "256"}
    monkeypatch.chdir(tmp_path)
    for program, *arguments in filter(None, commands):
        assert program == "indexcache"
        arguments = [smaller.get(a, a) for a in arguments]
        assert main([*arguments, "--eval-every", "0"]) == 0, capsys.readouterr().err
    assert {path.parent.name for path in tmp_path.rglob("delta.safetensors")} == {"d4", "s4"}
