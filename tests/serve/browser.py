"""A headless Chromium, as a visitor of the playground uses it: by what is written on the page."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

DESK, PHONE = (1280, 900), (390, 844)


def chromium() -> tuple[str, str]:
    """(browser, driver), or the test is skipped with what is missing."""
    if find_spec("selenium") is None:
        pytest.skip("selenium is not installed: make ui-check")
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in found:
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    return str(found[0]), str(found[1])


class Visitor:
    """One browser window on a server's playground."""

    def __init__(self, driver: Any, shots: Path) -> None:
        self.driver, self.shots = driver, shots

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.until(lambda: self.all("#task input"), "the tasks of the page")

    def size(self, size: tuple[int, int]) -> None:
        how = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", how)

    def all(self, css: str) -> list[Any]:
        """What is visible of a selector."""
        return [one for one in self.driver.find_elements("css selector", css) if one.is_displayed()]

    def one(self, css: str) -> Any:
        (found,) = self.until(lambda: self.all(css), css)
        return found

    def until(self, found: Callable[[], Any], what: str, *, seconds: float = 60) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := found():
                    return value
            except StaleElementReferenceException:
                pass
            time.sleep(0.05)
        self.shot("missing")
        raise AssertionError(f"not on the page: {what}")

    def click(self, css: str, text: str) -> None:
        """Click what is visible and has this text."""
        found = self.until(
            lambda: [one for one in self.all(css) if one.text.partition("\n")[0].strip() == text], f"{css}: {text}"
        )
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found[0])
        found[0].click()

    def pick(self, task: str, kind: str) -> None:
        """Choose a task, and wait for the form of its kind."""
        self.click("#task label", task)
        self.one(f"#form-{kind}")

    def field(self, label: str) -> Any:
        """The input of a field, by its label; one without a label would not be found."""
        named = "//label[.//span[normalize-space(text())=$]]//*[self::textarea or self::input]"
        path = named.replace("$", json.dumps(label))
        (found,) = self.until(
            lambda: [one for one in self.driver.find_elements("xpath", path) if one.is_displayed()], label
        )
        return found

    def write(self, label: str, text: str) -> None:
        """Type into a field what stands for what was there."""
        from selenium.webdriver.common.keys import Keys

        field = self.field(label)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE)
        field.send_keys(text.replace("\n", Keys.SHIFT + Keys.ENTER + Keys.NULL) if field.tag_name == "input" else text)

    def answer(self) -> Any:
        """The answer that is shown, as its JSON."""
        folded = self.one(".out .answer").find_element("css selector", "details pre")
        return json.loads(folded.get_attribute("textContent"))

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        script = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        return int(self.driver.execute_script(script))

    def shot(self, name: str) -> None:
        """The whole page as a picture."""
        height = self.driver.execute_script("return document.documentElement.scrollHeight")
        width = self.driver.execute_script("return innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        taken = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "png", "clip": clip, "captureBeyondViewport": True}
        )
        import base64

        self.shots.mkdir(parents=True, exist_ok=True)
        (self.shots / f"{name}.png").write_bytes(base64.b64decode(taken["data"]))

    def requests(self) -> Iterator[str]:
        """Addresses of all that the page has asked for since the last call."""
        for entry in self.driver.get_log("performance"):
            said = json.loads(entry["message"])["message"]
            if said["method"] == "Network.requestWillBeSent":
                yield said["params"]["request"]["url"]

    def complaints(self) -> list[str]:
        """What the console has said since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@contextmanager
def visitor(shots: Path) -> Iterator[Visitor]:
    browser, driver = chromium()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "hide-scrollbars",
        "disable-background-networking",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    os.environ.setdefault("SE_AVOID_STATS", "true")
    window = webdriver.Chrome(service=Service(driver), options=options)
    try:
        yield Visitor(window, shots)
    finally:
        window.quit()
