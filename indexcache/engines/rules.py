"""How the engines read the sharing keys: their rules, as data, with versions and sources.

A rule says which keys of a config an engine reads for a family of models, in which order, and what
it makes of a value that is short, long or misspelt; `schedules.resolve` applies it. The rules were
read in the engines' own code; `make test-engines` runs that code and compares, where it can be
installed without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from indexcache.pattern import DEFAULT_SKIP_OFFSET

FAMILIES: dict[str, tuple[str, ...]] = {
    "deepseek_v32": ("deepseek_v32",),
    "glm_moe_dsa": ("glm_moe_dsa",),
    "glm5_next": ("glm5_next", "glm5_next_text"),
    "hy_v4": ("hy_v4", "hy_v4_vl", "hy_v4_vl_text"),
    "deepseek_v41": ("deepseek_v41", "deepseek_v41_text"),
    "minimax_m3": ("minimax_m3", "minimax_m3_text", "minimax_m3_vl", "minimax_m3_vl_text"),
    "mistral_large4": ("mistral_large4", "mistral_large4_text"),
}
"""Model types of a config by family."""

DSA = ("deepseek_v32", "glm_moe_dsa")

Effect = Literal["full", "fails"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How versions of an engine read the sharing keys of a family of models.

    Attributes:
        engine: the engine's name.
        families: families of models, see `FAMILIES`.
        keys: the keys that are read, the one that wins first; empty for an engine that knows the
            model and always runs every indexer.
        first: the oldest version with this rule, e.g. (0, 29); None if that is not known.
        last: the newest version with this rule that was read; None if that is not known.
        platform: where the rule holds if not on every device, e.g. "ROCm".
        needs: a key that must be true before any other is read.
        after: whether the count of a frequency begins after `offset` layers, max(i - offset, 0),
            and not with the last of them, max(i - offset + 1, 0).
        offset: the offset where the config has none.
        ignores_offset: the offset of the config is not read.
        null: what a frequency or offset of null does: "full" takes the default.
        least: a frequency below 1: "fails"; "full" takes 1; None computes with it.
        least_offset: the same for an offset.
        short: layers behind the end of a pattern or list that is too short.
        long: a pattern or list that is too long: "full" cuts it.
        letters: roles other than F and S in a pattern.
        words: types other than full and shared in indexer_types.
        typed: the config class takes nothing but a list of strings as indexer_types.
        filled: the config class of transformers has filled indexer_types where a config.json has
            none, before the engine reads it.
        listed: what a list under index_topk_pattern holds: "types" as in indexer_types, "letters",
            or "full" where any list means that every layer is full.
        first_shared: a shared layer 0: "unchecked", "fails", or "full" where it is made full.
        by_ordinal: layers are counted among those with sparse attention only.
        default_types: the config class fills indexer_types with F at 0, 1, 5, 9 where it is absent.
        next_only: ids go only to the layer right behind the one that selected them.
        tested: whether a test runs the engine's own code and compares.
        source: where the rule was read.
    """

    engine: str
    families: tuple[str, ...]
    keys: tuple[str, ...]
    first: tuple[int, ...] | None = None
    last: tuple[int, ...] | None = None
    platform: str = ""
    needs: str | None = None
    after: bool = False
    offset: int = DEFAULT_SKIP_OFFSET
    ignores_offset: bool = False
    null: Effect = "fails"
    least: Effect | None = None
    least_offset: Effect | None = None
    short: Effect = "full"
    long: Effect = "full"
    letters: Effect = "full"
    words: Effect = "full"
    typed: bool = False
    filled: bool = False
    listed: Literal["types", "letters", "full"] = "letters"
    first_shared: Literal["unchecked", "fails", "full"] = "unchecked"
    by_ordinal: bool = False
    default_types: bool = False
    next_only: bool = False
    tested: bool = False
    source: str

    @property
    def name(self) -> str:
        """The engine, and where the rule holds if not everywhere."""
        return f"{self.engine} ({self.platform})" if self.platform else self.engine

    @property
    def versions(self) -> str:
        """The versions with this rule, in words."""
        first, last = (
            None if v is None else ".".join(map(str, v)) for v in (self.first, self.last)
        )
        if first and last:
            return f"{first} to {last}" if first != last else first
        return f"{first} and newer" if first else f"up to {last}" if last else "autumn 2026"


TYPES = "indexer_types"
PATTERN = "index_topk_pattern"
FREQ = "index_topk_freq"
OFFSET = "index_skip_topk_offset"
SOURCES = "index_source_layer_ids"
CLI_FACTOR = "cli_factor"

_GLM_IN_TRANSFORMERS = Rule(
    engine="transformers",
    families=("glm_moe_dsa", "mistral_large4"),
    keys=(TYPES, PATTERN, FREQ),
    first=(5, 17),
    last=(5, 24),
    least="full",
    short="fails",
    letters="fails",
    typed=True,
    listed="types",
    first_shared="fails",
    tested=True,
    source="transformers GlmMoeDsaConfig.__post_init__, MistralLarge4TextConfig",
)

FILLING = replace(_GLM_IN_TRANSFORMERS, short="full", first_shared="unchecked")
"""How the config class of transformers fills indexer_types; what it fills may fit no model."""

