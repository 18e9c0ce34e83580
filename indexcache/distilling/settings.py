"""The settings of a distillation, and its learning-rate schedule.

Nothing heavy is imported here, because the command line reads the settings.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Stage = Literal["warmup", "sparse"]
Objective = Literal["multi", "avg", "own", "max", "cover", "none"]
ComputeDtype = Literal["float32", "bfloat16"]

MAX_RATE = 1e30
"""Upper bound of learning rates and layer weights; it keeps fp32 sums and products finite."""

FINAL_RATE = 0.05
"""The learning rate ends at this fraction of its peak."""

FILE_KEYS = {"objective": "loss", "lr_warmup": "warmup"}
"""Fields that settings.json and result.json have under another key."""


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """The settings of a distillation run."""

    stage: Stage = "warmup"
    """warmup: attention is dense, the KL runs over all visible keys, and only indexers train.
    sparse: attention and KL run over the selection."""

    freeze_backbone: bool = False
    """Train nothing but the indexers in the sparse stage too. Otherwise the language-modelling
    loss trains all other weights."""

    lora: int = 0
    """Rank of low-rank adapters on the matrices of attention, which the language-modelling loss
    trains instead of all other weights; 0 trains these. Needs the library peft."""

    objective: Objective = "multi"
    """multi, avg: an indexer learns the mean of all layers it serves (the two have the same
    gradient). max: it learns the largest attention that any of them pays. cover: it learns more of
    a layer, the less of that layer's attention its selection keeps. own: it learns its own layer
    alone. none: indexers stay as they are, and the language-modelling loss trains the
    rest."""

    layer_weights: tuple[float, ...] | None = None
    """How much each layer of the model counts in what its indexer learns, relative to the other
    layers of its group. By default all count the same, as in the paper."""

    answer_weight: float = 0.0
    """Weight of an additional loss of the indexers: the mean over the queries that must find an
    answer, in training rows with retrieval."""

    keep_zeros: bool = False
    """Keep the rows of the indexers' matrices that are all zero as they are, so that they take no
    room in a packed delta."""

    steps: int = 1000
    """Number of optimizer steps."""

    rows: int = 4
    """Number of packed rows of a step, over all processes."""

    lr: float = 2e-3
    """Peak learning rate of the indexers; it rises linearly, then falls as a cosine."""

    backbone_lr: float = 1e-5
    """Peak learning rate of all other weights."""

    weight_decay: float = 0.0
    """Weight decay of matrices; vectors have none."""

    clip: float = 1.0
    """Max norm of the gradients, of each indexer by itself and of the backbone by itself."""

    lr_warmup: float = 0.03
    """Fraction of the steps over which the learning rate rises."""

    recompute: bool = True
    """Run decoder layers again in the backward pass of the whole model, which takes less memory
    and more time than keeping what they computed."""

    compute_dtype: ComputeDtype = "float32"
    """Dtype to compute in. Full mode has fp32 master weights; with a frozen backbone a model
    computes in the dtype that it was loaded in."""

    eval_every: int = 100
    """Number of steps between evaluations on held-out text; 0 means none, and the last indexers
    are the result."""

    save_every: int = 50
    """Number of steps between checkpoints that a killed run goes on from."""

    seed: int = 0
    """Random seed of the order of the rows."""

    @property
    def sparse(self) -> bool:
        """Whether attention and KL run over the selection."""
        return self.stage == "sparse"

    @property
    def frozen(self) -> bool:
        """Whether only the indexers train."""
        return self.freeze_backbone or not self.sparse

    @property
    def sharded(self) -> bool:
        """Whether even one process holds the weights as shards, for FSDP2's mixed precision."""
        return not self.frozen and self.compute_dtype != "float32"

    def lr_scale(self, step: int) -> float:
        """Return the learning rate of a step (0-based) as a fraction of its peak.

        It rises linearly over the first `lr_warmup` of the steps, then falls as a cosine to
        `FINAL_RATE`.
        """
        rising = max(round(self.lr_warmup * self.steps), 1)
        if step < rising:
            return (step + 1) / rising
        angle = math.pi * (step - rising) / max(self.steps - rising, 1)
        return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(angle))

    def to_json(self) -> dict[str, Any]:
        """Return the settings under the keys that settings.json has.

        `recompute` is there only where it is off, `answer_weight` and `lora` where they are not 0,
        so that runs of earlier versions go on.
        """
        facts = {FILE_KEYS.get(name, name): value for name, value in asdict(self).items()}
        if self.recompute:
            del facts["recompute"]
        for name in ("answer_weight", "lora"):
            if not facts[name]:
                del facts[name]
        return facts

    def check(self) -> None:
        """Refuse values outside of their range.

        Raises:
            ValueError: a field is out of its range; the message names it.
        """
        for weight in self.layer_weights or ():
            if not 0 < weight <= MAX_RATE:
                raise ValueError(
                    f"A layer's weight must be above 0 and at most {MAX_RATE:g}, not {weight}."
                )
        if self.layer_weights and self.objective == "own":
            raise ValueError(
                "With the loss own an indexer learns one layer alone, so layers have no weights; "
                "leave them out."
            )
        if self.layer_weights and self.objective == "none":
            raise ValueError("With the loss none no indexer learns, so layers have no weights.")
        if not 0 <= self.answer_weight <= MAX_RATE:
            raise ValueError(f"answer_weight lies in 0..{MAX_RATE:g}, not {self.answer_weight}.")
        if self.objective == "none" and self.answer_weight:
            raise ValueError("With the loss none no indexer learns, so answer_weight must be 0.")
        if self.objective == "none" and self.frozen:
            raise ValueError(
                "With the loss none the indexers stay as they are, and without the whole model "
                "nothing would train: take --stage sparse without --freeze-backbone, or another "
                "loss."
            )
        choices = {
            "stage": get_args(Stage),
            "objective": get_args(Objective),
            "compute_dtype": get_args(ComputeDtype),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is one of {', '.join(allowed)}, not {value!r}.")
        if self.lora and self.frozen:
            raise ValueError(
                "Adapters (--lora) train instead of all other weights, which are frozen here: take "
                "--stage sparse without --freeze-backbone, or leave --lora out."
            )
        minimum = {"lora": 0, "steps": 1, "rows": 1, "save_every": 1, "eval_every": 0, "seed": 0}
        for name, bound in minimum.items():
            if (value := getattr(self, name)) < bound:
                raise ValueError(f"{name} must be at least {bound}, not {value}.")
        for name in ("lr", "backbone_lr", "clip"):
            if not 0 < (value := getattr(self, name)) <= MAX_RATE:
                raise ValueError(f"{name} must be above 0 and at most {MAX_RATE:g}, not {value}.")
        if not 0 <= self.lr_warmup <= 1:
            raise ValueError(f"lr_warmup lies in 0..1, got {self.lr_warmup}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is finite and not negative, got {self.weight_decay}.")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The files that a distillation of a checkpoint reads and writes, and its device."""

    data: str | None = None
    """Training text: a .jsonl, .parquet, .txt or .npy file, chats included, or a folder, e.g. a
    data set as it was downloaded. The default for tiny is the shipped text."""

    held_out: str | None = None
    """Text to evaluate on. The default is the held-out half of the documents of --data."""

    delta: str | None = None
    """File of a delta whose indexers the run begins with, e.g. that of the warmup stage."""

    layer_weights: str | None = None
    """How much each layer counts in what its indexer learns: comma-separated numbers, or the folder
    of a finished search, where a layer counts as much as sharing it alone cost. By default all
    count the same."""

    batch_tokens: int | None = None
    """Number of tokens of a step, over all processes. The default is four rows."""

    length: int | None = None
    """Number of tokens of a row, into which documents are packed. The default is 4 k, or 4 pools
    with R layers, at least 1024, and at most the model's context."""

    eval_sequences: int = 16
    """Number of held-out sequences, spread over the domains."""

    retrieval: tuple[str, ...] = ()
    """Kinds of retrieval of which every evaluation counts the answers found: passkey, needles,
    key-value, variables, common-words, frequent-words, graph, repeat, or all."""

    retrieval_sequences: int = 8
    """Number of held-out retrieval sequences of each kind."""

    retrieval_share: float = 0.0
    """Share of the training rows that are retrieval sequences of these kinds, in training text."""

    resume: bool = True
    """Continue what is in --out. --no-resume refuses a folder that has a run."""

    whole: bool = False
    """Write the whole checkpoint beside the delta."""

    stream: bool | None = None
    """Read the layers from the disk one at a time, in the warmup stage. The default does so where
    the weights do not fit the device."""

    host_memory: str | None = None
    """Max host memory for the hidden states of the rows between two layers, e.g. 64GB; the rest
    lies in a file in the folder of --out. The default has no limit."""

    device: str = "cpu"
    """Where the model runs, e.g. cpu or cuda:0. Under torchrun, cuda is each process's own GPU."""

    trust_remote_code: bool = False
    """Run Python code that lies in the checkpoint."""
