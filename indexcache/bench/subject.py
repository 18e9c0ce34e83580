"""Open and accelerate the model that a bench times, and describe it for the result."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from indexcache.bench.recorded import read_selections, record_selections
from indexcache.bench.storage import BF16, Storage
from indexcache.checkpoint import resolve
from indexcache.configs import Quantization
from indexcache.models.blocks import ABSORBED
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.loading import DTYPES, fingerprint, load
from indexcache.models.random import random_model
from indexcache.models.reader import Reader
from indexcache.pattern import Pattern
from indexcache.shapes import SHAPES, Rates, Shape, reachable_of, shape_config, shape_of


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An accelerated model, and its description in the result.

    Attributes:
        model: the model, on the fast path.
        name: the model as the user named it.
        shape: its sizes.
        random: whether its weights are random.
        dtype: dtype of the weights.
        index_dtype: dtype in which the indexers compare.
        rates: the rates of the device, by which the floors divide.
        device_name: the name of the device.
        identity: a string that changes with the weights.
        fp8: what became of FP8 weights, as `load` takes it.
        compiled: whether the model runs through torch.compile; see `accelerate`.
        selections: recorded ids, then recorded pools, that a prefill reads; see `bench.recorded`.
        text: token ids to prefill with, repeated to the length; random ones where it is empty.
        text_digest: a digest of all documents of the text; None takes one of `text`.
    """

    model: nn.Module
    name: str
    shape: Shape
    random: bool
    dtype: str
    index_dtype: str
    rates: Rates
    device_name: str
    identity: str
    fp8: str = "dequantize"
    compiled: bool = False
    selections: tuple[Tensor, ...] = ()
    text: tuple[int, ...] = ()
    text_digest: str | None = None

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return next(self.model.parameters()).device

    @property
    def storage(self) -> Storage:
        """How the weights are stored, for the floors; kv_b_proj never stays in FP8."""
        if self.fp8 == "dequantize":
            return BF16
        rounded = 8 if self.fp8 == "both" else None
        how: dict[str, Any] = {"bits": 8, "block": (128, 128), "scale_bits": 32, "floating": True}
        excluded = (f"*{ABSORBED}",)
        return Storage.of(
            self.shape, Quantization(method="fp8", **how, activations=rounded, excluded=excluded)
        )

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def open_subject(
    model: str,
    *,
    layers: int | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    index_dtype: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    compile: bool = False,
    selections: str | None = None,
    patterns: tuple[Pattern, ...] = (),
    data: str | None = None,
    tokens: int | None = None,
    delta: str | None = None,
    fp8: str = "dequantize",
) -> Subject:
    """Open and accelerate a model to time.

    Args:
        model: a named shape, which gets random weights, a checkpoint folder, or `tiny`.
        layers: number of layers to keep of a named shape, from the first one on; None keeps all.
        dtype: dtype of the weights.
        device: a torch device.
        index_dtype: see `accelerate`.
        seed: random seed of random weights.
        trust_remote_code: whether to run Python code that lies in the checkpoint.
        compile: see `accelerate`; ignored on a CPU.
        selections: FILE:NAME[,POOL], see `read_selections`.
        patterns: the patterns to time; the width of recorded selections must fit their pools.
        data: a file or folder of text to prefill with, repeated to the length.
        tokens: number of tokens of the text that are needed; None takes all.
        delta: the file of trained indexers to put into a checkpoint.
        fp8: see `load`; a named shape gets FP8 weights unless it is "dequantize".

    Raises:
        ValueError: as `shape_of`, `read_selections`, `random_model`, `load`, `accelerate` and
            `Reader.tokens`; or a text for a named shape, which has no tokenizer.
    """
    shape = shape_of(model, layers)
    if data is not None and model in SHAPES:
        raise ValueError(
            "A named shape has no tokenizer, so it is timed with random tokens; leave --data out."
        )
    if delta is not None and model in SHAPES:
        raise ValueError("A named shape has random weights, into which no delta belongs.")
    recorded = () if selections is None else read_selections(selections)
    _check_widths(f"{selections}", recorded, shape, patterns)
    text: tuple[int, ...] = ()
    text_digest = None
    if model in SHAPES:
        config = shape_config(model, layers)
        module = random_model(config, dtype=dtype, device=device, seed=seed, fp8=fp8)
        identity = f"random, seed {seed}, {config['num_hidden_layers']} layers"
    else:
        if data is not None:
            ids, text_digest = Reader(resolve(model)).tokens(data, shape.vocab, tokens)
            text = tuple(ids.tolist())
        loaded = load(
            model,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            delta=delta,
            fp8=fp8,
        )
        module, identity = loaded.module, fingerprint(loaded.path)
        if loaded.delta is not None:
            identity += f" delta {loaded.delta.digest}"
    if fp8 != "dequantize":
        identity += f" fp8 {fp8}"
    on_gpu = torch.device(device).type == "cuda"
    compiled = compile and on_gpu
    accelerate(module, index_dtype=index_dtype, compile=compiled)
    record_selections(module)
    return Subject(
        model=module,
        name=model,
        shape=Shape.of(module.config),
        random=model in SHAPES,
        dtype=dtype,
        index_dtype=index_dtype,
        rates=rates_of(device, dtype),
        device_name=(
            torch.cuda.get_device_name(device)
            if on_gpu
            else f"{platform.machine()} cpu, {torch.get_num_threads()} threads"
        ),
        identity=identity,
        fp8=fp8,
        compiled=compiled,
        selections=recorded,
        text=text,
        text_digest=text_digest,
    )


def _check_widths(
    source: str, recorded: tuple[Tensor, ...], shape: Shape, patterns: tuple[Pattern, ...]
) -> None:
    """Raise ValueError if k or a pool is no multiple of the recorded width."""
    widths = [(ids, shape.topk) for ids in recorded[:1]]
    for pattern in patterns:
        widths += [(pool, shape.topk * (pattern.pool_factor or 0)) for pool in recorded[1:]]
    for ids, width in widths:
        if width % ids.shape[1]:
            raise ValueError(
                f"{source}: {width} ids a query cannot be made of copies of {ids.shape[1]} "
                "recorded ones."
            )


def rates_of(device: str, dtype: str) -> Rates:
    """Return the rates of a device from `shapes.DEVICES`, or else measure a product and a copy."""
    where = torch.device(device)
    on_gpu = where.type == "cuda"
    if on_gpu and (rates := reachable_of(torch.cuda.get_device_name(where))):
        return rates
    size, copied = (8192, 1 << 28) if on_gpu else (1024, 1 << 25)
    a = torch.ones(size, size, dtype=DTYPES[dtype], device=where)
    b = torch.ones(copied, dtype=torch.uint8, device=where)
    target = torch.empty_like(b)
    product = min(_seconds(where, lambda: a @ a) for _ in range(4))
    copy = min(_seconds(where, lambda: target.copy_(b)) for _ in range(4))
    rate = 2 * size**3 / product
    bandwidth = 2 * copied / copy
    return Rates("measured here", rate, rate, bandwidth, bandwidth, 0.0)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all its work; return at once for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prompt_ids(subject: Subject, length: int, *, seed: int = 0) -> Tensor:
    """Return int64 ids [1, length] on the model's device: of the subject's text, or random ones."""
    if subject.text:
        copies = -(-length // len(subject.text))
        ids = torch.tensor((subject.text * copies)[:length])[None]
    else:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, subject.shape.vocab, (1, length), generator=generator)
    return ids.to(subject.device)
