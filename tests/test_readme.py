"""The README's commands and examples, run as they stand on a tiny checkpoint in place of the demo's."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtserve.tasks import KINDS
from tests import transcripts
from tests.tiny import tiny, write_checkpoint
from training.runfile import read_config

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
DEMO = {
    "intent": ("classification", {"labels": ["billing", "delivery"], "max_length": 48}),
    "sentiment": ("classification", {"labels": ["negative", "positive"], "max_length": 48}),
    "similarity": ("similarity", {"low": 0, "high": 5, "max_length": 48}),
    "everyday": ("multiple_choice", {"max_length": 48}),
    "entities": ("token_classification", {"labels": ["person", "place"], "max_length": 48}),
}
STYLE = {"to_elizabethan": ("generation", {"max_length": 64, "max_new_tokens": 12})}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(prefix: str) -> list[list[str]]:
    """Shell commands of the README that begin so, comments dropped."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith(prefix)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory that holds the demo's two checkpoints."""
    home = tmp_path_factory.mktemp("readme")
    write_checkpoint(home / "demo-checkpoint", tiny("bert", tasks=DEMO))
    write_checkpoint(home / "demo-checkpoint-style", tiny("gpt2", tasks=STYLE))
    return home


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """The README's serve command, on a free port."""
    (serve,) = commands("mtserve serve")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert serve[-2:] == ["--port", "3000"]
    argv = [sys.executable, "-m", "mtserve", *serve[1:-1], str(port)]
    child = subprocess.Popen(argv, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 150
        while True:
            try:
                urllib.request.urlopen(f"{address}/readyz", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert child.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield address
    finally:
        child.terminate()
        child.wait(timeout=30)


@pytest.mark.parametrize("command", commands("mtserve predict") + commands("mtserve inspect"), ids=" ".join)
def test_commands(command: list[str], folder: Path) -> None:
    argv = [sys.executable, "-m", "mtserve", *command[1:]]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_python(folder: Path, url: str) -> None:
    found = blocks("python")
    assert len(found) == 3
    code = "\n".join(found).replace("http://127.0.0.1:3000", url)
    env = {**os.environ, "HF_HUB_OFFLINE": "0"}  # offline, the hub's client refuses loopback addresses too
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_curl(url: str) -> None:
    answers = []
    for command in commands("curl"):
        (address,) = [word for word in command if word.startswith("localhost:3000")]
        request = urllib.request.Request(
            address.replace("localhost:3000", url),
            command[command.index("-d") + 1].encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            answers.append(response.read().decode())
    one, three, streamed = answers
    assert {entry["label"] for entry in json.loads(one)[0]} == {"billing", "delivery"}
    assert set(json.loads(three)["outputs"]) == {"intent", "sentiment", "entities"}
    assert json.loads(three)["usage"]["trunk_passes"] == 1
    events = [json.loads(line.removeprefix("data: ")) for line in streamed.splitlines() if line]
    assert "".join(event["token"]["text"] for event in events) == events[-1]["generated_text"]


def test_run_file(tmp_path: Path) -> None:
    (yaml,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(yaml)
    (command,) = commands("mtserve train")
    config = read_config(tmp_path / command[2], command[3:])
    assert config.training.epochs == 1
    assert set(config.tasks) == {"intent", "duplicates"}


def test_every_kind_and_parameter_is_in_the_table() -> None:
    for kind in KINDS.values():
        (row,) = re.findall(rf"^\| `{kind.name}`.*$", README, flags=re.MULTILINE)
        for parameter in kind.parameters.model_fields:
            assert f"`{parameter}`" in row


@pytest.mark.parametrize(("language", "code", "before"), list(transcripts.blocks()))
def test_what_clients_print_has_the_form_that_their_page_shows(
    url: str, language: str, code: str, before: str | None
) -> None:
    assert before is not None, "make transcripts"
    found = transcripts.printed(language, code, url)
    may_lack = {"end", "start", "entity", "entity_group", "word", "TokenClassificationOutputElement"}  # no entity found
    shown = transcripts.names(before) - may_lack
    assert shown <= transcripts.names(found)
    assert found.strip()


def test_the_page_has_the_requests_that_a_server_shows_for_every_task(url: str) -> None:
    assert transcripts.parts()[1] == transcripts.every_task(url), "make transcripts"
