"""Put the layers of a checkpoint into a model one at a time; all other layers lie on `meta`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from indexcache.models.family import DsaModule, decoder_layers
from indexcache.models.fp8 import SCALE_SUFFIX, dequantize
from indexcache.models.soundness import check_tensors
from indexcache.models.stream.reader import RawGroup, Reader
from indexcache.models.weights import Weights, expert_parts


class Layers:
    """The layers of a checkpoint, of which a model holds one at a time.

    The embedding, the last norm and the head are put into the model at once, and stay.

    Args:
        module: the model of the checkpoint's config, whose weights lie on `meta` in the dtypes in
            which they shall be.
        weights: the checkpoint's tensors.
        device: where the model computes.

    Raises:
        ValueError: the tensors are not those of the model, or cannot be read, or are not finite.
    """

    def __init__(self, module: DsaModule, weights: Weights, device: torch.device):
        self.module = module
        self.weights = weights
        self.device = device
        self.trained: dict[str, Tensor] = {}
        """Trained indexers by the names of their tensors in the model, on the CPU."""
        self._own: dict[str, Tensor] = {}
        self.stored = weights.check(module)
        self.shapes = {n: tuple(t.shape) for n, t in module.state_dict().items()}
        self.names: list[list[str]] = [[] for _ in decoder_layers(module)]
        self.rest: list[str] = []
        for name in self.shapes:
            group = self.rest
            if name.startswith("model.layers."):
                group = self.names[int(name.split(".")[2])]
            group.append(name)
        groups = [[self.stored[p] for n in names for p in self._parts(n)] for names in self.names]
        groups.append([self.stored[p] for n in self.rest for p in self._parts(n)])
        self.reader = Reader(weights, groups, pinned=device.type == "cuda")
        self._meta = [dict(layer.state_dict()) for layer in decoder_layers(module)]
        self._put_rest()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def bytes_of_layers(self) -> list[int]:
        """The bytes that each layer takes on the disk."""
        return [plan.bytes for plan in self.reader.plans[: len(self)]]

    def _parts(self, name: str) -> dict[str, Any]:
        """Return the tensors that a tensor of the model is made of; {} for a tied head."""
        if name in self.stored:
            return {name: self.shapes[name]}
        return expert_parts(name, self.shapes[name])

    def _put_rest(self) -> None:
        raw = self.reader.take(len(self))
        found = self._built(self.rest, raw)
        embedding = self.module.get_input_embeddings()
        head = self.module.get_output_embeddings()
        for name, tensor in found.items():
            owner, _, leaf = name.rpartition(".")
            part = self.module.get_submodule(owner)
            part.load_state_dict({leaf: tensor}, strict=False, assign=True)
        if head.weight.is_meta:  # It is tied.
            head.weight = embedding.weight
        rotary: Any = self.module.model.rotary_emb
        self.module.model.rotary_emb = type(rotary)(self.module.config).to(self.device)
        self.module.requires_grad_(False)

    def load(self, index: int, then: int | None = None) -> None:
        """Put a layer into the model, with the checkpoint's own indexer.

        Args:
            index: number of the layer.
            then: the layer that is read meanwhile; None for none.

        Raises:
            ValueError: the layer cannot be read (`Reader.take`), or its weights are not finite.
        """
        raw = self.reader.take(index, then)
        found = self._built(self.names[index], raw)
        cut = len(f"model.layers.{index}.")
        layer = decoder_layers(self.module)[index]
        layer.load_state_dict({n[cut:]: t for n, t in found.items()}, assign=True)
        layer.requires_grad_(False)

    def drop(self, index: int, but: tuple[str, ...] = ()) -> None:
        """Take a layer out of the model again.

        Args:
            but: what the names of tensors that stay begin with, within the layer.
        """
        gone = {n: t for n, t in self._meta[index].items() if not n.startswith(but or "\0")}
        decoder_layers(self.module)[index].load_state_dict(gone, strict=False, assign=True)

    def load_indexers(self) -> None:
        """Put the indexers of all layers into the model, as the checkpoint has them.

        A layer that is loaded or dropped later loses its own again.

        Raises:
            ValueError: their weights are not finite, or rank nothing.
        """
        dtypes = {n: t.dtype for n, t in self.module.state_dict().items()}
        for index, layer in enumerate(decoder_layers(self.module)):
            names = [n for n in self.names[index] if ".self_attn.indexer." in n]
            found = {
                n: self.weights.read(self.stored[n], dtype=dtypes[n], device=self.device)
                for n in names
            }
            check_tensors(found, f"{self.weights.folder}: ")
            cut = len(f"model.layers.{index}.")
            layer.load_state_dict({n[cut:]: t for n, t in found.items()}, strict=False, assign=True)
            layer.requires_grad_(False)
        self.weights.close()

    def put_indexer(self, index: int, *, trained: bool) -> None:
        """Let a loaded layer have its trained indexer, where there is one, or its own again."""
        named = dict(decoder_layers(self.module)[index].named_parameters())
        prefix = f"model.layers.{index}."
        for name in self.names[index]:
            if name in self.trained:
                target = named[name.removeprefix(prefix)]
                if trained:
                    self._own[name] = target.data
                    target.data = self.trained[name].to(target.device, target.dtype)
                else:
                    target.data = self._own.pop(name)

    def _built(self, names: list[str], raw: RawGroup) -> dict[str, Tensor]:
        """Make tensors of the model from their bytes, on the device, in the model's dtypes."""
        buffer = raw.buffer
        if self.device.type != "cpu":
            buffer = buffer.to(self.device, non_blocking=True)
        found: dict[str, Tensor] = {}
        dtypes = {n: t.dtype for n, t in self.module.state_dict().items()}
        for name in names:
            parts = self._parts(name)
            if list(parts) == [name]:
                found[name] = self._convert(self.stored[name], raw, buffer, dtypes[name])
            elif parts:
                shape = self.shapes[name]
                fused = torch.empty(shape, dtype=dtypes[name], device=self.device)
                halves = len(parts) // shape[0]
                places = fused.view(shape[0] * halves, shape[1] // halves, shape[2])
                for part, place in zip(parts, places, strict=True):
                    self._convert(self.stored[part], raw, buffer, dtypes[name], place)
                found[name] = fused
        check_tensors(found, f"{self.weights.folder}: ")
        return found

    def _convert(
        self,
        name: str,
        raw: RawGroup,
        buffer: Tensor,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        stored = raw.tensor(name, buffer)
        if name in self.weights.scales:
            scale = name + SCALE_SUFFIX
            assert self.weights.block is not None
            self.weights.check_scales(name, stored, raw.tensor(scale))
            scales = raw.tensor(scale, buffer)
            return dequantize(stored, scales, self.weights.block, dtype, out)
        if out is not None:
            return out.copy_(stored)
        # On the CPU a tensor is the buffer itself, which nobody fills again; on a GPU it is a copy,
        # so that the buffer's memory is free once a layer is made.
        return stored.to(dtype, copy=buffer is not raw.buffer)

    def elements(self, name: str, picks: Tensor) -> Tensor:
        """Return single elements of a tensor of the model, in its dtype, read from the files.

        Args:
            name: the tensor's name in the model.
            picks: int64 [n], ascending positions in the flattened tensor.
        """
        dtype = self.module.state_dict()[name].dtype
        if name in self.trained:
            return self.trained[name].reshape(-1)[picks].to(dtype)
        parts = self._parts(name)
        each = math.prod(next(iter(parts.values())))
        found = []
        for number, part in enumerate(parts):
            mine = picks[(picks >= number * each) & (picks < (number + 1) * each)] - number * each
            if len(mine):
                found.append(self.weights.elements(self.stored[part], mine).to(dtype))
        return torch.cat(found)

    def has_trained(self, index: int) -> bool:
        """Return whether a layer has a trained indexer beside its own."""
        return any(name in self.trained for name in self.names[index])
