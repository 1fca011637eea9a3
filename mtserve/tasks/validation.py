"""Data from outside as pydantic models, with every fault named in one InputError. Knows no kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mtserve.errors import InputError, Problem

M_ = TypeVar("M_", bound=BaseModel)


def validate(model: type[M_], data: Any, *, prefix: str = "") -> M_:
    """`data` as an instance of a pydantic model; pydantic's findings become one InputError."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = []
        for found in error.errors(include_url=False, include_context=False):
            name = ".".join(map(str, found["loc"]))
            message = found["msg"].removeprefix("Value error, ")
            if found["type"] == "extra_forbidden":
                message = f"not allowed here; allowed: {', '.join(model.model_fields) or 'none'}"
            problems.append(Problem(message, field=prefix + name or None))
        raise InputError(problems) from error


def json_type(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def strings(value: Any) -> Iterator[str]:
    """All strings in a JSON-like value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from strings(inner)
