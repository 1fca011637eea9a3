"""The playground in a real browser, every kind of task by clicks; `make ui-check`. Skipped where there is no Chromium.

MTSERVE_UI_CHECKPOINTS names checkpoints in place of tiny ones, MTSERVE_UI_SHOTS a folder for pictures.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.browser import DESK, PHONE, Visitor, chromium, visitor
from tests.serve.test_service import started

pytestmark = pytest.mark.slow
TEXTS = {
    "classification": {"Text": "I was charged twice for my order and nobody answers."},
    "similarity": {"Text": "A man is feeding his dog.", "Text pair": "Someone gives food to a pet."},
    "multiple_choice": {
        "Question": "What do you open when it starts to rain?",
        "Choices": "an umbrella\na tin of soup\na book",
    },
    "token_classification": {"Text": "Ana Silva moved from Porto to Oslo"},
    "generation": {"Text": "I do not know where he has gone."},
}


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(os.environ.get("MTSERVE_UI_SHOTS") or tmp_path_factory.mktemp("shots")).absolute()


@pytest.fixture(scope="module")
def locations(checkpoints: tuple[str, str]) -> list[str]:
    chromium()
    named = os.environ.get("MTSERVE_UI_CHECKPOINTS", "")
    return named.split(",") if named else list(checkpoints)


@pytest.fixture(scope="module")
def server(locations: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with started(locations, tmp_path_factory.mktemp("server"), MTSERVE_UI="true") as (url, _, log):
        yield url
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def tasks(server: str) -> dict[str, str]:
    """The first task of each kind, by kind; there is one of all five."""
    found: dict[str, str] = {}
    for task in httpx.get(server + "/tasks").json()["tasks"]:
        found.setdefault(task["kind"], task["name"])
    assert set(found) == set(TEXTS)
    return found


@pytest.fixture(scope="module")
def window(shots: Path) -> Iterator[Visitor]:
    with visitor(shots) as made:
        yield made


@pytest.fixture
def page(server: str, window: Visitor) -> Iterator[Visitor]:
    """A fresh page; at the end it must have asked nobody else for anything, and its console must be silent."""
    list(window.requests()), window.complaints()
    window.size(DESK)
    window.open(server + "/ui")
    yield window
    elsewhere = [url for url in window.requests() if not url.startswith((server + "/", "data:", "blob:"))]
    assert elsewhere == []
    assert window.complaints() == []


def asked(window: Visitor) -> tuple[str, dict[str, Any]]:
    """(address, body) of the curl that is shown."""
    said = window.until(lambda: [one.text for one in window.all(".cm-content") if one.text.startswith("curl")], "curl")
    words = shlex.split(said[0].replace("\\\n", " "))
    url = next(word for word in words if word.startswith("http"))
    return url, json.loads(words[words.index("-d") + 1])


@pytest.mark.parametrize("kind", sorted(TEXTS))
def test_each_kind_answers_as_its_route_does(page: Visitor, server: str, tasks: dict[str, str], kind: str) -> None:
    page.pick(tasks[kind], kind)
    for label, text in TEXTS[kind].items():
        page.write(label, text)
    if kind == "generation":
        page.click("label", "Read along")  # that has a test of its own
    page.click("button", "Run")
    found = page.answer()
    url, body = asked(page)
    assert url == f"{server}/tasks/{tasks[kind]}"
    assert httpx.post(url, json=body).json() == found
    assert "trunk pass" in page.one(".facts").text
    shown = {
        "classification": ".bars li",
        "similarity": ".score",
        "multiple_choice": ".bars li",
        "token_classification": ".marked",
        "generation": ".written",
    }
    assert page.all(".out " + shown[kind])
    page.shot(f"{kind}-desk")
    page.size(PHONE)
    time.sleep(0.5)
    assert page.overflow() == 0
    page.shot(f"{kind}-phone")


def test_parameters_are_of_the_request(page: Visitor, tasks: dict[str, str]) -> None:
    page.pick(tasks["classification"], "classification")
    page.click("button", "Parameters")
    page.write("Top k", "2")
    page.click("button", "Run")
    page.answer()
    assert len(page.all(".bars li")) == 2
    assert asked(page)[1]["parameters"] == {"top_k": 2}


def test_a_wrong_parameter_is_told_in_the_servers_words(page: Visitor, tasks: dict[str, str]) -> None:
    page.pick(tasks["classification"], "classification")
    page.click("button", "Parameters")
    page.write("Threshold", "3")
    page.click("button", "Run")
    url, body = asked(page)
    told = httpx.post(url, json=body).json()["error"]
    assert page.one(".problem").text == f"{told['code']} {told['message']}"
    page.shot("error-desk")


def test_several_tasks_side_by_side(page: Visitor, server: str) -> None:
    page.click("button", "Several tasks, one text")
    page.write("Text", "Amina Yusuf from Nairobi was charged twice.")
    page.click("button", "Run all")
    page.until(lambda: page.all(".cards section"), "cards")
    url, body = asked(page)
    assert url == f"{server}/predict"
    told = httpx.post(url, json=body).json()
    raw = page.driver.find_elements("css selector", ".cards details pre")
    assert [json.loads(one.get_attribute("textContent")) for one in raw] == [of[0] for of in told["outputs"].values()]
    assert len(raw) >= 3
    assert "1 trunk pass" in page.one(".facts").text
    page.shot("together-desk")
    page.size(PHONE)
    time.sleep(0.5)
    assert page.overflow() == 0
    page.shot("together-phone")


def test_a_translation_is_read_along(page: Visitor, tasks: dict[str, str]) -> None:
    page.pick(tasks["generation"], "generation")
    page.write("Text", TEXTS["generation"]["Text"])
    page.click("button", "Run")
    page.until(lambda: [one for one in page.all(".facts") if "ended by" in one.text], "the end of the stream")
    url, body = asked(page)
    assert body.pop("stream") is True
    assert httpx.post(url, json=body).json()[0]["generated_text"] == page.one(".written").text
    page.shot("stream-desk")
    page.size(PHONE)
    time.sleep(0.5)
    page.shot("stream-phone")


def test_an_open_page_does_not_hold_up_the_end(locations: list[str], window: Visitor, tmp_path: Path) -> None:
    with started(locations, tmp_path, MTSERVE_UI="true") as (url, process, _):
        window.open(url + "/ui")
        window.click("button", "Run")
        window.answer()
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert time.monotonic() - began < 10
    window.driver.get("about:blank")
    window.complaints()


def test_keys_are_asked_for_by_the_browser(locations: list[str], window: Visitor, tmp_path: Path) -> None:
    key = "a-key-of-the-tests"
    with started(locations, tmp_path, MTSERVE_UI="true", MTSERVE_API_KEYS=key) as (url, _, _):
        window.driver.get(url.replace("://", f"://me:{key}@") + "/ui/")  # as typed into the browser's prompt
        window.open(url + "/ui/")
        window.click("button", "Run")
        assert window.answer()
        named = "$MTSERVE_API_KEY"
        window.until(lambda: [one for one in window.all(".cm-content") if named in one.text], "the request to copy")
        assert key not in window.driver.page_source
    window.complaints()


def test_several_workers_share_a_page(locations: list[str], window: Visitor, tmp_path: Path) -> None:
    with started(locations, tmp_path, MTSERVE_UI="true", MTSERVE_WORKERS="2") as (url, _, log):
        window.open(url + "/ui")
        for name, kind in [(task["name"], task["kind"]) for task in httpx.get(url + "/tasks").json()["tasks"]]:
            window.pick(name, kind)
            window.click("button", "Run")
            window.until(lambda: asked(window)[0].endswith("/" + name), name)  # noqa: B023
            assert window.answer()
            assert not window.all(".problem")
        assert window.complaints() == []
        window.driver.get("about:blank")
    assert "Traceback" not in log.read_text()
