"""A task's small request, or a chain's, as people type it: for curl, and in Python. Made of the kind's own sample; runs
nothing."""

from __future__ import annotations

import json
import shlex
from typing import Any

from mtserve.chains import AnyChain
from mtserve.serve.table import ServedTask


def snippets(served: ServedTask, url: str, *, keys: bool) -> dict[str, str]:
    """Code by the name of its language; `url` is the server's, `keys` whether it wants one."""
    body = served.example()
    call = f"client.predict({served.name!r}, {body['inputs']!r})"
    found = {"bash": _curl(f"{url}{served.url}", body, keys=keys), "python": _python(call, url, keys=keys)}
    if served.task.kind.streams:
        found["bash"] += "\n" + _curl(f"{url}{served.url}", {**body, "stream": True}, keys=keys, more=" -N")
    return found


def markdown(served: ServedTask, url: str, *, keys: bool) -> str:
    """The same for a page."""
    return fenced(snippets(served, url, keys=keys))


def chain_snippets(chain: AnyChain, first: ServedTask, url: str, *, keys: bool) -> dict[str, str]:
    """As `snippets`, of a chain, whose first task is given."""
    body = chain_example(chain, first)
    call = f"client.predict_tasks({body['inputs']!r}, [{chain.name!r}])"
    return {"bash": _curl(f"{url}/predict", body, keys=keys), "python": _python(call, url, keys=keys)}


def chain_example(chain: AnyChain, first: ServedTask) -> dict[str, Any]:
    """The body of a small request to a chain."""
    return {"inputs": [first.example()["inputs"]], "tasks": [chain.name]}


def fenced(code: dict[str, str]) -> str:
    return "\n\n".join(f"```{name}\n{lines}\n```" for name, lines in code.items())


def _curl(url: str, body: dict[str, Any], *, keys: bool, more: str = "") -> str:
    said = shlex.quote(json.dumps(body, ensure_ascii=False))
    key = ' \\\n  -H "Authorization: Bearer $MTSERVE_API_KEY"' if keys else ""
    return f"curl{more} {url} -H 'Content-Type: application/json'{key} \\\n  -d {said}"


def _python(call: str, url: str, *, keys: bool) -> str:
    key = ', api_key=os.environ["MTSERVE_API_KEY"]' if keys else ""
    lines = [
        *(["import os", ""] if keys else []),
        "from mtserve.client import Client",
        "",
        f"with Client({url!r}{key}) as client:",
        f"    answer = {call}",
        "    print(answer)",
    ]
    return "\n".join(lines)
