"""A bundle of an encoder and one of a decoder."""

from __future__ import annotations

import pytest

from tests.export.bundles import DECODER, ENCODER, Pair, pair


@pytest.fixture
def encoder() -> Pair:
    return pair("bert", only=ENCODER)


@pytest.fixture
def decoder() -> Pair:
    return pair("gpt2", only=DECODER)
