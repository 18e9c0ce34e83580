"""A tokenizer is loaded as tokenizer.json defines it, whatever its config calls it."""

from __future__ import annotations

import json
import shutil
from importlib import resources

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from indexcache.models.tokenizer import PROBES, load_tokenizer
from tests.fp8_support import LABEL, write_tokenizer
from tests.support import refused

TINY = resources.files("indexcache") / "assets" / "tiny"
TEXT = "".join(PROBES) + "é\u00a0x  \r\n"


def byte_level(folder, **label):
    """Copy the byte-level tokenizer of `tiny` under another label."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(str(TINY / "tokenizer.json"), folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(label))
    (folder / "config.json").write_text(json.dumps({"model_type": "glm_moe_dsa"}))
    return folder


@pytest.mark.parametrize(
    "name", ["LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast", "GPT2TokenizerFast"]
)
def test_a_byte_level_tokenizer_keeps_spaces_under_any_label(tmp_path, name):
    folder = byte_level(tmp_path / "m", tokenizer_class=name, legacy=True, add_bos_token=False)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    defined = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert ids == defined.encode(TEXT, add_special_tokens=False).ids


class Metaspace:
    """A stand-in for what transformers 5.17 makes of such a label: spaces are dropped."""

    def __init__(self, folder):
        self.inner = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def __call__(self, text, **_):
        return {"input_ids": self.inner.encode("".join(text.split())).ids}


def test_one_that_loses_spaces_is_replaced_by_its_file(tmp_path, monkeypatch, caplog):
    folder = byte_level(tmp_path / "m", tokenizer_class="LlamaTokenizerFast")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path, **_: Metaspace(path))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert "Metaspace, which loses spaces" in caplog.text
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "from_pretrained", lambda path, **_: Metaspace(path)
    )
    refused(lambda: load_tokenizer(folder), str(folder), "loses text that tokenizer.json keeps")
    (folder / "tokenizer.json").rename(folder / "other.json")

    class Slow(Metaspace):
        def __init__(self, folder):
            self.inner = Tokenizer.from_file(str(folder / "other.json"))

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path, **_: Slow(path))
    refused(lambda: load_tokenizer(folder), "'brown fox' and 'brownfox'")


def test_one_that_loses_text_by_its_own_file_is_taken(tmp_path):
    """Every letter beyond ASCII is unknown to it, by its own definition."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "glm_moe_dsa"}))
    write_tokenizer(tmp_path)
    assert LABEL["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert len(load_tokenizer(tmp_path)("añb")["input_ids"]) == 3


def test_no_tokenizer_is_one_sentence(tmp_path):
    for content in (None, "{}", "no json"):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content)
        refused(lambda: load_tokenizer(tmp_path), str(tmp_path), "no tokenizer can be read")
