"""Run folders of every verb on one random model, and the page of all of them."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest

from indexcache.cli import main
from indexcache.report.html import ReportSettings, make_report
from tests.report.support import folders
from tests.support import make_checkpoint, single_thread

TEXT = "--length 64 --sequences 72 --batch 12"


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Runs of every verb on one random model, with a gate that no pattern fails."""
    root = tmp_path_factory.mktemp("runs")
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    lines = [
        {
            "ids": [(i + (i + 3) * j * j + i // 64 * j) % 127 for j in range(80)],
            "domain": "ab"[i % 2],
        }
        for i in range(220)
    ]
    (root / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = f"{checkpoint} --data {root / 'text.jsonl'}"
    search = f"search {data} --out {root / 'search'} --keep 4/6 --length 64 --sequences 2"
    evaluate = f"evaluate {data} --out {root / 'evaluate'} {TEXT} --most 1000 --allow-blind"
    certify = evaluate.replace(f"{root / 'evaluate'}", f"{root / 'certificate'}")
    distill = f"distill {data} --out {root / 'distill'} --length 64 --steps 1 --eval-every 0"
    commands = (
        search,
        f"{evaluate} --pattern 'best={root / 'search'}' 'a <b>&\"c=1/2'",
        f"{certify} --pattern FSFSFS --certificate",
        f"overlap {data} --out {root / 'overlap'} --length 64 --sequences 2",
        f"bench {checkpoint} --out {root / 'bench'} --contexts 64 --patterns all 1/2 "
        "--device cpu --decode-tokens 2 --no-plot",
        f"{distill} --pattern FFSFFS",
    )
    with single_thread():
        for command in commands:
            assert main(shlex.split(command)) == 0, command
    # Random weights are no better than a blind guess, of which the page would say it says nothing.
    file = root / "evaluate" / "evidence.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"blind_loss": 9.0}))
    return root


@pytest.fixture
def changed(runs, tmp_path):
    """Copy a run with its JSON changed; return its folder."""

    def change(name, file, edit):
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(runs / name, folder)
        value = json.loads((folder / file).read_text())
        edit(value)
        (folder / file).write_text(json.dumps(value))
        return str(folder)

    return change


@pytest.fixture(scope="session")
def whole(runs):
    return make_report(folders(runs), ReportSettings(price=2.0, output_tokens=100))
