"""Run vLLM with every indexer loaded, and answer the losses of any pattern of F and S layers.

The layers' switches are flipped between evaluations, so one start serves a whole search. Losses
come from the log-probabilities that vLLM computes of a prompt's own tokens.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from indexcache.checkpoint import has_weights, layers_without_indexer, read_config, resolve
from indexcache.configs import text_section
from indexcache.data import Batch
from indexcache.engines.vllm.plugin import installed_version, untested
from indexcache.engines.vllm.scores import PromptScores, read_scores
from indexcache.engines.vllm.settings import VllmSettings, check_installed
from indexcache.engines.vllm.sharing import asks_for_sharing, resolved_roles
from indexcache.engines.vllm.worker import EXTENSION
from indexcache.overrides import SHARING_KEYS, levels_of
from indexcache.pattern import Pattern

CHUNK = 8192  # tokens that vLLM computes at once
KL_SINCE = (0, 32)  # the first version that scores given ids of a prompt
KL_IDS = 63  # the most likely tokens over which a KL is computed

FIXED = {
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "max_num_seqs": 1,
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
    "worker_extension_cls": EXTENSION,
}
"""Engine arguments without which an evaluation would be wrong or would not repeat.

CUDA graphs freeze a layer's role, cached prefixes hold keys of another pattern, and a batch of
several sequences changes the order of sums.
"""


@dataclass(frozen=True)
class DocumentLosses:
    """The losses of one pattern on the calibration or held-out text, by sequence.

    Attributes:
        sums: nats over the tokens that count, float64 [sequences], in the order of the batches.
        tokens: tokens that count, int64 [sequences].
        found: answers of retrieval that greedy decoding gives, int64 [sequences].
    """

    sums: np.ndarray
    tokens: np.ndarray
    found: np.ndarray | None = None

    @property
    def mean(self) -> float:
        """Mean loss, nats per token."""
        return float(self.sums.sum() / self.tokens.sum())


@dataclass
class VllmEngine:
    """A vLLM that holds a model with all its indexers.

    Attributes:
        llm: vLLM's `LLM`.
        path: the checkpoint folder.
        topk: the number of tokens that a query selects.
        vocabulary: the number of different tokens.
        layers: number of decoder layers.
        stages: the first layer of every pipeline stage.
        without_indexer: layers that can never be full.
        facts: version, classes and arguments, for the settings of a run.
    """

    llm: Any
    path: Path
    topk: int
    vocabulary: int
    layers: int
    stages: tuple[int, ...]
    without_indexer: tuple[int, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    def report(self) -> None:
        """Say on stderr which vLLM runs the model, on how many GPUs, and how it is divided."""
        facts = self.facts
        stages = ", ".join(map(str, self.stages))
        print(
            f"vLLM {facts['vllm']} ({facts['model_class']}) runs {self.layers} layers on "
            f"{facts['ranks']} x {facts['device']}; pipeline stages begin at layers {stages}; ids "
            f"are {'sorted' if facts['ids_sorted'] else 'not sorted'}",
            file=sys.stderr,
        )
        if "warning" in facts:
            print(f"indexcache: note: {facts['warning']}", file=sys.stderr)

    def set_pattern(self, pattern: Pattern) -> None:
        """Put a pattern in force on every rank, and check that every rank reads it back.

        Raises:
            ValueError: a role other than F and S, or a rank that runs another pattern.
        """
        if "R" in pattern.roles:
            raise ValueError(f"vLLM runs F and S layers only, but the pattern has R: {pattern}.")
        with stops_named(f"switched its layers to {pattern}"):
            answers = self.llm.collective_rpc("indexcache_set_pattern", args=(pattern.roles,))
        check_read_back(pattern, answers)

    def losses(self, pattern: Pattern, batches: Sequence[Batch]) -> DocumentLosses:
        """Compute the losses of one pattern on every sequence of the batches.

        Raises:
            ValueError: see `set_pattern`; or a loss is not finite.
        """
        sequences = [ids.tolist() for batch in batches for ids in batch.ids]
        counted = [row[1:].numpy() for batch in batches for row in batch.counted]
        answers = [spans for b in batches for spans in b.answers or ((),) * len(b.ids)]
        scores = self.score(pattern, sequences, top=int(any(answers)))
        sums = np.array(
            [-math.fsum(s.own[at].tolist()) for s, at in zip(scores, counted, strict=True)]
        )
        tokens = np.array([int(at.sum()) for at in counted])
        if not any(answers):
            return DocumentLosses(sums, tokens)
        best = [s.top[:, 0] == ids[1:] for s, ids in zip(scores, sequences, strict=True)]
        pairs = zip(best, answers, strict=True)
        found = [sum(bool(right[a - 1 : b - 1].all()) for a, b in spans) for right, spans in pairs]
        return DocumentLosses(sums, tokens, np.array(found, np.int64))

    def score(
        self,
        pattern: Pattern,
        sequences: Sequence[Sequence[int]],
        *,
        top: int = 0,
        asked: Sequence[np.ndarray] | None = None,
    ) -> list[PromptScores]:
        """Run sequences under a pattern, and return the log-probabilities of their tokens.

        Args:
            pattern: put in force first, see `set_pattern`.
            sequences: token ids, each sequence by itself.
            top: the number of most likely tokens to return of each position.
            asked: for each sequence of T tokens the ids to score at every position but the last,
                int32 [T - 1, m], which vLLM can since 0.32.

        Raises:
            ValueError: see `set_pattern` and `read_scores`; or a log-probability is not finite.
        """
        self.set_pattern(pattern)
        sampling = importlib.import_module("vllm").SamplingParams
        common = {"temperature": 0.0, "max_tokens": 1, "flat_logprobs": True, "detokenize": False}
        params: Any = sampling(prompt_logprobs=top, **common)
        if asked is not None:
            params = [
                sampling(prompt_logprobs=top, prompt_logprob_token_ids=ids, **common)
                for ids in asked
            ]
        prompts = [{"prompt_token_ids": list(ids)} for ids in sequences]
        with stops_named(f"ran {pattern}"):
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
        given: list[np.ndarray | None] = [None] * len(sequences) if asked is None else [*asked]
        each = zip(outputs, sequences, given, strict=True)
        scores = [read_scores(*one, top=top) for one in each]
        if not all(np.isfinite(s.own).all() for s in scores):
            raise ValueError(
                f"The loss of {pattern} is not finite in vLLM: broken weights, or a dtype that the "
                "model does not bear."
            )
        return scores

    @property
    def kl_ids(self) -> int:
        """Number of most likely tokens over which a KL is computed."""
        return min(KL_IDS, self.vocabulary)

    def without_kl(self) -> str | None:
        """Say why this vLLM cannot score given tokens of a prompt; None where it can."""
        version = str(self.facts["vllm"])
        numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
        if numbers and numbers < KL_SINCE:
            return f"vLLM {version} cannot score given tokens of a prompt; 0.32 and later can"
        try:
            ids = np.zeros((2, self.kl_ids), dtype=np.int32)
            self.score(self.fullest(), [[0, 0, 0]], top=self.kl_ids, asked=[ids])
        except Exception as error:  # Whatever its settings lack, the losses can be had.
            reason = " ".join(str(error).split()) or type(error).__name__
            return f"vLLM {version} does not score given tokens of a prompt here ({reason:.300})"
        return None

    def check(self, pattern: Pattern) -> None:
        """Check that a pattern can run in this vLLM.

        Raises:
            ValueError: another length, R layers, an S layer at the start of a pipeline stage, or
                an F layer without indexer.
        """
        pattern.check(
            layers=self.layers,
            stages=self.stages,
            reindex=False,
            without_indexer=self.without_indexer,
        )

    def noise(
        self, batches: Sequence[Batch], weigh: Callable[[DocumentLosses], np.ndarray] | None = None
    ) -> float:
        """Evaluate all layers full twice, and return how far two equal evaluations lie apart.

        Args:
            weigh: returns how much an objective rises with each sequence's sum; None is the mean.

        Returns:
            Twice the standard error, by sequences, of the objective's difference; nats per token.
        """
        pattern = self.fullest()
        first = self.losses(pattern, batches)
        second = self.losses(pattern, batches)
        return noise_of(first, second, weigh(first) if weigh else None)

    def check_effect(self, batches: Sequence[Batch], noise: float) -> None:
        """Check that a pattern with one full layer a stage changes the losses beyond the noise.

        Raises:
            ValueError: it does not, so flipping has no effect in this vLLM.
        """
        roles = "".join("F" if i in self.stages else "S" for i in range(self.layers))
        fullest = self.losses(self.fullest(), batches)
        fewest = self.losses(Pattern(roles), batches)
        change = np.abs(fewest.sums - fullest.sums).sum() / fullest.tokens.sum()
        if change <= 10 * noise:
            why = "Its layers do not read the switch that was flipped."
            if change > noise:
                why = "That is too much noise to tell: sort the ids, or take more text."
            raise ValueError(
                f"Sharing has no effect in this vLLM: all layers full and {len(self.stages)} full "
                f"differ by {change:.1e} nats per token, and two equal evaluations by {noise:.1e}. "
                f"{why}"
            )

    def fullest(self) -> Pattern:
        """Return the pattern in which every layer that has an indexer is full."""
        return Pattern(
            "".join("S" if i in self.without_indexer else "F" for i in range(self.layers))
        )


@contextmanager
def stops_named(doing: str) -> Iterator[None]:
    """Turn whatever stops vLLM at work, on any rank, into one sentence.

    Raises:
        ValueError: vLLM stopped, e.g. because a GPU had no memory left or a process died.
    """
    try:
        yield
    except Exception as error:  # vLLM raises what its many parts raise; its log has the details.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"vLLM stopped while it {doing} ({reason:.400}). Its own log has the details; a search "
            "goes on with the same command and computes nothing again that is in its journal."
        ) from error


def start(
    model: str, settings: VllmSettings, *, length: int, seed: int = 0, comparing: bool = False
) -> VllmEngine:
    """Start vLLM with a checkpoint for evaluations of sequences of `length` tokens.

    Args:
        model: the checkpoint.
        settings: how vLLM runs it.
        length: number of tokens of the longest sequence.
        seed: vLLM's random seed.
        comparing: let it return as many log-probabilities as a KL takes.

    Raises:
        ValueError: vLLM is not installed, an engine argument is not NAME=VALUE or one of those that
            an evaluation needs, or vLLM cannot start with them.
    """
    check_installed()
    arguments: dict[str, Any] = {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "enable_expert_parallel": settings.enable_expert_parallel,
        "max_model_len": length + 1,
        "max_num_batched_tokens": CHUNK,
        "seed": seed,
        **({"max_logprobs": KL_IDS + 1} if comparing else {}),
        **engine_arguments(settings.engine_arg),
    }
    path = resolve(model)
    whole = read_config(path)
    config = text_section(whole)
    if overrides := every_indexer(path, whole, arguments.get("hf_overrides")):
        arguments["hf_overrides"] = overrides
    try:
        vllm = importlib.import_module("vllm")
        llm = vllm.LLM(model=str(path), **arguments, **FIXED)
    except Exception as error:  # vLLM raises what its many parts raise; its log has the details.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"vLLM could not start with {path} ({reason:.400}).") from error
    version = installed_version()
    with stops_named("looked for the layers' switches"):
        ranks = llm.collective_rpc("indexcache_layers")
    engine = engine_of(ranks, llm, path, config)
    with stops_named("began to sort the selected ids"):
        sorting = settings.sort_ids and all(llm.collective_rpc("indexcache_sort_ids", args=(True,)))
    engine.facts |= {
        "vllm": version,
        "ids_sorted": sorting,
        "engine_arguments": {k: arguments[k] for k in sorted(arguments)},
    }
    if warning := untested(version):
        engine.facts["warning"] = warning
    return engine


def every_indexer(path: Path, config: dict[str, Any], given: Any = None) -> dict[str, Any]:
    """Return the overrides under which vLLM loads all indexers that a checkpoint holds.

    Args:
        path: the checkpoint.
        config: its config, which may have a pattern by which vLLM leaves indexers out.
        given: the user's own overrides, which are kept.

    Returns:
        An empty dict where no override is needed.
    """
    section = text_section(config)
    if not (asks_for_sharing(config) and has_weights(path)):
        return {}
    without = layers_without_indexer(path)
    layers = section["num_hidden_layers"]
    roles = "".join("S" if i in without else "F" for i in range(layers))
    with suppress(TypeError, ZeroDivisionError):  # Whatever malformed keys say is overridden.
        if roles[0] == "S" or resolved_roles(section, layers) == roles:
            return {}
    keys = {"index_topk_freq": 1, "index_skip_topk_offset": 2} | Pattern(roles).to_config()
    given = dict(given) if isinstance(given, dict) else {}
    if section is config:
        return given | keys
    return given | {"text_config": {**(given.get("text_config") or {}), **keys}}


def engine_arguments(given: Sequence[str]) -> dict[str, Any]:
    """Parse NAME=VALUE arguments of vLLM's engine.

    Raises:
        ValueError: an argument without a name or a value, or one that evaluations fix.
    """
    import json

    arguments: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or not name.isidentifier():
            raise ValueError(
                f"--engine-arg {item!r:.80} is not NAME=VALUE, e.g. gpu_memory_utilization=0.9."
            )
        if name in FIXED or name == "model":
            value = FIXED.get(name, "the checkpoint")
            raise ValueError(
                f"--engine-arg {name} cannot be chosen: evaluations need {value!r}, because "
                "otherwise a pattern's loss would be wrong or would not repeat."
            )
        if name in arguments:
            raise ValueError(f"--engine-arg {name} is given twice; give it once.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if why := _refused(name, value):
            raise ValueError(f"--engine-arg {name} cannot be given: {why}.")
        arguments[name] = value
    return arguments


def _refused(name: str, value: Any) -> str | None:
    """Say why an evaluation cannot run with an argument of the engine; None where it can."""
    if name in ("tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel"):
        return f"it has a flag of its own, --{name.replace('_', '-')}"
    if name.startswith("spec_") or name == "speculative_config":
        return "a run measures the model alone, without speculative decoding"
    if name == "logprobs_mode" and value != "raw_logprobs":
        return "losses are log-probabilities as the model gives them, raw_logprobs"
    if name == "load_format" and value == "dummy":
        return "the weights would be random numbers"
    if name == "hf_token":
        return "it would stand in the files of the run; set HF_TOKEN"
    if name == "hf_overrides":
        levels = levels_of(value) if isinstance(value, dict) else ()
        if key := next((k for level in levels for k in SHARING_KEYS if k in level), None):
            return f"{key} would leave indexers out, and evaluations switch layers themselves"
    return None


def engine_of(
    ranks: Sequence[Mapping[str, Any]], llm: Any, path: Path, config: Mapping[str, Any]
) -> VllmEngine:
    """Make an engine of what all ranks say of their layers.

    Raises:
        ValueError: the ranks' layers do not form one model, or a layer is shared at the start.
    """
    if not ranks:
        raise ValueError("No rank of vLLM answered.")
    spans = sorted({(r["first"], r["end"]) for r in ranks})
    ends = [0, *(end for _, end in spans)]
    layers = config.get("num_hidden_layers", ends[-1])
    if [first for first, _ in spans] != ends[:-1] or ends[-1] != layers:
        raise ValueError(
            f"The ranks of vLLM hold layers {spans}, which are not one model of {layers} layers."
        )
    without = tuple(sorted({i for r in ranks for i in r["without_indexer"]}))
    return VllmEngine(
        llm,
        path,
        topk=int(config["index_topk"]),
        vocabulary=int(config["vocab_size"]),
        layers=ends[-1],
        stages=tuple(first for first, _ in spans),
        without_indexer=without,
        facts={
            "ranks": len(ranks),
            "model_class": ranks[0]["model"],
            "device": ranks[0]["device"],
            "dtype": ranks[0]["dtype"],
        },
    )


def check_read_back(pattern: Pattern, ranks: Sequence[Mapping[str, Any]]) -> None:
    """Check that every rank runs its layers' roles of a pattern.

    Raises:
        ValueError: a rank runs another pattern, or no rank answered.
    """
    if not ranks:
        raise ValueError("No rank of vLLM answered.")
    for answer in ranks:
        expected = pattern.roles[answer["first"] : answer["end"]]
        if answer["roles"] != expected:
            raise ValueError(
                f"Rank {answer['rank']} of vLLM runs {answer['roles']} in layers {answer['first']} "
                f"to {answer['end'] - 1}, but the pattern says {expected}; nothing was evaluated."
            )


def noise_of(
    first: DocumentLosses, second: DocumentLosses, weights: np.ndarray | None = None
) -> float:
    """Return two standard errors of the difference of two equal evaluations, nats per token.

    Args:
        weights: how much the objective rises with each sequence's sum; None is the mean.
    """
    if weights is not None:
        return 2 * math.sqrt(float(((weights * (first.sums - second.sums)) ** 2).sum()))
    return 2 * math.sqrt(float(((first.sums - second.sums) ** 2).sum())) / float(first.tokens.sum())
