"""A task's small request, or a chain's, as people type it: for curl, and in Python. Made of the kind's own sample; runs
nothing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mtserve.chains import AnyChain
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
    return fenced(snippets(served, url, keys=keys))


def chain_snippets(chain: AnyChain, first: ServedTask, url: str, *, keys: bool) -> dict[str, str]:
    """As `snippets`, of a chain, whose first task is given."""
    body = chain_example(chain, first)
    lines = [f"answer = client.predict_tasks({body['inputs']!r}, [{chain.name!r}])", "print(answer)"]
    return {"bash": curl(f"{url}/predict", body, keys=keys), "python": _with_client(lines, url, keys=keys)}


def chain_example(chain: AnyChain, first: ServedTask) -> dict[str, Any]:
    """The body of a small request to a chain."""
    return {"inputs": [first.example()["inputs"]], "tasks": [chain.name]}


def fenced(code: dict[str, str]) -> str:
    return "\n\n".join(f"```{name}\n{lines}\n```" for name, lines in code.items())


def curl(url: str, body: Mapping[str, Any], *, keys: bool) -> str:
    """A request to a whole URL; what is read along is not held back. A key is named, never said."""
    said = shlex.quote(json.dumps(body, ensure_ascii=False))
    key = ' \\\n  -H "Authorization: Bearer $MTSERVE_API_KEY"' if keys else ""
    more = " -N" if body.get("stream") else ""
    return f"curl{more} {url} -H 'Content-Type: application/json'{key} \\\n  -d {said}"


def python(url: str, task: str, body: Mapping[str, Any], *, keys: bool) -> str:
    """The same by our own client."""
    asked = ", ".join([repr(task), *(repr(body[name]) for name in ("inputs", "parameters") if name in body)])
    if not body.get("stream"):
        return _with_client([f"answer = client.predict({asked})", "print(answer)"], url, keys=keys)
    reading = [f"for event in client.stream({asked}):", '    print(event["token"]["text"], end="", flush=True)']
    return _with_client(reading, url, keys=keys)


def _with_client(lines: Sequence[str], url: str, *, keys: bool) -> str:
    """What is done with a client, and how it is made."""
    key = ', api_key=os.environ["MTSERVE_API_KEY"]' if keys else ""
    before = [*(["import os", ""] if keys else []), "from mtserve.client import Client", ""]
    return "\n".join([*before, f"with Client({url!r}{key}) as client:", *(f"    {line}" for line in lines)])
