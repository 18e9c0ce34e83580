"""Compare the ranking of single flips under FP8 weights as they are read, and as engines multiply.

    python -m benchmarks.fp8_ranking MODEL [--length 1024] [--sequences 6] [--device cuda]

The checkpoint is rewritten to FP8 in blocks of 128 x 128. The loss of sharing each layer alone is
measured with its own weights, with the FP8 weights dequantised to fp32 and to bf16, and with FP8
products: the input of every quantised projection is rounded to e4m3, with a scale for each token
and 128 channels, the sum is fp32, and the output is rounded to bf16. The index scores, which
engines compute in FP8 too, stay as they are. All rows run on stock transformers, where projections
are modules, by streaming, which shares what is equal below a flip. --rows keeps the losses of
finished rows for another call.

For each row benchmarks/results/fp8_ranking.json has Spearman's correlation of the flips with the
fp32 row and with the bf16 row, how many of the cheaper half of the flips are the cheaper half of
the fp32 row too, and the losses.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.random_fp8 import BLOCK, KEPT
from indexcache import load
from indexcache.checkpoint import read_config, resolve
from indexcache.models.fp8 import scale_shape
from indexcache.models.lm import token_losses
from indexcache.models.stream.loading import stream_of
from indexcache.models.stream.run import Finals, Variant
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
    parser.add_argument("--every", type=int, default=1, help="flip each layer of so many alone")
    parser.add_argument("--rows", type=Path, help="a JSON file of rows that are measured")
    parser.add_argument("--out", type=Path, default=RESULT)
    o = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fp8-"))
    try:
        rewrite(resolve(o.model), folder)
        rows = json.loads(o.rows.read_text()) if o.rows and o.rows.exists() else {}
        for name, path, dtype, products in (
            ("FP8 weights, bf16", folder, "bfloat16", False),
            ("FP8 weights and products", folder, "float32", True),
            ("FP8 weights, fp32", folder, "float32", False),
            ("own weights, fp32", resolve(o.model), "float32", False),
        ):
            if name in rows:
                continue
            rows[name] = losses(path, dtype, products, o)
            if o.rows:
                o.rows.write_text(json.dumps(rows))
            print(name, [round(x, 4) for x in rows[name]], flush=True)
    finally:
        shutil.rmtree(folder)
    o.out.write_text(json.dumps(summary(rows, o), indent=1) + "\n", encoding="utf-8")


def summary(rows: dict[str, list[float]], o: argparse.Namespace) -> dict[str, Any]:
    """Return the content of the result file."""
    base, bf16 = (flips(rows[f"FP8 weights, {name}"]) for name in ("fp32", "bf16"))
    return {
        "command": f"python -m benchmarks.fp8_ranking {Path(o.model).name} --length {o.length} "
        f"--sequences {o.sequences} --device {o.device}" + f" --every {o.every}" * (o.every > 1),
        "date": datetime.date.today().isoformat(),
        "device": o.device,
        "torch": torch.__version__,
        "model": Path(o.model).name,
        "length": o.length,
        "sequences": o.sequences,
        "every": o.every,
        "rows": [
            {
                "arithmetic": name,
                "full": row[0],
                "spearman": round(spearman(flips(row), base), 4),
                "spearman_with_bf16": round(spearman(flips(row), bf16), 4),
                "cheaper_half": len(cheaper(flips(row)) & cheaper(base)),
                "largest_difference": float(np.abs(flips(row) - base).max()),
                "flips": flips(row).tolist(),
            }
            for name, row in rows.items()
        ],
    }


def losses(folder: Path, dtype: str, products: bool, o: argparse.Namespace) -> list[float]:
    """Return the loss of all full, then of layers 1, 1 + every, .. shared alone."""
    model = load(folder, dtype=dtype, device=o.device, stream=True)
    batches = model.batches("heldout", length=o.length, sequences=o.sequences)
    if products:
        multiply_in_fp8(model.module)
    full = Pattern.full(model.layers)
    patterns = [full, *(full.replace(i, "S") for i in range(1, model.layers, o.every))]
    found: list[float] = []

    def use(finals: Finals) -> None:
        for number in range(len(patterns)):
            total, count = 0.0, 0
            for place, batch in enumerate(batches):
                one = token_losses(model, finals.get(number, place), batch.ids)
                total, count = total + float(one.double().sum()), count + one.numel()
            found.append(total / count)

    stream = stream_of(model)
    assert stream is not None
    stream.run([Variant(p) for p in patterns], [b.ids for b in batches], use)
    return found


class Products(TorchFunctionMode):
    """Computes linear maps of FP8 values as FP8 products: see `rounded`; the output is bf16."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not nn.functional.linear:
            return func(*args, **(kwargs or {}))
        out = func(rounded(args[0]), *args[1:], **(kwargs or {}))
        return out.bfloat16().to(out.dtype)


def multiply_in_fp8(module: Any) -> None:
    """Let the projections of a model whose weights are FP8 values compute as FP8 products do."""
    module.config._experts_implementation = "eager"  # It calls the linear map, expert by expert.

    def within(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with Products():
            return forward(*args, **kwargs)

    for name, part in module.named_modules():
        kept = any(word in f"{name}.weight" for word in KEPT)
        if (isinstance(part, nn.Linear) and not kept) or name.endswith(".experts"):
            part.forward = partial(within, part.forward)


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


def cheaper(costs: np.ndarray) -> set[int]:
    """Return the places of the cheaper half."""
    return set(costs.argsort()[: len(costs) // 2].tolist())


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of the ranks of two rows."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


if __name__ == "__main__":
    main()
