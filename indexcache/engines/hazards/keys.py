"""Hazards of the sharing keys themselves: malformed, copied, misplaced, contradictory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from indexcache.configs import mtp_layers, text_section
from indexcache.engines.hazards.case import Case, Hazard, listed, meant
from indexcache.engines.published import copied_from
from indexcache.engines.rules import FREQ, OFFSET, PATTERN, TYPES
from indexcache.overrides import SHARING_KEYS


def malformed(case: Case) -> Iterator[Hazard]:
    """Find patterns that are short, long, misspelt, of a wrong type, or copied."""
    seen: set[tuple[str, str]] = set()
    for config in (*case.configs.values(), case.config):
        section = text_section(config)
        if case.given and config is case.config:
            continue
        for key in (TYPES, PATTERN):
            value = section.get(key)
            if value is None or (key, repr(value)) in seen:
                continue
            seen.add((key, repr(value)))
            yield from _malformed_value(case, key, value)


def _malformed_value(case: Case, key: str, value: Any) -> Iterator[Hazard]:
    layers = case.layers
    if not isinstance(value, (str, list, tuple)) or (key == TYPES and isinstance(value, str)):
        expected = "a list of full and shared" if key == TYPES else "a string of F and S"
        text = f"{key} is {value!r:.40}, not {expected}: write one role for each layer."
        yield Hazard("error", "malformed", None, text)
        return
    if key == PATTERN and not isinstance(value, str):
        yield Hazard(
            "error",
            "list",
            None,
            f"{key} is a list, which only some engines read and others take for all full: write "
            'it as a string, e.g. "FSSF".',
        )
        return
    known = ("full", "shared") if key == TYPES else ("F", "S")
    strange = [item for item in value if item not in known]
    if strange:
        odd = strange[0]
        lower = isinstance(odd, str) and odd.upper() in ("F", "S") and key == PATTERN
        fix = "write it in upper case" if lower else f"only {known[0]} and {known[1]} are known"
        extra = ""
        if odd == "R":
            extra, fix = " (re-index, which no engine has)", "export the pattern without R"
        yield Hazard(
            "error",
            "letters",
            None,
            f"{key} has the role {odd!r:.40}{extra}, which vllm and sglang run as a full layer "
            f"without a word and transformers refuses: {fix}.",
        )
    if len(value) != layers:
        more = mtp_layers(case.config)
        why = "the layers behind its end stay full, or the engine fails"
        if len(value) > layers:
            why = "what is behind the last layer is ignored"
            if more and len(value) == layers + more:
                why += f", and the {more} MTP layers never belong to a pattern"
        yield Hazard(
            "error",
            "length",
            None,
            f"{key} has {len(value)} roles, but the model has {layers} layers: {why}; write one "
            "role for each layer.",
        )
    if key == PATTERN and "S" in value and value[:1] == "S":
        yield Hazard(
            "error",
            "first",
            None,
            f"{key} shares layer 0, before which no layer selects tokens: it must be F.",
        )
    if isinstance(value, str):
        yield from _copied(case, value)


def _copied(case: Case, roles: str) -> Iterator[Hazard]:
    found = copied_from(roles)
    if found is None:
        return
    name, family, published = found
    count = len(published)
    if len(roles) == count == case.layers and family in ("", case.family):
        yield Hazard(
            "note",
            "copied",
            None,
            f"The pattern is the published {name}; other weights of this shape share along other "
            "layers, so measure it on yours (indexcache evaluate).",
        )
        return
    same = (
        ""
        if len(roles) == count
        else f", {'cut' if len(roles) < count else 'grown'} to " + (f"{len(roles)}")
    )
    fix = "a pattern says nothing about another model, so search one (indexcache search)"
    if count == case.layers and family in ("", case.family):
        fix = f"take all {count} roles, or search one (indexcache search)"
    yield Hazard(
        "error",
        "copied",
        None,
        f"The pattern is the published {name} ({count} roles){same}, but this model "
        f"({case.family}) has {case.layers} layers: {fix}.",
    )


def twice(case: Case) -> Iterator[Hazard]:
    """Find keys that stand twice in config.json; JSON readers keep the last, people read both."""
    if case.twice:
        yield Hazard(
            "warning",
            "twice",
            None,
            f"config.json has {listed(list(case.twice))} twice, with different values, and "
            "engines take the last: delete the other.",
        )


def nesting(case: Case) -> Iterator[Hazard]:
    """Find keys beside text_config, or in one that is not the decoder's, where no engine looks."""
    flat: dict[str, list[str]] = {}
    inside: set[str] = set()
    for name, config in case.configs.items():
        section = text_section(config)
        nested = config.get("text_config")
        if section is config and isinstance(nested, dict):
            inside |= {k for k in SHARING_KEYS if nested.get(k) not in (None, config.get(k))}
        if section is config or not any(s.rule and s.rule.engine == name for s in case.schedules):
            continue
        for key in SHARING_KEYS:
            if config.get(key) is not None and config[key] != section.get(key):
                flat.setdefault(key, []).append(name)
    if flat:
        names = sorted(
            {name for found in flat.values() for name in found}, key=list(case.configs).index
        )
        yield Hazard(
            "error",
            "nesting",
            None,
            f"What lies beside text_config ({', '.join(flat)}) is not read by {listed(names)}: "
            'this model is nested, so write {"text_config": {..}}.',
        )
    if inside:
        yield Hazard(
            "error",
            "nesting",
            None,
            f"What lies in text_config ({', '.join(k for k in SHARING_KEYS if k in inside)}) is "
            "not read by any engine: the decoder of this model is described at the top of its "
            "config, so write the keys there.",
        )


