"""Run EleutherAI's harness on local tasks of its three kinds, beside its own class."""

from __future__ import annotations

import builtins
import json
import shutil

import pytest

from indexcache.cli import main as indexcache
from indexcache.evals import lm_eval as command
from tests.support import refused

PATTERN = "FSSFSS"
TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{[a, b]}}",
        "metric_list": [{"metric": "acc"}],
    },
    "roll": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["zz"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def test_without_the_harness_one_sentence_says_what_to_install(monkeypatch, capsys):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert command.main(["--tasks", "choose"]) == 2
    assert "indexcache[lm-eval]" in capsys.readouterr().err


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip(
        "lm_eval", reason="lm-eval is not installed: pip install 'indexcache[lm-eval]'"
    )


@pytest.fixture(scope="module")
def tasks(harness, tmp_path_factory):
    """A folder with one task of each kind, over the same five documents of 40 to 60 letters."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "q": "".join(chr(97 + (i * 7 + j * j * (i + 3)) % 26) for j in range(40 + 5 * i)),
            "a": "abc",
            "b": "xyzw",
            "gold": i % 2,
        }
        for i in range(5)
    ]
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(json.dumps(common | task))  # JSON is YAML.
    return folder


@pytest.fixture(scope="module")
def ended(harness, checkpoint, tmp_path_factory):
    """The checkpoint with an end of text, without which the harness does nothing."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("ended") / "model"
    shutil.copytree(checkpoint, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "~"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(ended, tmp_path_factory):
    """The checkpoint as transformers itself runs it under the pattern."""
    out = tmp_path_factory.mktemp("exported")
    assert indexcache(["export", str(ended), "--pattern", PATTERN, "--out", str(out)]) == 0
    return out / "transformers"


def answers(harness, model, tasks):
    """Return what a model answers to every request, by task."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = harness.simple_evaluate(
        model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    return {name: [s["resps"] for s in found["samples"][name]] for name in TASKS}


@pytest.mark.parametrize("batch", [1, 3])
def test_it_answers_as_the_harness_own_class_does(harness, tasks, ended, exported, batch):
    from lm_eval.models.huggingface import HFLM

    from indexcache.evals.lm_eval_model import IndexCacheLM

    for fast in (True, False):
        mine = IndexCacheLM(str(ended), PATTERN, batch_size=batch, fast=fast)
        own = HFLM(str(exported), device="cpu", dtype="float32", batch_size=batch)
        got, expected = (answers(harness, model, tasks) for model in (mine, own))
        assert got["write"] == expected["write"]
        for task in ("choose", "roll"):
            flat = [
                [value for one in samples for response in one for value in _numbers(response)]
                for samples in (got[task], expected[task])
            ]
            assert flat[0] == pytest.approx(flat[1], rel=1e-4)
            assert len(flat[0]) >= 5
        assert mine.requests == mine.beyond == 20
        assert "20 of 20 requests had more than k = 8" in mine.about_context()


def _numbers(response):
    """Flatten a response: a number, a pair (log-likelihood, greedy), or a text of one."""
    if isinstance(response, (list, tuple)):
        return [n for part in response for n in _numbers(part)]
    return [float(response)] if not isinstance(response, str) else [float(eval(response))]


def test_the_command_line_runs_a_pattern(tasks, ended, tmp_path, capsys):
    scores = {}
    for pattern in (PATTERN, "FFFFFF"):
        out = tmp_path / pattern
        code = command.main(
            [
                *("--model_args", f"pretrained={ended},pattern={pattern}"),
                *("--tasks", "roll,choose", "--include_path", str(tasks)),
                *("--output_path", str(out), "--batch_size", "2"),
            ]
        )
        captured = capsys.readouterr()
        assert code == 0, captured.err
        assert "requests had more than k = 8 tokens" in captured.err
        (file,) = out.rglob("results*.json")
        scores[pattern] = json.loads(file.read_text())["results"]["roll"]["byte_perplexity,none"]
    assert scores[PATTERN] != scores["FFFFFF"]


@pytest.mark.parametrize(
    ("rest", "word"),
    [
        ("pretrained={},pattern=FFS", "layers"),
        ("pretrained={},pattern=nonsense", "role 'n'"),
        ("pretrained={},patern=1/4", "patern"),
        ("pretrained={}/none", "none"),
        ("pretrained={},dtype=int9", "int9"),
        ("pretrained={},batch_size=0", "batch_size"),
        ("pretrained={},device=tpu", "tpu"),
        ("pattern=1/4", "pretrained"),
    ],
)
def test_bad_arguments_are_one_sentence(harness, checkpoint, rest, word):
    from indexcache.evals.lm_eval_model import IndexCacheLM

    refused(lambda: IndexCacheLM.create_from_arg_string(rest.format(checkpoint)), word)


def test_the_command_line_says_it_and_ends_with_2(tasks, capsys):
    arguments = ["--model_args", "pattern=1/4", "--tasks", "roll", "--include_path", str(tasks)]
    assert command.main(arguments) == 2
    assert "indexcache: --model_args names no checkpoint" in capsys.readouterr().err
