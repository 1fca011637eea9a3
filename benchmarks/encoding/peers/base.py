"""The protocol between the benchmark and what encodes. Knows no framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from benchmarks.encoding.peers.batching import Floats


class Peer(Protocol):
    """An engine with a model, loaded by `cls(folder, threads=…, **options)`.

    A setting is what may be changed between two calls; the fastest of some is found before anything counts.
    `encode` takes rows of ids (`batching.Row`), or texts, as the engine does; it gives embeddings in their order,
    (inputs, hidden).
    """

    versions: dict[str, str]

    def prepare(self, inputs: Sequence[Any]) -> Any:
        """Inputs in the form in which `encode` takes them, before any call counts."""
        return inputs

    def use(self, setting: Mapping[str, Any]) -> None: ...

    def encode(self, inputs: Any) -> Floats: ...