def disagreement(case: Case) -> Iterator[Hazard]:
    """Find keys of one config that ask for different patterns."""
    for engine, config in case.configs.items():
        found = meant(config, case.family)
        sound = {key: roles for key, roles in found.items() if roles is not None}
        if len(set(sound.values())) > 1:
            said = " and ".join(f"{key} ({roles.count('F')} full)" for key, roles in sound.items())
            where = f", as {engine} sees it," if case.given else ""
            yield Hazard(
                "error",
                "disagreement",
                None,
                f"{said} of the config{where} ask for different patterns, and engines read "
                f"different ones: set {PATTERN} and {TYPES} to one pattern.",
            )
            return


def switches(case: Case) -> Iterator[Hazard]:
    """Find a use_index_cache that does not say what the other keys say."""
    section = text_section(next(iter(case.configs.values())))
    value = section.get("use_index_cache")
    shares = case.wanted is not None and "S" in case.wanted
    if value is None:
        return
    if not value and shares and not case.given:
        yield Hazard(
            "error",
            "switch",
            None,
            "use_index_cache is false, but transformers, vllm and sglang ignore it and share by "
            "the other keys: remove those, or set it to true.",
        )
    said = any(section.get(key) is not None for key in (TYPES, PATTERN, FREQ))
    if value and not said and case.family != "hy_v4":
        yield Hazard(
            "error",
            "switch",
            None,
            "use_index_cache asks for sharing, but no key says which layers, so every indexer "
            f"runs: add {PATTERN} and {TYPES}.",
        )


def offsets(case: Case) -> Iterator[Hazard]:
    """Find a frequency without an offset, which engines complete in different ways."""
    section = text_section(next(iter(case.configs.values())))
    freq = section.get(FREQ)
    decided = any(s.key == FREQ for s in case.schedules)
    if case.family == "minimax_m3":
        return  # Only one engine reads it there.
    if decided and freq not in (None, 1) and section.get(OFFSET) is None:
        yield Hazard(
            "warning",
            "offset",
            None,
            f"{FREQ} is {freq} without {OFFSET}: engines then begin with FF, Megatron-LM and "
            "prime-rl with F alone, so write the offset that the model was trained with.",
        )
