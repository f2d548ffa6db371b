"""Frozen dataclasses from what YAML says, with nothing guessed: :func:`build`, :func:`override`, :func:`plain`."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from laco_kernels.errors import complaint

T = TypeVar("T")
#: What stands in a file for a value that the user has to give, as in OmegaConf.
UNSET = "???"


class _MisfitError(Exception):
    """A value that is not of a type; carries what was expected."""


def build(kind: type[T], content: Any, file: str, key: str = "") -> T:
    """Build the dataclass ``kind``, and those in it, from what was read.

    A number may be written as YAML's text: ``1e-5`` is one in YAML 1.2 alone.

    Args:
        kind: its fields may be of a plain type, ``Path``, ``Fraction``, a ``Literal``, a dataclass, a ``dict`` of text to one
            type, a ``tuple`` of one type, or a union of these. Those without a default have to be there.
        content: what ``yaml.safe_load`` returned.
        file: for complaints.
        key: where in the file ``content`` stands, dotted; ``""`` for the whole.

    Raises:
        ValueError: a key is unknown or missing, or a value is of the wrong type or still :data:`UNSET`; naming file and key.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(content, dict):
        raise refusal(file, key, content, f"a section with some of {', '.join(fields)}", "Correct it")
    for name in content:
        if name not in fields:
            raise refusal(file, _join(key, name), "an unknown key", f"one of {', '.join(fields)}", "Correct or remove it")
    hints, values = get_type_hints(kind), {}
    for name, field in fields.items():
        place = _join(key, name)
        if name not in content:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise refusal(file, place, "nothing", "a value", f"Write it down, or pass --set {place}=...")
            continue
        if content[name] == UNSET:
            raise refusal(
                file, place, UNSET, "a value of your own", f"Pass --set {place}=..., or set it in a copy of the recipe"
            )
        try:
            values[name] = _convert(hints[name], content[name], file, place)
        except _MisfitError as error:
            raise refusal(file, place, repr(content[name]), str(error), "Correct it") from None
    return kind(**values)


def override(content: dict[str, Any], key: str, value: Any) -> None:
    """Set ``value`` at a dotted ``key``, in place; sections on the way are made where there are none."""
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(content.get(section), dict):
            content[section] = {}
        content = content[section]
    content[last] = value


def plain(value: Any) -> Any:
    """Return a dataclass as YAML and JSON can write it, so that :func:`build` makes it again."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, (Path, Fraction)) else value


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping.

    Raises:
        ValueError: the file is no YAML, or has something else than a mapping.
        OSError: it cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(complaint("recipe", f"{path} ({reason})", "YAML", "Correct it")) from error
    if not isinstance(content, dict):
        given = f"{path} with {type(content).__name__}"
        raise ValueError(complaint("recipe", given, "sections in YAML", "laco train --list names some to copy"))
    return content


def refusal(file: str, key: str, given: object, expected: str, remedy: str) -> ValueError:
    """Return the complaint about a key of a file."""
    return ValueError(complaint(f"{file}: {key}" if key else file, given, expected, remedy))


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _convert(hint: Any, value: Any, file: str, key: str) -> Any:
    """Return ``value`` as the type ``hint`` means it; :class:`_MisfitError` where it is none."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return build(hint, value, file, key)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return _first_fitting(arguments, value, file, key)
    if origin is Literal:
        if value in arguments:
            return value
        raise _MisfitError(" or ".join(map(str, arguments)))
    if origin is dict:
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            return {name: _entry(arguments[1], entry, file, _join(key, name)) for name, entry in value.items()}
        raise _MisfitError("a section")
    if origin is tuple:
        if isinstance(value, list):
            return tuple(_convert(arguments[0], entry, file, key) for entry in value)
        raise _MisfitError("a list")
    return _scalar(hint, value)


def _first_fitting(kinds: tuple[Any, ...], value: Any, file: str, key: str) -> Any:
    expected = []
    for kind in kinds:
        if kind is types.NoneType:
            if value is None:
                return None
            continue
        try:
            return _convert(kind, value, file, key)
        except _MisfitError as error:
            expected.append(str(error))
    raise _MisfitError(" or ".join(expected))


def _entry(hint: Any, value: Any, file: str, key: str) -> Any:
    """Convert an entry of a dictionary, which has a key of its own to complain about."""
    try:
        return _convert(hint, value, file, key)
    except _MisfitError as error:
        raise refusal(file, key, repr(value), str(error), "Correct it") from None


def _scalar(hint: Any, value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint in (float, Fraction):
        if number or isinstance(value, str):
            try:
                return hint(value)
            except (ValueError, OverflowError, ZeroDivisionError):
                pass
        raise _MisfitError("a number" if hint is float else "a number or a fraction such as 1/4")
    if hint is int and number and isinstance(value, int):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint in (str, Path) and isinstance(value, str) and value:
        return hint(value)
    raise _MisfitError({int: "an integer", bool: "true or false", str: "text", Path: "a path"}[hint])
