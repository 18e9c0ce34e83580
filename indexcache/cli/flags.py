"""Flags from settings: every field of a verb's frozen dataclass is a flag, its help, its default and its TOML key."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from indexcache import __version__


def flag(default: Any, help: str, **more: Any) -> Any:
    """A field with its help; `choices` limits it, `positional=True` makes it an argument without dashes."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


REQUIRED = object()


def required(help: str, **more: Any) -> Any:
    return dataclasses.field(metadata={"help": help, **more})


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].upper()}{message[1:]} (see {self.prog} --help).")


def build_parser(verbs: Mapping[str, ModuleType]) -> Parser:
    parser = Parser(
        prog="indexcache", description="Sharing patterns for DeepSeek-Sparse-Attention models."
    )
    parser.add_argument("--version", action="version", version=f"indexcache {__version__}")
    sub = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    for name, module in verbs.items():
        doc = module.__doc__ or ""
        one = sub.add_parser(
            name,
            help=doc.splitlines()[0],
            description=doc,
            epilog=getattr(module, "EPILOG", None),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for field, kind in _fields(module.Settings):
            _add(one, field, kind)
        one.add_argument(
            "--config", type=Path, help="TOML file with any of these settings; flags override it"
        )
    return parser


def parse(parser: Parser, verbs: Mapping[str, ModuleType], argv: list[str]) -> tuple[str, Any]:
    """(verb, its settings); a flag beats the TOML file, which beats the default.

    Raises:
        ValueError: unknown flag or key, a value of the wrong type, a missing required setting.
    """
    values = vars(parser.parse_args(argv))
    verb, config = values.pop("verb"), values.pop("config")
    settings = verbs[verb].Settings
    fields = {f.name: (f, kind) for f, kind in _fields(settings)}
    merged = _read_toml(config, fields, verb) if config else {}
    merged |= {k: v for k, v in values.items() if v is not None}
    for name, (field, _) in fields.items():
        if name not in merged and field.default is dataclasses.MISSING:
            shown = (
                name.upper() if field.metadata.get("positional") else "--" + name.replace("_", "-")
            )
            raise ValueError(f"{verb} needs {shown} (see indexcache {verb} --help).")
        if name in merged and (choices := field.metadata.get("choices")):
            given = merged[name] if isinstance(merged[name], tuple) else (merged[name],)
            for value in given:
                if value not in choices:
                    raise ValueError(f"{name} is one of {', '.join(choices)}, not {value!r}.")
    return verb, settings(**merged)


def _fields(settings: Any) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(settings)
    return [(f, _plain(hints[f.name])) for f in dataclasses.fields(settings)]


def _plain(kind: Any) -> Any:
    """int for `int | None`; tuple[str, ...] stays."""
    inner = [a for a in typing.get_args(kind) if a is not type(None)]
    return inner[0] if typing.get_origin(kind) is not tuple and inner else kind


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any) -> None:
    meta = field.metadata
    default = (
        ""
        if field.default in (dataclasses.MISSING, None, ()) or field.default is False
        else f" (default: {_show(field.default)})"
    )
    text = (meta["help"] + default).replace("%", "%%")
    if meta.get("positional"):
        parser.add_argument(
            field.name, nargs="?", default=None, metavar=field.name.upper(), help=text
        )
        return
    name = "--" + field.name.replace("_", "-")
    if kind is bool:
        parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif typing.get_origin(kind) is tuple:
        parser.add_argument(
            name,
            action=_Collect,
            nargs="+",
            default=None,
            help=text,
            metavar=meta.get("metavar", "X"),
        )
    else:
        reader = fraction if meta.get("fraction") else kind
        parser.add_argument(
            name,
            type=reader,
            default=None,
            help=text,
            metavar=meta.get("metavar", kind.__name__.upper()),
        )


class _Collect(argparse.Action):
    """Repeated flags and several values after one add up."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, (*(getattr(namespace, self.dest) or ()), *values))


def fraction(text: str) -> float:
    """0.25 or 1/4."""
    top, slash, bottom = text.partition("/")
    try:
        return float(top) / float(bottom) if slash else float(top)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _read_toml(
    path: Path, fields: Mapping[str, tuple[dataclasses.Field, Any]], verb: str
) -> dict[str, Any]:
    try:
        with open(path, "rb") as f:
            found = tomllib.load(f)
    except OSError as error:
        raise ValueError(f"{path}: the settings file cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not TOML ({error}).") from None
    result: dict[str, Any] = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise ValueError(f"{path}: {verb} has no setting {key!r}; it has {', '.join(fields)}.")
        kind = fields[name][1]
        if (
            typing.get_origin(kind) is tuple
            and isinstance(value, list)
            and all(isinstance(v, str) for v in value)
        ):
            result[name] = tuple(value)
        elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            result[name] = float(value)
        elif fields[name][0].metadata.get("fraction") and isinstance(value, str):
            try:
                result[name] = fraction(value)
            except ValueError:
                raise ValueError(
                    f"{path}: {key} is {value!r}, which is neither a number nor a fraction such as 1/4."
                ) from None
        elif isinstance(value, kind if isinstance(kind, type) else ()) and not (
            kind is int and isinstance(value, bool)
        ):
            result[name] = value
        else:
            raise ValueError(f"{path}: {key} is {value!r}, which is not a value for it ({kind}).")
    return result


def emit(as_json: bool, value: Any) -> None:
    """With --json, the object as the last line of stdout."""
    if as_json:
        import json

        sys.stdout.flush()
        print(json.dumps(value, allow_nan=False))
