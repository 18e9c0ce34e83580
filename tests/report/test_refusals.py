"""Test what the page of run folders refuses: folders, models, files and settings."""

from __future__ import annotations

import copy
import shutil

import pytest

from indexcache.cli import main
from indexcache.report.html import make_report

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def refused(capsys, tmp_path):
    def call(*words, says):
        page = tmp_path / "page.html"
        out = [] if "--out" in words else ["--out", str(page)]
        assert main(["report", *map(str, words), *out]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("indexcache: ")
        assert printed.err.count("\n") == 1, printed.err
        for part in (says,) if isinstance(says, str) else says:
            assert part in printed.err, printed.err
        assert not page.exists()

    return call


def test_folders_without_a_finished_run_are_refused(runs, refused, tmp_path, checkpoint):
    refused(says="report needs RUN")
    with pytest.raises(ValueError, match="no run folder"):
        make_report([])
    refused(tmp_path / "none", says="there is no such folder")
    refused(runs / "text.jsonl", says="is a file")
    refused("", says="there is no such folder")
    refused(checkpoint, says="is not a run folder")
    refused(runs, says=("is not a run folder", "it holds run folders", "search"))
    refused(runs / "search", runs / "search" / ".." / "search", says="is the same folder")
    begun = tmp_path / "begun"
    shutil.copytree(runs / "search", begun)
    (begun / "result.json").unlink()
    refused(begun, says="has not finished")


def test_runs_of_different_models_are_refused(runs, refused, changed):
    def model(value):
        value["conditions"]["model_digest"] = "f" * 64

    def layers(value):
        value["random"] = True
        value["shape"]["layers"] = 7

    def topk(value):
        value["random"] = True
        value["shape"]["topk"] = 7

    def base(value):
        value["base_digest"] = "e" * 64

    for name, file, edit, says in (
        ("overlap", "overlap.json", model, "ffffffffffff"),
        ("bench", "bench.json", layers, "number of layers 6 and 7"),
        ("bench", "bench.json", topk, "k 8 and 7"),
        ("distill", "settings.json", base, "eeeeeeeeeeee"),
    ):
        folder = changed(name, file, edit)
        shown = ("different models", str(runs / "search"), folder, says)
        refused(runs / "search", folder, says=shown)
        shutil.rmtree(folder)


def test_damaged_files_are_refused_with_their_place(runs, refused, changed):
    def lacks(*keys):
        def edit(value):
            for key in keys[:-1]:
                value = value[key]
            del value[keys[-1]]

        return edit

    def holds(thing, *keys):
        def edit(value):
            for key in keys[:-1]:
                value = value[key]
            value[keys[-1]] = thing

        return edit

    for name, file, edit, says in (
        ("evaluate", "evidence.json", lacks("conditions"), "does not say what its numbers hold"),
        ("evaluate", "evidence.json", holds([], "conditions"), "conditions is []"),
        ("evaluate", "evidence.json", holds([], "rows"), "has no row of all text"),
        ("evaluate", "evidence.json", holds("x", "rows", 0, "loss"), "rows[0].loss is 'x'"),
        ("evaluate", "evidence.json", holds(1e300, "rows", 0, "delta_loss"), "larger than any"),
        ("evaluate", "evidence.json", holds("SF", "rows", 1, "pattern"), "rows[1].pattern"),
        ("evaluate", "evidence.json", holds("ok", "gate", "verdicts", 0, "verdict"), "no verdict"),
        ("search", "result.json", holds([], "frontier"), "no frontier"),
        ("search", "result.json", holds(None, "frontier"), "of no search"),
        ("overlap", "overlap.json", holds(5, "layers"), "no table of 5 times 5"),
        ("bench", "bench.json", holds(0, "rows", 0, "decode_total_tok_s"), "no rate"),
        ("bench", "bench.json", lacks("shape", "topk"), "'shape.topk'"),
        ("distill", "result.json", holds(True, "steps"), "steps is True"),
    ):
        folder = changed(name, file, edit)
        refused(folder, says=(folder, says))
        shutil.rmtree(folder)
    folder = changed("overlap", "overlap.json", copy.deepcopy)
    for text in ("", "[]", '{"overlap": NaN}', "{"):
        with open(f"{folder}/overlap.json", "w") as f:
            f.write(text)
        refused(folder, says="overlap.json")


def test_settings_and_out_are_refused_by_name(runs, refused, tmp_path):
    folder = runs / "overlap"
    for price in ("-1", "nan", "inf"):
        refused(folder, "--price", price, says="--price must be a number of at least 0")
    refused(folder, "--output-tokens", "0", says="--output-tokens must be at least 1")
    for out in ("", "evidence.json", ".html", "a\0.html", f"{tmp_path}"):
        refused(folder, "--out", out, says="but it takes the name of a page")
    (tmp_path / "folder.html").mkdir()
    refused(folder, "--out", tmp_path / "folder.html", says="this is a folder")
    (tmp_path / "file").write_text("x")
    refused(folder, "--out", tmp_path / "file" / "page.html", says="this is a file")
