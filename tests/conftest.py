"""Tiny random models of every family that the project supports, and a tokenizer for them. No network, no downloads."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="tables-")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # processes of several tests compute at once on the same cores
os.environ.setdefault("MTSERVE_CAPTURE", "false")  # seconds for every server that a test starts; tests/test_serving.py

import pytest
import torch
from hypothesis import settings

from tests.tiny import FAMILIES, TOKENIZER_JSON, Tiny, tiny

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

# Timing is never tested, and a failure must come again on the next run.
settings.register_profile("mtserve", deadline=None, derandomize=True)
settings.load_profile("mtserve")


@pytest.fixture(autouse=True, scope="session")
def _one_thread_for_fixtures() -> None:
    torch.set_num_threads(1)  # tiny matrices are slower on several


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Also where a server that an earlier test started in this process has set its own number: sums depend on it."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def small() -> Tiny:
    """A tiny BERT with a task of every kind that it can have."""
    return tiny("bert")


@pytest.fixture
def small_causal() -> Tiny:
    """A tiny GPT-2 with two generation tasks and a classifier."""
    return tiny("gpt2")


@pytest.fixture
def tokenizer_json() -> str:
    return TOKENIZER_JSON
