"""Fixtures: small random models of both families, and the packaged tiny model."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("INDEXCACHE_CACHE", "off")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Every worker has a core of its own, and so have the processes that its tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in triton's interpreter, which decorates triton's own library when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from tests.exporting.support import broken, deepseek, glm_folder, sharded  # noqa: F401 - fixtures
from tests.support import FAMILIES, SHAPE, make_model


@pytest.fixture(scope="session", params=FAMILIES)
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="session")
def glm():
    return make_model("glm_moe_dsa")


@pytest.fixture(scope="session")
def ids():
    return torch.randint(
        0, SHAPE["vocab_size"], (2, 96), generator=torch.Generator().manual_seed(1)
    )


@pytest.fixture(scope="session")
def tiny():
    from indexcache.models.loading import load

    return load("tiny")


@pytest.fixture(scope="module")
def one_thread():
    """Run a module on one thread.

    Its models are so small that a second thread only waits, and two processes must find the same
    number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random GLM checkpoint with a character tokenizer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    make_model("glm_moe_dsa").save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder
