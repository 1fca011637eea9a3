"""A task's small request as people type it: for curl, and in Python. Made of the kind's own sample; runs nothing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from mtserve.serve.table import ServedTask


def snippets(served: ServedTask, url: str, *, keys: bool) -> dict[str, str]:
    """Code by the name of its language; `url` is the server's, `keys` whether it wants one."""
    body = served.example()
    found = {"bash": curl(url + served.url, body, keys=keys), "python": python(url, served.name, body, keys=keys)}
    if served.task.kind.streams:
        found["bash"] += "\n" + curl(url + served.url, {**body, "stream": True}, keys=keys)
    return found


def markdown(served: ServedTask, url: str, *, keys: bool) -> str:
    """The same for a page."""
    return "\n\n".join(f"```{name}\n{code}\n```" for name, code in snippets(served, url, keys=keys).items())


def curl(url: str, body: Mapping[str, Any], *, keys: bool) -> str:
    """A request to a whole URL; what is read along is not held back. A key is named, never said."""
    said = shlex.quote(json.dumps(body, ensure_ascii=False))
    key = ' \\\n  -H "Authorization: Bearer $MTSERVE_API_KEY"' if keys else ""
    more = " -N" if body.get("stream") else ""
    return f"curl{more} {url} -H 'Content-Type: application/json'{key} \\\n  -d {said}"


def python(url: str, task: str, body: Mapping[str, Any], *, keys: bool) -> str:
    """The same by our own client."""
    key = ', api_key=os.environ["MTSERVE_API_KEY"]' if keys else ""
    asked = ", ".join(repr(body[name]) for name in ("inputs", "parameters") if name in body)
    reading = [
        f"    for event in client.stream({task!r}, {asked}):",
        '        print(event["token"]["text"], end="", flush=True)',
    ]
    whole = [f"    answer = client.predict({task!r}, {asked})", "    print(answer)"]
    lines = [
        *(["import os", ""] if keys else []),
        "from mtserve.client import Client",
        "",
        f"with Client({url!r}{key}) as client:",
        *(reading if body.get("stream") else whole),
    ]
    return "\n".join(lines)
