"""A run file: YAML with forms and `key=value` overrides to a checked RunConfig; recipes are run files that ship.

A file may have several forms, each laid over the common part: `form: hub`, `forms: {hub: {…}, data_dir: {…}}`. Where
`data_dir` is given and a form of that name exists, it is the one that is taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mtserve.errors import ConfigError
from training.config import RunConfig

RECIPES = Path(__file__).parent / "recipes"
_OF_FORM = ("form", "data_dir")


def find(name: str) -> Path:
    """The run file at a path, or the recipe of that name. Raises ConfigError."""
    if Path(name).is_file():
        return Path(name)
    recipes = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if name in recipes:
        return RECIPES / f"{name}.yaml"
    raise ConfigError(f"{name} is no file and no recipe; recipes: {', '.join(recipes)}")


def base_of(path: Path) -> Path:
    """What paths in a run file are relative to: its folder, or, of a recipe that ships, the working directory."""
    return Path() if path.resolve().parent == RECIPES.resolve() else path.parent


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run file at `path` with `dotted.key=value` overrides, their values parsed as YAML. Raises ConfigError."""
    try:
        raw = _yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no mapping; a run file has the keys {', '.join(RunConfig.model_fields)}")
    changes = [_change(override) for override in overrides]
    asked = {key: value for key, value in changes if key in _OF_FORM}
    raw = _formed({**raw, **asked}, path, asked="form" in asked)
    for key, value in changes:
        if value is None:
            _check_there(raw, key)
        if key != "form":
            _put(raw, key, value)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first(error)}") from error


def _formed(raw: dict[str, Any], path: Path, *, asked: bool) -> dict[str, Any]:
    """The common part of a run file with the chosen form laid over it; `asked`: on the command line."""
    forms, chosen = raw.pop("forms", None), raw.pop("form", None)
    if forms is None:
        if chosen is not None:
            raise ConfigError(f"{path}: form {chosen!r} is asked for, and the file has no forms")
        return raw
    if not isinstance(forms, dict) or not all(isinstance(form, dict) for form in forms.values()):
        raise ConfigError(f"{path}: forms must be a mapping of mappings")
    if raw.get("data_dir") is not None and "data_dir" in forms and not asked:
        chosen = "data_dir"
    if chosen not in forms:
        raise ConfigError(f"{path}: form {chosen!r} is not there; allowed: {', '.join(forms)}")
    return _laid_over(raw, forms[chosen])


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two mappings as one; where both say something the upper one wins."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _laid_over(merged[key], value) if both else value
    return merged


def _change(override: str) -> tuple[str, Any]:
    """Key and value of a `dotted.key=value`."""
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", key):
        raise ConfigError(f"{override!r} is no override; allowed: dotted.key=value")
    return key, _yaml(value, override)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _put(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. Names may hold dots themselves, so of the keys that exist the longest match is taken."""
    node, parts = raw, key.split(".")
    while True:
        size = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in node), 1)
        name, parts = ".".join(parts[:size]), parts[size:]
        if not parts:
            node[name] = value
            return
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise ConfigError(f"{key} cannot be set: {name} is {node!r}, not a mapping")


def _check_there(raw: Mapping[str, Any], key: str) -> None:
    """Refuse to leave out a task that the file does not have."""
    tasks, name = raw.get("tasks"), key.removeprefix("tasks.")
    if not key.startswith("tasks.") or not isinstance(tasks, Mapping):
        return
    if not any(name == one or name.startswith(f"{one}.") for one in tasks):
        raise ConfigError(f"{key} cannot be left out: the tasks are {', '.join(map(str, tasks))}")


def _first(error: ValidationError) -> str:
    """The first finding as one sentence: where, what is allowed, what was found."""
    found = error.errors(include_url=False)[0]
    where = ".".join(str(one) for one in found["loc"] if not str(one).startswith(":"))  # tags of config.py
    message = found["msg"].removeprefix("Value error, ")
    shown = "" if found["type"] in ("value_error", "missing") else f"; found {found['input']!r:.80}"
    return f"{where + ': ' if where else ''}{message[:1].lower() + message[1:]}{shown}"
