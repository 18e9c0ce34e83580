"""Stand-ins for vLLM: decoder layers with its switches, and an engine whose losses are known."""

from pathlib import Path
from types import SimpleNamespace

from indexcache.engines.vllm.engine import engine_of
from indexcache.engines.vllm.worker import WorkerExtension

LAYERS = 6


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


def engine_around(llm, path="m", topk=2):
    config = {"index_topk": topk, "vocab_size": 128}
    return engine_of(llm.collective_rpc("indexcache_layers"), llm, Path(path), config)


def engine(**kind):
    return engine_around(FakeLlm([worker(0, 0, 3), worker(1, 3, 6)], **kind))
