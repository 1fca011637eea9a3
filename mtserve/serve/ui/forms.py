"""A form from a pydantic model: which fields it has, and what their values say. Pure; knows no Gradio and no task.

A field has one of seven shapes, by the type that the model's JSON schema gives it; what fits none of the others is JSON
that the user writes. What is left as it was is not sent, so that a request holds what its author means. Values are not
judged here: the task does that, in its own words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from mtserve.errors import InputError, Problem

Shape = Literal["text", "lines", "number", "integer", "flag", "choice", "json"]
_SHAPES: dict[str, Shape] = {"string": "text", "number": "number", "integer": "integer", "boolean": "flag"}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "minItems": "at least {}",
    "maxItems": "at most {}",
}


@dataclass(frozen=True)
class Field:
    """One field of a form.

    name       as in the request
    shape      text; lines (a list of texts, one a line); number; integer; flag (yes or no); choice; json
    about      what it means, with its bounds; may be empty
    required   whether a request without it is none
    default    its value where a request does not have it; None where that is for the task to say
    choices    of `choice`
    """

    name: str
    shape: Shape
    about: str
    required: bool
    default: Any = None
    choices: tuple[Any, ...] = ()

    @property
    def label(self) -> str:
        """For people: a capital, and no underscores."""
        return self.name.replace("_", " ").capitalize()

    def given(self, value: Any) -> bool:
        """Whether a value of the form is to be sent."""
        return self.required or (value is not None and value != "" and value != self.show(self.default))

    def read(self, value: Any) -> Any:
        """What a request holds for a value of the form. Raises InputError for JSON that is none."""
        if self.shape == "lines" and isinstance(value, str | None):
            return [line for line in (value or "").splitlines() if line.strip()]
        if self.shape == "integer" and isinstance(value, float) and value.is_integer():
            return int(value)
        if self.shape == "json" and isinstance(value, str):
            try:
                return json.loads(value)
            except ValueError as error:
                raise InputError(Problem(f"is not JSON: {error}", field=self.name)) from error
        return "" if self.shape == "text" and value is None else value

    def show(self, value: Any) -> Any:
        """The form's value for what a request holds."""
        if value is None:
            return "" if self.shape in ("text", "lines", "json", "choice") else None
        if self.shape == "lines":
            return "\n".join(value)
        return json.dumps(value, ensure_ascii=False) if self.shape == "json" else value


def fields(model: type[BaseModel]) -> list[Field]:
    """The form of a model, in the model's order."""
    schema = model.model_json_schema()
    required = set(schema.get("required", ()))
    return [_field(name, part, required=name in required) for name, part in schema.get("properties", {}).items()]


def read(form: Sequence[Field], values: Sequence[Any]) -> dict[str, Any]:
    """The object that the values of a form are; fields that are not given are not in it. Raises InputError."""
    pairs = zip(form, values, strict=True)
    return {field.name: field.read(value) for field, value in pairs if field.given(value)}


def show(form: Sequence[Field], held: Mapping[str, Any]) -> list[Any]:
    """The values of a form for an object; the default of what is not in it."""
    return [field.show(held.get(field.name, field.default)) for field in form]


def _field(name: str, part: Mapping[str, Any], *, required: bool) -> Field:
    kinds = [one for one in part.get("anyOf", [part]) if one.get("type") != "null"]
    kind = kinds[0] if len(kinds) == 1 else {}
    optional = len(kinds) < len(part.get("anyOf", [part]))
    bounds = ", ".join(text.format(kind[key]) for key, text in _BOUNDS.items() if key in kind)
    default, lines = part.get("default"), kind.get("type") == "array" and kind.get("items", {}).get("type") == "string"
    said = [part.get("description", ""), "One a line." if lines else "", f"({bounds})" if bounds else ""]
    about = " ".join(filter(None, said))
    if "enum" in kind:
        return Field(name, "choice", about, required, default, tuple(kind["enum"]))
    if lines:
        return Field(name, "lines", about, required)
    shape = _SHAPES.get(kind.get("type", ""), "json")
    if shape == "flag" and optional:  # neither yes nor no is a third value
        return Field(name, "choice", about, required, default, (True, False))
    return Field(name, shape, about, required, default)
