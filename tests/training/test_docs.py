"""The page on training names every key, strategy and step that there is."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from pydantic import BaseModel

from mtserve.preparation import PRESETS, STEPS
from tests.shared_data import ROOT
from training import __all__ as api
from training.config import RunConfig, TaskConfig, Training
from training.trainer.mixture import MixtureConfig, Strategy

PAGE = (ROOT / "docs/training.md").read_text(encoding="utf-8")
PLAIN = re.sub(r"^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
NAMED = {name for cell in re.findall(r"`([^`]+)`", PLAIN) for name in re.findall(r"[\w:]+", cell)}


@pytest.mark.parametrize("section", [RunConfig, TaskConfig, Training, MixtureConfig])
def test_every_key_is_named(section: type[BaseModel]) -> None:
    assert set(section.model_fields) - {"strategy"} <= NAMED


def test_every_strategy_preset_and_name_of_the_api_is_named() -> None:
    assert {*get_args(Strategy), *PRESETS} <= NAMED
    assert all(name in PAGE for name in api if name != "ReportsMetrics")


def test_the_steps_are_those_of_the_code() -> None:
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", PAGE.split("| step |")[1], flags=re.MULTILINE))
    assert rows == {name: text for name, (text, _) in STEPS.items()}
