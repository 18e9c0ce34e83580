"""The settings that several verbs have, and the checks and steps that they share."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from indexcache.data import text_for
from indexcache.engines.vllm.settings import VllmSettings, check_installed
from indexcache.pattern import Pattern
from indexcache.seen import Seen
from indexcache.vacuity import check_length, pools_of, sentence, share_of

if TYPE_CHECKING:
    from indexcache.data import Batch
    from indexcache.models.conditions import Origin
    from indexcache.models.loading import Model
    from indexcache.models.stream.settings import StreamSettings
    from indexcache.pattern import Pattern
    from indexcache.spec import NamedPattern

Dtype = Literal["float32", "bfloat16", "float16"]
IndexDtype = Literal["auto", "bf16", "fp8"]
Fp8 = Literal["dequantize", "keep", "both"]
Split = Literal["calibration", "heldout", "all"]

FLAT = Parameter(name="*")
"""The fields of a settings class are flags of their own."""

Checkpoint = Annotated[str, Parameter(help="Checkpoint folder, or tiny for the packaged model.")]
Spec = Annotated[str, Parameter(metavar="SPEC")]
"""The name of a pattern; the help of a verb explains it with `spec.SYNTAX`."""
RunFolder = Annotated[
    str, Parameter(metavar="DIR", help="Run folder. An interrupted run in it is continued.")
]


DeltaFile = Annotated[
    str | None,
    Parameter(metavar="FILE", help="Trained indexers (delta.safetensors) to put into the model."),
]


@dataclass(frozen=True, kw_only=True)
class Output:
    """The settings of a verb's output, and the file that may hold all its settings."""

    json: bool = False
    "Print one JSON object as the last line."
    config: Annotated[Path | None, Parameter(metavar="FILE")] = None
    "TOML file with any of these settings. Flags override it."

    def emit(self, value: Any) -> None:
        """Print the object as the last line of stdout if --json was given."""
        if self.json:
            sys.stdout.flush()
            print(json.dumps(value, allow_nan=False))


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Which text becomes which batches; the defaults are for calibration."""

    data: str | None = None
    """Text: a .jsonl, .parquet, .txt or .npy file, chats included, or a folder, e.g. a data set as
    it was downloaded. The default for tiny is the shipped text."""
    split: Split = "calibration"
    "Which documents of --data to take. The two halves never share a document."
    length: int | None = None
    """Number of tokens of a sequence. The default is 4 k, or 4 pools with R layers, at least 1024,
    and at most the model's context."""
    sequences: int | None = 9
    "Number of sequences, spread over the domains."
    batch: int = 1
    "Number of sequences that go through the model at once."
    seed: int = 0
    "Random seed for which sequences are taken."

    @property
    def lengths(self) -> tuple[int | None, ...]:
        """The lengths of the sequences; None is the default."""
        return (self.length,)


@dataclass(frozen=True, kw_only=True)
class HeldOutText(TextSettings):
    """Which text becomes which batches, for an evaluation."""

    split: Split = "heldout"
    sequences: int | None = None
    """Number of sequences, spread over the domains. The default is one of each document, 36 of a
    domain at most, which is the least number for a verdict."""


@dataclass(frozen=True, kw_only=True)
class EvaluationText(HeldOutText):
    """Which text becomes which batches, at one length or several."""

    length: tuple[int, ...] | None = None  # type: ignore[assignment]
    """Numbers of tokens of a sequence; each length is measured by itself. The default is 4 k, or 4
    pools with R layers, at least 1024, and at most the model's context."""

    @property
    def lengths(self) -> tuple[int | None, ...]:
        """The lengths of the sequences in ascending order; None is the default."""
        return tuple(sorted(set(self.length or ()))) or (None,)


