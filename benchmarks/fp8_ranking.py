"""Compare the ranking of single flips under FP8 weights as they are read, and as engines multiply.

    python -m benchmarks.fp8_ranking MODEL [--length 1024] [--sequences 6] [--device cuda]

The checkpoint is rewritten to FP8 in blocks of 128 x 128. The loss of sharing each layer alone is
measured with its own weights, with the FP8 weights dequantised to fp32 and to bf16, and with FP8
products: the input of every quantised projection is rounded to e4m3 too, with a scale for each
token and 128 channels, which runs on stock transformers. Spearman's correlations with the fp32
row go to benchmarks/results/fp8_ranking.json, and so do the losses.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.random_fp8 import BLOCK, KEPT
from indexcache import accelerate, load
from indexcache.checkpoint import read_config, resolve
from indexcache.models.fp8 import scale_shape
from indexcache.models.lm import hidden_states, token_losses
from indexcache.models.seam import use_pattern
from indexcache.pattern import Pattern

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "fp8_ranking.json"
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULT)
    o = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fp8-"))
    try:
        rewrite(resolve(o.model), folder)
        rows = {}
        for name, path, dtype, products in (
            ("own weights, fp32", resolve(o.model), "float32", False),
            ("FP8 weights, fp32", folder, "float32", False),
            ("FP8 weights, bf16", folder, "bfloat16", False),
            ("FP8 weights and products", folder, "float32", True),
        ):
            rows[name] = losses(path, dtype, products, o)
            print(name, [round(x, 4) for x in rows[name]], flush=True)
    finally:
        shutil.rmtree(folder)
    base = flips(rows["FP8 weights, fp32"])
    result = {
        "command": f"python -m benchmarks.fp8_ranking {Path(o.model).name}",
        "date": datetime.date.today().isoformat(),
        "device": o.device,
        "torch": torch.__version__,
        "model": Path(o.model).name,
        "length": o.length,
        "sequences": o.sequences,
        "rows": [
            {
                "arithmetic": name,
                "full": row[0],
                "spearman": round(spearman(flips(row), base), 4),
                "largest_difference": float(np.abs(flips(row) - base).max()),
                "flips": flips(row).tolist(),
            }
            for name, row in rows.items()
        ],
    }
    o.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def losses(folder: Path, dtype: str, products: bool, o: argparse.Namespace) -> list[float]:
    """Return the loss of all full, then of each layer but the first shared alone."""
    model = load(folder, dtype=dtype, device=o.device)
    batches = model.batches("heldout", length=o.length, sequences=o.sequences)
    if not products:
        accelerate(model)
    else:
        for name, module in model.module.named_modules():
            kept = any(part in f"{name}.weight" for part in KEPT)
            if (isinstance(module, nn.Linear) and not kept) or name.endswith(".experts"):
                module.register_forward_pre_hook(lambda _, args: (rounded(args[0]), *args[1:]))
    full = Pattern.full(model.layers)
    found = []
    for pattern in (full, *(full.replace(i, "S") for i in range(1, model.layers))):
        total, count = 0.0, 0
        for batch in batches:
            with use_pattern(model, pattern):
                one = token_losses(model, hidden_states(model, batch.ids), batch.ids)
            total, count = total + float(one.double().sum()), count + one.numel()
        found.append(total / count)
    return found


def rounded(x: Tensor) -> Tensor:
    """Round to e4m3 with a scale for each token and 128 channels."""
    width = x.shape[-1]
    wide = nn.functional.pad(x.float(), (0, -width % BLOCK[1])).unflatten(-1, (-1, BLOCK[1]))
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-10) / LARGEST
    return ((wide / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)[..., :width].to(x)


def rewrite(source: Path, folder: Path) -> None:
    """Write a checkpoint's matrices as e4m3 with a scale for each block."""
    for file in source.iterdir():
        if file.suffix not in (".safetensors", ".py") and file.is_file():
            shutil.copy2(file, folder / file.name)
    stored: dict[str, Tensor] = {}
    for file in source.glob("*.safetensors"):
        for name, w in load_file(file).items():
            if w.dim() != 2 or any(part in name for part in KEPT):
                stored[name] = w
                continue
            rows, columns = scale_shape(tuple(w.shape), BLOCK)
            padded = torch.zeros(rows * BLOCK[0], columns * BLOCK[1])
            padded[: w.shape[0], : w.shape[1]] = w.float()
            blocks = padded.view(rows, BLOCK[0], columns, BLOCK[1])
            scale = blocks.abs().amax((1, 3)).clamp(min=1e-10) / LARGEST
            q = (blocks / scale[:, None, :, None]).view_as(padded)[: w.shape[0], : w.shape[1]]
            stored[name] = q.to(torch.float8_e4m3fn).contiguous()
            stored[f"{name}_scale_inv"] = scale
    for file in folder.glob("*.index.json"):
        file.unlink()
    save_file(stored, folder / "model.safetensors")
    config: dict[str, Any] = read_config(source)
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(BLOCK),
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def flips(row: list[float]) -> np.ndarray:
    """Return what each flip costs."""
    return np.array(row[1:]) - row[0]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of the ranks of two rows."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


if __name__ == "__main__":
    main()
