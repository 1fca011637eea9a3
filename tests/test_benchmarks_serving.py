"""The instruments of the serving benchmark tell right answers from wrong ones, and lost from refused."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.serving import faults
from benchmarks.serving.faults import Others, ask
from benchmarks.serving.servers import Running, Server
from benchmarks.serving.soak import requests


class Handler(BaseHTTPRequestHandler):
    """Answers a text with its length; errs for some, and hangs up on others."""

    def do_POST(self) -> None:
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
        if text == "hang up":
            return
        body = json.dumps({"scores": [len(text) if text != "err" else 0.5]}).encode()
        self.send_response(429 if text == "busy" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def one() -> Iterator[Running]:
    server = Server(
        "fake", "fp32", 1, lambda port: [], {}, lambda task, text: (f"/{task}", {"inputs": text}),
        lambda answer: answer["scores"],
    )  # fmt: skip
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield Running(server, SimpleNamespace(pid=0), made.server_address[1], Path())
        made.shutdown()


def test_each_way_that_a_request_ends_is_told_apart(one: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    assert ask(free, "/t", {"inputs": "x"})[0] == "refused"
    for text, how in (("x", "200"), ("busy", "429"), ("hang up", "broken")):
        assert ask(one.port, "/t", {"inputs": text})[0] == how
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(faults, "TIMEOUT_S", 0.1)
        assert ask(silent.getsockname()[1], "/t", {"inputs": "x"})[0] == "timeout"


def test_others_check_what_they_get(one: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "PAUSE_S", 0.01)
    texts = ("abc", "err", "busy", "hang up")
    enough = threading.Event()
    with Others(one, {("t", text): [len(text)] for text in texts}) as others:
        while len(others.ended) < 4 and not enough.wait(0.01):
            pass
    assert set(others.ended) == {"right", "wrong", "429", "broken"}
    assert sum(others.ended.values()) == len(others.times)


def test_the_soak_asks_no_text_twice_and_mixes_as_it_says() -> None:
    drawn = [(path, json.loads(body)) for path, body in itertools.islice(requests(["one", "two"], ["a", "b"]), 3000)]
    found: Counter[str] = Counter()
    texts: list[str] = []
    for path, body in drawn:
        inputs = body["inputs"]
        several = inputs if isinstance(inputs, list) else [inputs]
        if not all(isinstance(text, str) for text in several):
            found["wrong"] += 1
            continue
        texts += several
        found[
            "predict" if path == "/predict" else "many" if len(several) > 1 else "long" if len(inputs) > 1000 else "one"
        ] += 1
    assert len(set(texts)) == len(texts)
    for kind, share in {"predict": 0.10, "wrong": 0.04, "long": 0.03, "many": 0.01, "one": 0.82}.items():
        assert found[kind] / 3000 == pytest.approx(share, abs=0.015), kind
