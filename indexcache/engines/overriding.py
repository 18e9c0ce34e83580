"""Change a config as an engine does when it loads it and is given overrides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from indexcache.configs import text_section
from indexcache.engines.rules import FREQ, OFFSET, PATTERN, TYPES
from indexcache.engines.schedules import family_of, filled_types
from indexcache.overrides import SHARING_KEYS


def loaded(engine: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a config.json as an engine's config class leaves it.

    SGLang's class for glm5_next moves keys from the top into text_config.
    """
    config = json.loads(json.dumps(config))
    if engine != "sglang":
        return config
    section = text_section(config)
    if family_of(config) == "glm_moe_dsa" and section.get(TYPES) is None:
        section.pop(TYPES, None)  # A config.json without the key; it is filled then.
    if family_of(config) == "glm5_next" and section is not config:
        for key in (PATTERN, FREQ, OFFSET):
            if key in config:
                section.setdefault(key, config[key])
    return config


def overridden(engine: str, config: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config as an engine sees it when it is given these overrides.

    vLLM (`--hf-overrides`) and SGLang (`--json-model-override-args`, in 0.5.23) set the keys after
    the config is loaded, and merge an object into a section; a key that is given flat stays at the
    top of a nested config. For other engines the keys are those of a config.json.

    SGLang loads glm_moe_dsa through the class of transformers, which has filled indexer_types by
    then; so overrides without that key are ignored there.
    """
    config = loaded(engine, config)
    section = text_section(config)
    if engine == "sglang" and family_of(config) == "glm_moe_dsa" and TYPES not in section:
        types = filled_types(config)
        if types is not None:  # Else its rule says what the keys do.
            section[TYPES] = types
    for key, value in overrides.items():
        current = config.get(key)
        if isinstance(value, Mapping) and isinstance(current, dict):
            current.update(value)
        else:
            config[key] = value
    return config


def without_sharing(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a config without any sharing key."""
    config = json.loads(json.dumps(config))
    for level in (config, text_section(config)):
        for key in SHARING_KEYS:
            level.pop(key, None)
    return config
