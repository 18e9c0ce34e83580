"""Stand-ins for vLLM: decoder layers with its switches, and an engine whose losses are known."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

from indexcache.engines.vllm.engine import engine_of
from indexcache.engines.vllm.worker import WorkerExtension
from indexcache.models.seam import use_pattern

LAYERS = 6


def install_modules(monkeypatch, parts):
    """Install modules with these contents until the test ends."""
    for name, values in parts.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)


def layer(indexer=True, old=False):
    switch = SimpleNamespace(skip_topk=False)
    attention = SimpleNamespace(indexer=object() if indexer else None)
    if old:
        attention.mla_attn = switch
    else:
        attention.skip_topk = False
    return SimpleNamespace(self_attn=attention)


def worker(rank=0, first=0, end=LAYERS, without=(), old=False, nested=False):
    missing = SimpleNamespace()  # vLLM's stand-in for a layer of another stage
    layers = [layer(i not in without, old) if first <= i < end else missing for i in range(LAYERS)]
    model = SimpleNamespace(model=SimpleNamespace(layers=layers))
    if nested:
        model = SimpleNamespace(language_model=model)
    config = SimpleNamespace(
        hf_config=SimpleNamespace(num_hidden_layers=LAYERS), dtype="torch.bfloat16"
    )
    extension = WorkerExtension()
    extension.rank = rank
    extension.model_runner = SimpleNamespace(
        model=model, vllm_config=SimpleNamespace(model_config=config)
    )
    return extension


class FakeLlm:
    """A stand-in for vLLM: its loss is known for every pattern, and repeats up to a noise."""

    def __init__(self, workers, noise=0.0, effect=True):
        self.workers = workers
        self.noise = noise
        self.effect = effect
        self.calls = 0

    def collective_rpc(self, method, args=()):
        return [getattr(w, method)(*args) for w in self.workers]

    def generate(self, prompts, sampling, use_tqdm):
        roles = "".join(w.indexcache_layers()["roles"] for w in self.workers)
        shared = roles.count("S") if self.effect else 0
        self.calls += 1
        outputs = []
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            value = -2.0 - 0.1 * shared - self.noise * self.calls
            flat = SimpleNamespace(
                start_indices=[0, *range(len(ids) - 1)],
                token_ids=ids[1:],
                logprobs=[value] * (len(ids) - 1),
            )
            outputs.append(SimpleNamespace(prompt_logprobs=flat))
        return outputs


def engine_around(llm, path="m", topk=2, vocabulary=128):
    config = {"index_topk": topk, "vocab_size": vocabulary}
    return engine_of(llm.collective_rpc("indexcache_layers"), llm, Path(path), config)


def engine(**kind):
    return engine_around(FakeLlm([worker(0, 0, 3), worker(1, 3, 6)], **kind))


class TorchLlm(FakeLlm):
    """A stand-in for vLLM that runs a real model, and answers what vLLM 0.33's runner would.

    Its answers are flat lists, of each token but the first and after each the likeliest ones; and
    an array of the tokens that were asked for.
    """

    def __init__(self, model, workers, noise=0.0, **kind):
        super().__init__(workers, noise, **kind)
        self.model = model
        self.patterns = []
        self.random = torch.Generator().manual_seed(0)

    def generate(self, prompts, sampling, use_tqdm):
        roles = "".join(w.indexcache_layers()["roles"] for w in self.workers)
        self.patterns.append(roles)
        each = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
        return [self.answer(roles, *pair) for pair in zip(prompts, each, strict=True)]

    def answer(self, roles, prompt, sampling):
        ids = torch.tensor(prompt["prompt_token_ids"])
        with torch.no_grad(), use_pattern(self.model, roles if self.effect else "F" * len(roles)):
            scores = self.model(ids[None]).logits[0, :-1]
        self.calls += 1
        if self.noise:
            scores += self.noise * torch.randn(scores.shape, generator=self.random)
        scores = scores.log_softmax(-1)
        top = scores.topk(sampling["prompt_logprobs"], -1).indices
        tokens = torch.cat([ids[1:, None], top], -1)
        flat = SimpleNamespace(
            start_indices=[0, *range(0, tokens.numel(), tokens.shape[1])],
            token_ids=tokens.flatten().tolist(),
            logprobs=scores.gather(-1, tokens).flatten().tolist(),
        )
        answer = SimpleNamespace(prompt_logprobs=flat)
        asked = sampling.get("prompt_logprob_token_ids")
        if asked is not None:
            assert asked.dtype == np.int32
            assert len(asked) == len(ids) - 1
            wanted = torch.from_numpy(asked).long()
            answer.prompt_token_id_logprobs = scores.gather(-1, wanted).numpy()
        return answer
