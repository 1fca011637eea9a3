"""Arguments that several commands take, and how they are read. Knows no command."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from mtserve.errors import ConfigError, InputError

Model = Annotated[str, typer.Argument(help="A checkpoint folder, or a hub id (owner/name or owner/name@revision).")]


def named(pairs: list[str] | None, option: str) -> dict[str, str]:
    """NAME=VALUE pairs by name."""
    found: dict[str, str] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name or not value or name in found:
            raise ConfigError(f"{option} {pair}: allowed is NAME=VALUE, each name once")
        found[name] = value
    return found


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{text!r} is not a JSON object")
    return value