@dataclass(frozen=True, kw_only=True)
class OverlapText(HeldOutText):
    """Which text becomes which batches, for a measurement of the overlap."""

    sequences: int | None = 6
    "Number of sequences, spread over the domains."


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings:
    """Which retrieval sequences go beside the text."""

    retrieval: Annotated[tuple[str, ...], Parameter(metavar="KIND")] = ()
    """Kinds of retrieval to measure beside the text, where only answers count: passkey, needles,
    key-value, variables, common-words, frequent-words, graph, repeat, or all."""
    retrieval_sequences: int = 6
    "Number of retrieval sequences of each kind."
    retrieval_length: tuple[int, ...] | None = None
    "Numbers of tokens of a retrieval sequence. The default is that of the text."
    retrieval_filler: Literal["text", "generated"] = "text"
    "What lies between the facts: passages of the text, or generated sentences."


@dataclass(frozen=True, kw_only=True)
class HeldOutRetrieval(RetrievalSettings):
    """Which retrieval sequences go beside the text, for an evaluation."""

    retrieval_sequences: int = 36
    "Number of retrieval sequences of each kind. The default is the least number for a verdict."


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a model is loaded and run."""

    dtype: Dtype = "float32"
    "Dtype of the weights."
    fp8: Fp8 = "dequantize"
    """How weights in FP8 are read: dequantize them, keep them, or keep them and quantise the
    inputs of products of many tokens too (both)."""
    device: str = "cpu"
    "Where the model runs, e.g. cpu or cuda:0."
    fast: bool = True
    """Run the fast path, which needs a fraction of the time and memory of stock transformers and
    is equal up to rounding."""
    trust_remote_code: bool = False
    "Run Python code that lies in the checkpoint."
    delta: DeltaFile = None


@dataclass(frozen=True, kw_only=True)
class EngineSettings(VllmSettings):
    """Which engine runs the model, and how."""

    engine: Literal["vllm"] | None = None
    """Engine that runs the model, for models that need several GPUs. The default is this package's
    own path."""

    def check(self, running: ModelSettings, stream: StreamSettings | None = None) -> None:
        """Refuse settings of an engine without it, and settings that an engine does not take.

        Raises:
            ValueError: the message names the flag, or says that the engine is not installed.
        """
        from indexcache.engines.vllm.engine import engine_arguments

        if self.engine is None:
            chosen = [f.name for f in fields(VllmSettings) if getattr(self, f.name) != f.default]
            if chosen:
                raise ValueError(f"{_flag(chosen[0])} is a setting of vLLM; add --engine vllm.")
            return
        check_installed()
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} must be at least 1, not {getattr(self, name)}.")
        engine_arguments(self.engine_arg)
        if running.delta is not None:
            raise ValueError(
                "--delta cannot be given with --engine vllm, which runs the indexers of the "
                "checkpoint; write one with the trained ones by `export --delta`, and name that."
            )
        if running.fp8 != "dequantize":
            raise ValueError(
                f"--fp8 {running.fp8} is for this package's own path; vLLM reads weights in FP8 in "
                "its own way, so leave it out."
            )
        own = [
            f.name
            for part in (running, stream)
            if part is not None
            for f in fields(part)
            if getattr(part, f.name) != f.default
        ]
        if own:
            raise ValueError(
                f"{_flag(own[0])} is a setting of this package's own path; give vLLM its own by "
                "--engine-arg, e.g. dtype=bfloat16."
            )

    def check_patterns(self, patterns: Iterable[NamedPattern], layers: int) -> None:
        """Refuse patterns that the engine will not run, before it starts.

        Raises:
            ValueError: R layers, or an S layer that begins a pipeline stage.
        """
        if self.engine is None:
            return
        from indexcache.engines.schedules import pipeline_starts

        starts = pipeline_starts(self.engine, layers, self.pipeline_parallel_size)
        for named in patterns:
            try:
                named.pattern.check(stages=starts, reindex=False)
            except ValueError as error:
                raise ValueError(f"{named.name} cannot run in vLLM: {error}") from None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_patterns(facts: dict[str, Any], specs: Iterable[str]) -> tuple[NamedPattern, ...]:
    """Parse the patterns of a checkpoint that `models.loading.describe` has described.

    Raises:
        ValueError: see `spec.parse_patterns`; or a layer that runs its indexer has none.
    """
    from indexcache import spec

    layers = facts["num_hidden_layers"]
    patterns = spec.parse_patterns(specs, layers)
    for p in patterns:
        p.pattern.check(layers=layers, without_indexer=facts["layers_without_indexer"])
    return patterns


def check_delta(
    facts: dict[str, Any], delta: str | None, patterns: Iterable[NamedPattern] = ()
) -> Seen:
    """Check that a delta belongs to a checkpoint, and say which layers of patterns it lacks.

    Returns:
        The text that it was trained on.

    Raises:
        ValueError: see `delta.check_delta`.
    """
    from indexcache import delta as deltas

    if delta is None:
        return Seen()
    trained = deltas.check_delta(delta, facts["path"], facts["num_hidden_layers"])
    for named in patterns:
        if missing := deltas.untrained(trained, named.pattern):
            print(
                f"indexcache: note: {delta} has no indexer for the layers "
                f"{', '.join(map(str, missing))} of {named.name}, which keep the checkpoint's.",
                file=sys.stderr,
            )
    return trained.seen


def unknown_origins(patterns: Iterable[NamedPattern]) -> list[str]:
    """Say of which patterns it is not known what text chose them, in at most one sentence."""
    names = [p.name for p in patterns if not p.origin_known]
    if not names:
        return []
    return [
        f"it is not known what text chose {', '.join(names)[:200]}, so nobody can say that this "
        "text was not among it; a search's folder, and what export writes, carry that along."
    ]


def native_pattern(facts: dict[str, Any]) -> Pattern:
    """Return the pattern that a described checkpoint has by itself; see `models.family`."""
    missing = set(facts["layers_without_indexer"])
    layers = facts["num_hidden_layers"]
    return Pattern("".join("S" if layer in missing else "F" for layer in range(layers)))


def check_text(
    facts: dict[str, Any], model: str, text: TextSettings, patterns: Sequence[Pattern] = ()
) -> None:
    """Check everything about a text that can be checked without its model.

    Raises:
        ValueError: there is no text, or its sequences do not fit the context, k or the pool of a
            pattern.
    """
    text_for(model, text.data, text.split)
    for length in text.lengths:
        check_length(length, facts["index_topk"], facts["max_position_embeddings"], patterns)


def open_model(
    model: str,
    text: TextSettings,
    settings: ModelSettings,
    patterns: Sequence[Pattern] = (),
    stream: StreamSettings | None = None,
) -> tuple[Model, list[Batch]]:
    """Load the batches of a model's text for some patterns, and say on stderr what they are.

    Then load the model. Weights and texts that cannot be used are refused before that.

    Args:
        stream: how the layers are read one at a time; None loads them all.

    Raises:
        ValueError: the text cannot be read or has too little in it; it is text that one of the
            patterns, or the checkpoint, was chosen or trained on; or `load` refuses.
    """
    from indexcache.data import check_unseen
    from indexcache.models.fast.accelerate import accelerate
    from indexcache.models.loading import check_device, describe, load, open_weights

    if settings.device == "cpu" and stream is None:
        keep_freed_memory()
    check_device(settings.device)
    open_weights(describe(model))  # It refuses by the headers alone, before text is tokenised.
    batches = open_text(model, text, patterns)
    if patterns and settings.delta:
        check_unseen(batches, check_delta(describe(model), settings.delta))
    loaded = load(
        model,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        delta=settings.delta,
        stream=stream or False,
        fp8=settings.fp8,
    )
    if settings.fast:
        try:
            accelerate(loaded.module)
        except ValueError as error:
            print(f"indexcache: note: stock transformers runs this model. {error}", file=sys.stderr)
    return loaded, batches


def open_text(model: str, text: TextSettings, patterns: Sequence[Pattern] = ()) -> list[Batch]:
    """Load the batches of a model's text for some patterns, and say on stderr what they are.

    Raises:
        ValueError: the text cannot be read or has too little in it; or it is text that one of the
            patterns, or the checkpoint, was chosen or trained on.
    """
    from indexcache.checkpoint import read_config
    from indexcache.data import check_unseen
    from indexcache.models.loading import describe
    from indexcache.models.reader import Reader

    facts = describe(model)
    source, split = text_for(model, text.data, text.split)
    batches = [
        batch
        for length in text.lengths
        for batch in Reader(Path(facts["path"])).batches(
            source,
            facts,
            split=split,
            length=length,
            sequences=text.sequences,
            batch=text.batch,
            seed=text.seed,
            patterns=patterns,
            progress=True,
        )
    ]
    if patterns:  # The text is to be evidence.
        own = Seen.from_json(read_config(facts["path"]))
        for seen in (own, *(p.seen for p in patterns)):
            check_unseen(batches, seen)
    topk = int(facts["index_topk"])
    sizes = (topk, *pools_of(patterns, topk))
    domains = ", ".join(sorted({b.domain for b in batches}))
    print(
        f"{sum(len(b.units) for b in batches)} sequences of {_lengths(batches)} tokens "
        f"({domains}); {sentence({size: share_of(batches, size) for size in sizes})}",
        file=sys.stderr,
    )
    return batches


def _lengths(batches: Sequence[Batch]) -> str:
    return " or ".join(map(str, sorted({int(b.ids.shape[1]) for b in batches})))


def domains_of(model: str, text: TextSettings) -> list[str]:
    """Return the domains of a text, of which no document is tokenised.

    Raises:
        ValueError: there is no text, or it cannot be read.
    """
    from indexcache.data import scan, split_documents
    from indexcache.models.loading import describe

    source, split = text_for(model, text.data, text.split)
    found = scan(source, int(describe(model)["vocab_size"]))
    return sorted({d.domain for d in split_documents(found.documents, split)})


def open_retrieval(
    model: str, text: TextSettings, settings: RetrievalSettings, patterns: Sequence[Pattern] = ()
) -> list[Batch]:
    """Make the retrieval sequences that are asked for, and say on stderr what they are.

    Raises:
        ValueError: an unknown kind, a length that does not fit, no tokenizer, a text with too
            little in it, or settings of retrieval without a kind.
    """
    if not settings.retrieval:
        for f in fields(settings):
            if getattr(settings, f.name) != f.default:
                raise ValueError(f"{_flag(f.name)} says how retrieval is made; add --retrieval.")
        return []
    from indexcache.models.loading import describe
    from indexcache.models.reader import Reader

    facts = describe(model)
    topk, context = int(facts["index_topk"]), int(facts["max_position_embeddings"])
    given = sorted(set(settings.retrieval_length or ())) or text.lengths
    source: str | Path = "heldout" if text.split == "heldout" else "calibration"
    split = None
    if text.data is not None:
        source, split = text_for(model, text.data, text.split)
    batches = [
        batch
        for length in [check_length(length, topk, context, patterns) for length in given]
        for batch in Reader(Path(facts["path"])).retrieval(
            settings.retrieval,
            facts,
            source=source if settings.retrieval_filler == "text" else None,
            split=split if settings.retrieval_filler == "text" else text.split,
            length=length,
            sequences=settings.retrieval_sequences,
            batch=text.batch,
            seed=text.seed,
        )
    ]
    kinds = ", ".join(dict.fromkeys(b.domain.partition(":")[2] for b in batches))
    print(
        f"{sum(len(b.units) for b in batches)} retrieval sequences of {_lengths(batches)} "
        f"tokens ({kinds}) with {sum(len(a) for b in batches for a in b.answers)} answers",
        file=sys.stderr,
    )
    return batches


def origin_of(model: str, text: TextSettings) -> Origin:
    """Return where the batches of these settings come from, for the record in a result."""
    from indexcache.models.conditions import Origin

    source, split = text_for(model, text.data, text.split)
    return Origin(text=str(source), split=split, seed=text.seed)


def keep_freed_memory() -> None:
    """Make glibc keep the memory that torch frees instead of returning it to the kernel.

    A forward pass on a CPU allocates and frees the same few large tensors hundreds of times, and
    the kernel would map them anew each time.
    """
    mmap_max, trim_threshold = -4, -1  # the numbers of mallopt's parameters in malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        return  # Another C library is slower here, and nothing else changes.