_DSA_IN_SGLANG = Rule(
    engine="sglang",
    families=("deepseek_v32", "glm5_next"),
    keys=(TYPES, CLI_FACTOR, PATTERN, FREQ),
    last=(0, 5, 23),
    null="full",
    least="fails",
    least_offset="fails",
    tested=True,
    source="SGLang srt/configs/model_config.py dsa_layer_skips_topk",
)

RULES: tuple[Rule, ...] = (
    _GLM_IN_TRANSFORMERS,
    replace(
        _GLM_IN_TRANSFORMERS,
        families=("glm5_next",),
        next_only=True,
        source="transformers Glm5NextTextConfig.__post_init__, Glm5NextTextDecoderLayer",
    ),
    Rule(
        engine="transformers",
        families=("deepseek_v32", "minimax_m3"),
        keys=(),
        first=(5, 17),
        last=(5, 24),
        tested=True,
        source="transformers DeepseekV32Config, MiniMaxM3VLTextConfig: no sharing",
    ),
    Rule(
        engine="transformers",
        families=("hy_v4",),
        keys=(TYPES,),
        first=(5, 17),
        last=(5, 24),
        short="fails",
        typed=True,
        default_types=True,
        first_shared="fails",
        tested=True,
        source="transformers HYV4Config.__post_init__",
    ),
    Rule(
        engine="vllm",
        families=DSA,
        keys=(PATTERN, FREQ),
        first=(0, 25),
        last=(0, 33),
        tested=True,
        source="vLLM DeepseekV2MLAAttention and models/deepseek_v32/attention.py",
    ),
    Rule(
        engine="vllm",
        families=("glm5_next",),
        keys=(),
        first=(0, 32),
        last=(0, 33),
        tested=True,
        source="vLLM models/glm5next/common/attention.py: skip_topk is always False",
    ),
    Rule(
        engine="vllm",
        families=("hy_v4",),
        keys=(TYPES,),
        first=(0, 32),
        last=(0, 33),
        short="fails",
        long="fails",
        words="fails",
        default_types=True,
        tested=True,
        source="vLLM HYV4Config, models/hy_v4/nvidia/attention.py compute_skip_topk_layers",
    ),
    Rule(
        engine="vllm",
        families=("deepseek_v41",),
        keys=(SOURCES,),
        first=(0, 30),
        last=(0, 33),
        tested=True,
        source="vLLM models/deepseek_v41/attention.py: one indexer for each source layer",
    ),
    Rule(
        engine="vllm",
        families=("minimax_m3",),
        keys=(),
        platform="CUDA",
        first=(0, 32),
        last=(0, 33),
        tested=True,
        source="vLLM models/minimax_m3/nvidia: no sharing",
    ),
    Rule(
        engine="vllm",
        families=("minimax_m3",),
        keys=(FREQ,),
        platform="ROCm",
        first=(0, 32),
        last=(0, 33),
        needs="use_index_cache",
        after=True,
        offset=0,
        null="full",
        least="full",
        by_ordinal=True,
        tested=True,
        source="vLLM models/minimax_m3/amd/model.py _should_skip_index_topk",
    ),
    _DSA_IN_SGLANG,
    replace(_DSA_IN_SGLANG, families=("glm_moe_dsa",), filled=True),
    Rule(
        engine="sglang",
        families=("hy_v4",),
        keys=(TYPES,),
        last=(0, 5, 23),
        short="fails",
        long="fails",
        words="fails",
        default_types=True,
        first_shared="fails",
        tested=True,
        source="SGLang srt/configs/hy_v4.py, dsa_layer_skips_topk",
    ),
    Rule(
        engine="sglang",
        families=("deepseek_v41",),
        keys=(SOURCES,),
        last=(0, 5, 23),
        tested=True,
        source="SGLang srt/models/deepseek_v4.py",
    ),
    Rule(
        engine="sglang",
        families=("minimax_m3",),
        keys=(),
        last=(0, 5, 23),
        tested=True,
        source="SGLang minimax_sparse_backend.py: SGLANG_MINIMAX_M3_INDEX_TOPK_FREQ, gfx95 only",
    ),
    Rule(
        engine="tensorrt-llm",
        families=DSA,
        keys=(PATTERN, FREQ),
        first_shared="full",
        listed="full",
        source="TensorRT-LLM, read in autumn 2026",
    ),
    Rule(
        engine="atom",
        families=DSA,
        keys=(TYPES, PATTERN, FREQ),
        after=True,
        offset=1,
        least="fails",
        source="ATOM, read in autumn 2026",
    ),
    Rule(
        engine="llama.cpp",
        families=(*DSA, "hy_v4"),
        keys=(TYPES,),
        source="llama.cpp, read in autumn 2026",
    ),
)
"""Every rule of an engine that serves."""

TRAINERS: tuple[Rule, ...] = (
    Rule(
        engine="megatron-lm",
        families=tuple(FAMILIES),
        keys=(FREQ,),
        offset=1,
        null="full",
        least="fails",
        least_offset="full",
        source="Megatron-LM experimental_attention_variant/dsa.py; its layers are 1-based, and an "
        "offset of 0 counts as 1",
    ),
    Rule(
        engine="prime-rl",
        families=tuple(FAMILIES),
        keys=(PATTERN, TYPES, FREQ),
        needs="use_index_cache",
        offset=1,
        ignores_offset=True,
        null="full",
        least="fails",
        source="prime-rl, read in autumn 2026",
    ),
)
"""The rules by which trainers share."""

ENGINES = tuple(dict.fromkeys(rule.engine for rule in RULES))
