"""The clients' page: runs its blocks against a server, and writes below each what it printed; at its end stand requests
for every task, as the server shows them at /docs.

python -m tests.transcripts http://127.0.0.1:3000
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

PAGE = Path(__file__).parent.parent / "docs/clients.md"
EVERY = "## Every task\n\nMade of each kind's own sample, as at `/docs`.\n"
_BLOCK = re.compile(r"```(?P<language>bash|python)\n(?P<code>.*?)```\n(?:\n```text\n(?P<printed>.*?)```\n)?", re.DOTALL)
_NAMES = re.compile(r"""(?:["'](\w+)["']\s*:|\b(\w+)=|\b([A-Z]\w+)\()""")


def parts() -> tuple[str, str]:
    """The page before its requests for every task, and those."""
    before, _, after = PAGE.read_text(encoding="utf-8").partition(EVERY)
    return before, after


def every_task(url: str) -> str:
    """Requests for each task of the server, as if it were at localhost:3000."""
    described = httpx.get(url + "/openapi.json").raise_for_status().json()["paths"]
    found = ""
    for path, operations in described.items():
        if path.startswith("/tasks/"):
            about = operations["post"]["description"]
            shown = about[about.index("```") :].replace(url, "http://localhost:3000")
            found += f"\n### {operations['post']['summary']}\n\n{shown}\n"
    return found


def blocks() -> Iterator[tuple[str, str, str | None]]:
    """(language, code, what it printed) of every block of the page."""
    for found in _BLOCK.finditer(parts()[0]):
        yield found["language"], found["code"], found["printed"]


def printed(language: str, code: str, url: str) -> str:
    """What a block prints with the server at `url`."""
    code = re.sub(r"(http://)?localhost:3000", lambda found: (found[1] or "") + url.removeprefix("http://"), code)
    argv = [sys.executable, "-W", "ignore", "-c", code] if language == "python" else ["bash", "-ec", code]
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # it refuses the loopback too
    said = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=env, check=False)
    if said.returncode:
        raise AssertionError(f"{code}\nended with {said.returncode}: {said.stderr}")
    return re.sub(r"[ \t]+$", "", said.stdout.rstrip(), flags=re.MULTILINE) + "\n"


def names(text: str) -> set[str]:
    """Names of fields and classes in what was printed: what a program relies on, whatever the model says."""
    return {name for found in _NAMES.findall(text) for name in found if name}


def _written(url: str) -> None:
    def filled(found: re.Match[str]) -> str:
        return (
            f"```{found['language']}\n{found['code']}```\n\n```text\n"
            f"{printed(found['language'], found['code'], url)}```\n"
        )

    PAGE.write_text(_BLOCK.sub(filled, parts()[0]).rstrip() + f"\n\n{EVERY}{every_task(url)}", encoding="utf-8")


if __name__ == "__main__":
    _written(sys.argv[1])
