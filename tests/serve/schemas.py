"""A small JSON Schema validator for the keywords that our OpenAPI documents use; it refuses any other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
NOTES = {"title", "description", "default", "additionalProperties"}  # the last one belongs to `properties`


def resolve(document: dict[str, Any], reference: str) -> Any:
    """What a reference inside the document points at."""
    assert reference.startswith("#/"), reference
    found: Any = document
    for part in reference[2:].split("/"):
        found = found[part]
    return found


def problems(document: dict[str, Any], schema: dict[str, Any], value: Any, where: str = "$") -> list[str]:
    """What of a value its schema does not allow."""
    found = [f"{where}: {keyword}: {value!r}" for keyword in schema if not _simple(schema, keyword, value)]
    if "$ref" in schema:
        found += problems(document, resolve(document, schema["$ref"]), value, where)
    if "anyOf" in schema:
        tried = [problems(document, option, value, where) for option in schema["anyOf"]]
        found += [] if not all(tried) else [f"{where}: fits no option: {tried}"]
    for name, inner, item in _inside(schema, value):
        found += problems(document, inner, item, where + name)
    return found


def _inside(schema: dict[str, Any], value: Any) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """(place, schema, value) of the parts of an object or a list."""
    if isinstance(value, dict) and "properties" in schema:
        yield from ((f".{n}", s, value[n]) for n, s in schema["properties"].items() if n in value)
    if isinstance(value, list) and "items" in schema:
        yield from ((f"[{at}]", schema["items"], item) for at, item in enumerate(value))


def _simple(schema: dict[str, Any], keyword: str, value: Any) -> bool:
    """Whether a value obeys one keyword, without what is inside it."""
    wanted = schema[keyword]
    is_list, is_object = isinstance(value, list), isinstance(value, dict)
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if keyword in NOTES or keyword in {"$ref", "anyOf", "items"}:
        return True
    if keyword == "type":
        return isinstance(value, TYPES[wanted]) and not (isinstance(value, bool) and wanted in {"integer", "number"})
    checks: dict[str, bool] = {
        "enum": keyword == "enum" and value in wanted,
        "required": not is_object or keyword != "required" or set(wanted) <= set(value),
        "properties": not is_object or schema.get("additionalProperties", True) or set(value) <= set(wanted),
        "minItems": not is_list or keyword != "minItems" or len(value) >= wanted,
        "maxItems": not is_list or keyword != "maxItems" or len(value) <= wanted,
        "uniqueItems": not is_list or len({repr(item) for item in value}) == len(value),
        "minimum": number is None or keyword != "minimum" or number >= wanted,
        "maximum": number is None or keyword != "maximum" or number <= wanted,
    }
    return checks[keyword]
