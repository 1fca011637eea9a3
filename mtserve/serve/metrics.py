"""Prometheus metrics of engine, queue and routes. Knows no BentoML.

They are made when the first table is loaded, since only then is it settled where the processes of a server keep them:
in files of the folder PROMETHEUS_MULTIPROC_DIR, from which each of them can tell of all.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mtserve.observer import Observer, Ran, Reason
from mtserve.serve.exchange import Exchange

if TYPE_CHECKING:
    from mtserve.serve.table import TaskTable

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOKENS = (16, 64, 256, 1024, 2048, 4096, 8192, 16_384, 65_536)


class Metrics:
    """All metrics of a process. Names end in their unit, as Prometheus advises; `trunk` is how a fingerprint begins."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self.padding_free = Gauge(
            "mtserve_trunk_padding_free",
            "1 where a trunk's rows lie end to end, 0 where they are padded.",
            ["trunk", "family", "profile"],
            multiprocess_mode="livemin",
        )
        self.requests = Counter(
            "mtserve_requests_total",
            "HTTP requests that ended, by route, task (once for each that a request named) and status.",
            ["route", "task", "status"],
        )
        self.request_seconds = Histogram(
            "mtserve_request_seconds", "From a request's first byte to its answer's last.", ["route"], buckets=_SECONDS
        )
        self.queue_rows = Gauge(
            "mtserve_queue_rows", "Inputs that wait for the engine.", ["trunk"], multiprocess_mode="livesum"
        )
        self.queue_tokens = Gauge(
            "mtserve_queue_tokens", "Tokens of the inputs that wait.", ["trunk"], multiprocess_mode="livesum"
        )
        self.wait_seconds = Histogram(
            "mtserve_queue_wait_seconds", "How long requests waited for the engine.", ["task"], buckets=_SECONDS
        )
        self.batch_rows = Histogram("mtserve_batch_rows", "Distinct rows of a batch.", ["trunk"], buckets=_COUNTS)
        self.batch_tokens = Histogram("mtserve_batch_tokens", "Tokens of a batch.", ["trunk"], buckets=_TOKENS)
        self.batch_tasks = Histogram(
            "mtserve_batch_tasks", "Tasks that shared a batch.", ["trunk"], buckets=_COUNTS[:6]
        )
        self.padded_tokens = Counter(
            "mtserve_padded_tokens_total", "Tokens that trunks computed, padding included.", ["trunk"]
        )
        self.joined = Counter(
            "mtserve_joined_rows_total", "Rows that were not encoded, as an equal one was.", ["trunk"]
        )
        self.reused = Counter(
            "mtserve_reused_rows_total", "Rows whose trunk outputs were kept from an earlier batch.", ["trunk"]
        )
        self.missed = Counter("mtserve_computed_rows_total", "Rows for which the trunk ran.", ["trunk"])
        self.kept = Gauge(
            "mtserve_kept_outputs_bytes", "Trunk outputs that are kept.", ["trunk"], multiprocess_mode="livesum"
        )
        self.seconds = Counter(
            "mtserve_compute_seconds_total", "Seconds by stage: tokenise, trunk, head.", ["trunk", "stage"]
        )
        self.truncated_inputs = Counter("mtserve_truncated_inputs_total", "Inputs of which text was cut.", ["task"])
        self.drops = Counter(
            "mtserve_dropped_requests_total", "Requests refused, or given up on the way, by reason.", ["task", "reason"]
        )

    def publish(self, table: TaskTable) -> None:
        """Say how the trunks of a table compute."""
        for trunk in table.trunks:
            labels = trunk.entry.fingerprint[:12], trunk.entry.family, trunk.in_force.profile
            self.padding_free.labels(*labels).set(trunk.in_force.padding_free)

    def ended(self, exchange: Exchange, *, status: int, seconds: float) -> None:
        """A request was answered, or its client left (status 499)."""
        for task in exchange.tasks or ("",):
            self.requests.labels(exchange.route, task, str(status)).inc()
        self.request_seconds.labels(exchange.route).observe(seconds)

    def observer(self, trunk: str) -> Observer:
        """What counts for one trunk."""
        return _OfTrunk(self, trunk)


class _OfTrunk(Observer):
    """Counts for a trunk; its metrics are looked up once, as that costs more than counting."""

    def __init__(self, every: Metrics, trunk: str) -> None:
        self._every = every
        self._rows, self._tokens = every.queue_rows.labels(trunk), every.queue_tokens.labels(trunk)
        self._batch = [one.labels(trunk) for one in (every.batch_rows, every.batch_tokens, every.batch_tasks)]
        self._padded, self._joined = every.padded_tokens.labels(trunk), every.joined.labels(trunk)
        self._reused, self._computed = every.reused.labels(trunk), every.missed.labels(trunk)
        self._kept = every.kept.labels(trunk)
        self._seconds = {stage: every.seconds.labels(trunk, stage) for stage in ("tokenise", "trunk", "head")}

    def prepared(self, tasks: tuple[str, ...], *, seconds: float) -> None:
        self._seconds["tokenise"].inc(seconds)

    def truncated(self, task: str, *, inputs: int) -> None:
        if inputs:
            self._every.truncated_inputs.labels(task).inc(inputs)

    def waiting(self, *, rows: int, tokens: int) -> None:
        self._rows.set(rows)
        self._tokens.set(tokens)

    def started(self, task: str, *, wait_s: float) -> None:
        self._every.wait_seconds.labels(task).observe(wait_s)

    def ran(self, batch: Ran) -> None:
        for one, value in zip(self._batch, (batch.rows, batch.tokens, len(batch.tasks)), strict=True):
            one.observe(value)
        self._padded.inc(batch.padded)
        self._joined.inc(batch.joined)
        self._reused.inc(batch.reused)
        self._computed.inc(batch.rows - batch.reused)
        self._kept.set(batch.kept)
        self._seconds["trunk"].inc(batch.trunk_s)
        self._seconds["head"].inc(batch.head_s)

    def dropped(self, task: str, reason: Reason) -> None:
        self._every.drops.labels(task, reason).inc()


def exposition() -> tuple[bytes, int, None, str]:
    """(body, status, headers, media type) of the answer to Prometheus, of all processes of the server."""
    from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

    registry = REGISTRY
    if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        for pid in {path.stem.rpartition("_")[2] for path in Path(folder).glob("gauge_live*_*.db")}:
            if not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
                mark_process_dead(pid)  # type: ignore[no-untyped-call]  # else its gauges count for ever
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry), 200, None, CONTENT_TYPE_LATEST


@cache
def metrics() -> Metrics:
    """The one of this process."""
    return Metrics()
