"""Identify what a result was computed with: the weights as loaded, and the libraries."""

from __future__ import annotations

import hashlib

import torch

from indexcache.models.family import AnyModel, module_of
from indexcache.models.patch import state_of


def weights_digest(model: AnyModel) -> str:
    """Return a digest, 64 hex digits, of a loaded model.

    It covers k, the names, shapes and dtypes of all weights, and 64 elements spread over each.
    """
    module = module_of(model)
    stream = state_of(module).stream
    h = hashlib.sha256(str(getattr(module.config, "index_topk", None)).encode())
    for name, p in module.state_dict().items():
        flat = p.detach().reshape(-1)
        picks = torch.linspace(
            0, max(flat.numel() - 1, 0), min(64, flat.numel()), dtype=torch.float64
        ).long()
        if stream is not None and p.is_meta:
            sample = stream.layers.elements(name, picks).float().numpy()
        else:
            sample = flat[picks.to(flat.device)].float().cpu().numpy()
        h.update(f"{name}|{tuple(p.shape)}|{p.dtype}".encode() + sample.tobytes())
    return h.hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the last bit of a result."""
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}
