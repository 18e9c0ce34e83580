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
from tests.support import FAMILIES, SHAPE, make_checkpoint, make_model, single_thread


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
    """Run a module on one thread."""
    with single_thread():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random GLM checkpoint with a character tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))
