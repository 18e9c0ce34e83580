"""The model class for EleutherAI's lm-evaluation-harness: a checkpoint under a pattern.

It is the harness's own class for transformers, whose passes run under the pattern, so requests,
padding and stopping are the harness's. `indexcache.evals.lm_eval` is the command line. It needs the
extra `lm-eval`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string

from indexcache.models.fast.accelerate import accelerate
from indexcache.models.loading import DTYPES, check_device, describe, load
from indexcache.models.seam import check_pattern, use_pattern
from indexcache.pattern import Pattern
from indexcache.spec import parse_pattern

logger = logging.getLogger("indexcache")


@register_model("indexcache")
class IndexCacheLM(HFLM):
    """A checkpoint under a pattern, as a model of the harness.

    Args:
        pretrained: a checkpoint folder, or tiny for the packaged model.
        pattern: a pattern in any spelling of the command line; the default is the model by itself.
        dtype: dtype of the weights.
        device: where it runs, e.g. cpu or cuda:0.
        batch_size: number of sequences in a pass, or "auto".
        max_batch_size: most sequences in a pass with "auto".
        max_length: max number of tokens of a request; None is the model's context.
        fast: run the fast path, which is equal to stock transformers up to rounding.
        delta: trained indexers to put into the model.
        add_bos_token, prefix_token_id, truncation, softmax_dtype, enable_thinking,
            think_end_token, chat_template_args: as in the harness's class.
        trust_remote_code: run Python code that lies in the checkpoint.

    Raises:
        ValueError: the checkpoint, the pattern or the device cannot be used.
    """

    last: ClassVar[IndexCacheLM | None] = None
    """The one that was made last."""

    def __init__(
        self,
        pretrained: str,
        pattern: str | Pattern | None = None,
        dtype: str = "float32",
        device: str | None = "cpu",
        batch_size: int | str = 1,
        max_batch_size: int | None = 64,
        max_length: int | None = None,
        fast: bool = True,
        delta: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        truncation: bool | None = False,
        softmax_dtype: str | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r:.40}; it is one of {', '.join(DTYPES)}.")
        if isinstance(batch_size, int) and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        facts = describe(pretrained)
        layers = facts["num_hidden_layers"]
        self.pattern = None
        if pattern is not None:
            spelled = isinstance(pattern, Pattern)
            self.pattern = pattern if spelled else parse_pattern(str(pattern), layers).pattern
        where = "cpu" if device is None else str(device)
        check_device(where)
        loaded = load(
            pretrained, dtype=dtype, device=where, trust_remote_code=trust_remote_code, delta=delta
        )
        self.topk = loaded.topk
        self.requests = self.beyond = 0
        if self.pattern is not None:
            check_pattern(loaded.module, self.pattern)
        if fast:
            try:
                accelerate(loaded.module)
            except ValueError as error:
                logger.info("stock transformers runs this model. %s", error)
        super().__init__(
            pretrained=loaded.module,
            tokenizer=loaded.tokenizer,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            truncation=truncation,
            softmax_dtype=softmax_dtype,
            enable_thinking=enable_thinking,
            think_end_token=think_end_token,
            chat_template_args=chat_template_args,
        )
        IndexCacheLM.last = self

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> IndexCacheLM:
        """Make one of the harness's --model_args, e.g. "pretrained=DIR,pattern=1/4"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> IndexCacheLM:
        """Make one of arguments by name; those of the harness's own flags give way.

        Raises:
            ValueError: an unknown argument, or no checkpoint.
        """
        known = [n for n in inspect.signature(cls.__init__).parameters if n != "self"]
        flags = {k: v for k, v in (additional_config or {}).items() if v is not None}
        if str(flags.get("device", "")).startswith("cuda") and not torch.cuda.is_available():
            del flags["device"]  # It is the harness's default.
            logger.warning("there is no GPU here, so the CPU runs the model.")
        given = flags | dict(arg_dict)
        for name in given:
            if name not in known:
                raise ValueError(
                    f"--model_args has {name!r:.60}, which is unknown; known are "
                    f"{', '.join(known)}."
                )
        if not given.get("pretrained"):
            raise ValueError("--model_args names no checkpoint; add pretrained=DIR.")
        return cls(**given)

    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
        with self._sharing():
            return super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context: Any, max_length: int, stop: Any, **how: Any) -> Any:
        with self._sharing():
            out = super()._model_generate(context, max_length, stop, **how)
        self._count(
            int(row.sum()) + out.shape[1] - context.shape[1] for row in how["attention_mask"]
        )
        return out

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **how: Any) -> Any:
        self._count(len(context) + len(rest) for _, context, rest in requests)
        return super()._loglikelihood_tokens(requests, *args, **how)

    def _sharing(self) -> Any:
        return nullcontext() if self.pattern is None else use_pattern(self.model, self.pattern)

    def _count(self, lengths: Iterable[int]) -> None:
        for length in lengths:
            self.requests += 1
            self.beyond += length > self.topk

    def about_context(self) -> str | None:
        """Say what part of the requests so far had more than k tokens; None before the first."""
        if not self.requests:
            return None
        rest = ""
        if self.pattern is not None and 2 * self.beyond < self.requests:
            rest = ", and on the others every pattern is the same: these scores say little of it"
        return (
            f"{self.beyond} of {self.requests} requests had more than k = {self.topk} tokens{rest}."
        )
