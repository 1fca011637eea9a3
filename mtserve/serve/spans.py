"""OpenTelemetry spans of an answered request: tokenising, waiting, running, under the span of the HTTP request.

BentoML makes that one, where its configuration names an exporter and a sample rate; without it nothing is recorded.
What the stages took is known once the answer is there, so the spans are written down then.
"""

from __future__ import annotations

import time
from itertools import pairwise

from mtserve.serve.exchange import Exchange

_STAGES = {"mtserve.tokenise": "prepare_time_ms", "mtserve.queue": "queue_time_ms", "mtserve.run": "run_time_ms"}


def record(exchange: Exchange) -> None:
    """Add the spans of a request, if the current one is recorded."""
    try:
        from opentelemetry import trace
    except ImportError:
        return
    if not exchange.usage or not trace.get_current_span().is_recording():
        return
    tracer, usage = trace.get_tracer("mtserve"), exchange.usage
    at = [time.time_ns() - int(usage["total_time_ms"] * 1e6)]
    for stage in _STAGES.values():
        at.append(at[-1] + int(usage[stage] * 1e6))
    facts = {"mtserve.request_id": exchange.request_id, "mtserve.tasks": exchange.tasks}
    counts = {f"mtserve.{name}": usage[name] for name in ("inputs", "tokens", "truncated", "trunk_passes")}
    trace.get_current_span().set_attributes({**facts, **counts})
    for name, (start, end) in zip(_STAGES, pairwise(at), strict=True):
        tracer.start_span(name, start_time=start).end(end_time=end)
