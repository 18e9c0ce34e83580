"""Save a model under a pattern so that what is loaded again is the model that ran.

transformers writes a model's config as it is, which knows nothing of `use_pattern`. While a pattern
is open, `save_pretrained` (and with it `Trainer.save_model` and `push_to_hub`) writes the pattern
in force into the config and says so where stock transformers does not read it. A pattern with R
layers, which no config can say, goes into a file beside it, loudly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from indexcache.models.family import AnyModel, family_of, native_pattern
from indexcache.models.patch import ModelState, Patches, Replaced
from indexcache.models.scopes import seam_here
from indexcache.models.wrappers import is_adapted, wrapping
from indexcache.overrides import SHARING_KEYS
from indexcache.pattern import Pattern
from indexcache.seen import CONFIG_KEY, Seen

PATTERN_FILE = "pattern.json"
"""Where a pattern that is in no config lies in the folder of a model or an adapter."""


def write_patterns(model: AnyModel, state: ModelState, patches: Patches) -> None:
    """Let every `save_pretrained` of a model and its wrappers write the pattern in force."""
    native = native_pattern(model)
    *wrappers, module = wrapping(model)
    patches.wrap(module, partial(_whole, state, native), "save_pretrained")
    for wrapper in filter(is_adapted, wrappers):
        patches.wrap(wrapper, partial(_adapter, state, native), "save_pretrained")


def _whole(state: ModelState, native: Pattern, node: Replaced) -> Callable[..., Any]:
    """Make the method that saves a model."""

    def save_pretrained(save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        seam = seam_here(state)
        if seam is None or seam.pattern == native:
            return node.below(save_directory, *args, **kwargs)
        pattern, model = seam.pattern, node.module()
        if "R" in pattern.roles:
            result = node.below(save_directory, *args, **kwargs)
            _beside(pattern, save_directory, "The model")
            return result
        if not family_of(model).native_sharing:
            warnings.warn(
                f"The config gets the pattern {pattern}, but transformers does not read it for "
                f"{family_of(model).model_type}: enter use_pattern again on what is loaded.",
                stacklevel=2,
            )
        with _in_config(model, pattern):
            return node.below(save_directory, *args, **kwargs)

    return save_pretrained


def _adapter(state: ModelState, native: Pattern, node: Replaced) -> Callable[..., Any]:
    """Make the method that saves an adapter, which has no config of its model."""

    def save_pretrained(save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        seam = seam_here(state)
        result = node.below(save_directory, *args, **kwargs)
        if seam is not None and seam.pattern != native:
            _beside(seam.pattern, save_directory, "The adapter")
        return result

    return save_pretrained


def _beside(pattern: Pattern, folder: Any, what: str) -> None:
    """Write a pattern into a file of its own, and warn that loading will not find it."""
    file = Path(folder) / PATTERN_FILE
    pattern.to_file(file)
    warnings.warn(
        f"{what} was saved under the pattern {pattern}, which its config cannot say: {file} has "
        "it; enter use_pattern with it on what is loaded.",
        stacklevel=3,
    )


@contextmanager
def _in_config(model: Any, pattern: Pattern) -> Iterator[None]:
    """Let the config of a model say the pattern, and no other."""
    fields = model.config.__dict__
    keys = (*SHARING_KEYS, CONFIG_KEY)
    before = {key: fields[key] for key in keys if key in fields}
    seen = pattern.seen | Seen.from_json(before)
    try:
        for key in before:
            del fields[key]
        fields.update(pattern.to_config() | seen.to_config())
        yield
    finally:
        for key in keys:
            fields.pop(key, None)
        fields.update(before)
