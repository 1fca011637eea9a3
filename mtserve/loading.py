"""A checkpoint's location to an engine that answers, in one of the profiles that it accepts. Knows no HTTP."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtserve.backends.base import Backend
from mtserve.backends.runtime import Runtime
from mtserve.bundle import Exported
from mtserve.checkpoint import Checkpoint
from mtserve.engine import DEFAULT_BUDGET, DEFAULT_PAST, Engine, Task
from mtserve.errors import CheckpointError, ConfigError, MissingExtraError
from mtserve.golden import GoldenReport, check_golden
from mtserve.head_file import HeadFile
from mtserve.profiles import PRECISIONS, Hardware, choose, profile_key, together
from mtserve.resolve import resolve
from mtserve.text import Text


@dataclass(frozen=True)
class InForce:
    """How an engine computes.

    padding_free   rows lie end to end; else the family did not fit and they are padded
    key            see `mtserve.profiles.profile_key`
    """

    profile: str
    hardware: Hardware
    padding_free: bool
    key: str


def load(
    location: str | Path,
    *,
    profile: str | None = None,
    device: str = "auto",
    accepted_only: bool = True,
    capture: bool = False,
    max_batch_tokens: int = DEFAULT_BUDGET,
) -> Engine:
    """Load a checkpoint or a bundle (a folder, or a hub id with an optional revision) once, for all its tasks. A bundle
    must reproduce its golden rows.

    `profile`, `device`, `accepted_only` and `capture` as for `load_checkpoint`. Raises ResolveError, CheckpointError,
    ConfigError, or MissingExtraError where torch or ONNX Runtime is not installed.
    """
    checkpoint = Checkpoint.open(resolve(location))
    engine = load_checkpoint(
        checkpoint,
        profile=profile,
        device=device,
        accepted_only=accepted_only,
        capture=capture,
        max_batch_tokens=max_batch_tokens,
    )
    if checkpoint.manifest.exported is not None:
        deque(reproduced(engine, checkpoint), maxlen=0)
    return engine


def reproduced(engine: Engine, checkpoint: Checkpoint) -> Iterator[tuple[str, GoldenReport]]:
    """Reports of the tasks that have golden rows, under the profile in force. Raises CheckpointError for the first one
    that does not reproduce them."""
    name = engine.backend.profile
    tolerance = checkpoint.manifest.tolerance(name)
    for task in checkpoint.manifest.tasks:
        if rows := checkpoint.golden(task.name):
            report = check_golden(engine, task.name, rows, tolerance=tolerance)
            if not report.reproduced:
                found = f"differ by {report.difference:.2g}; profile {name} allows {tolerance:.2g}"
                raise CheckpointError(f"task {task.name!r}: the logits of the golden rows {found}")
            yield task.name, report


def load_checkpoint(
    checkpoint: Checkpoint,
    *others: Checkpoint,
    profile: str | None = None,
    device: str = "auto",
    accepted_only: bool = True,
    capture: bool = False,
    max_batch_tokens: int = DEFAULT_BUDGET,
    max_past_tokens: int = DEFAULT_PAST,
    keep_bytes: int = 0,
    runtime: Runtime | None = None,
) -> Engine:
    """An engine over an opened checkpoint or bundle, and over the heads of other checkpoints of the same trunk.

    profile         its name; None chooses as serving does, the same one on every start (`mtserve.profiles.choose`)
    device          `auto`, `cpu` or `cuda`
    accepted_only   False takes a profile that the checkpoints do not accept too: to measure it
    runtime         how a bundle's graphs are opened; of a checkpoint it says nothing. Without it `device` alone counts
    capture         make the trunk's pass a graph before the first request: some seconds, after which every pass has
                    less overhead, a short one most (`mtserve.backends.captured`; on a GPU `mtserve.backends.graphs`)
    keep_bytes      how much is kept of what the trunk gave for rows, so that later tasks on them cost their heads alone

    Raises CheckpointError for a profile that one of them does not accept, ConfigError for one that is unknown, or does
    not run here.
    """
    every = (checkpoint, *others)
    text = checkpoint.text()
    if checkpoint.manifest.exported is not None:
        how = runtime or Runtime(device=device)
        backend: Backend = _onnx(every, checkpoint.manifest.exported, profile, how, keep_bytes=keep_bytes)
    else:
        backend = _eager(
            every, text, profile, device, accepted_only=accepted_only, capture=capture, keep_bytes=keep_bytes
        )
    entries = [entry for each in every for entry in each.manifest.tasks]
    return Engine(
        [Task(entry.name, entry.handler, entry.parsed_options, entry.metrics) for entry in entries],
        backend,
        text,
        chains=[chain for each in every for chain in each.manifest.chains],
        max_batch_tokens=max_batch_tokens,
        max_past_tokens=max_past_tokens,
    )


def _eager(
    checkpoints: Sequence[Checkpoint],
    text: Text,
    profile: str | None,
    device: str,
    *,
    accepted_only: bool,
    capture: bool,
    keep_bytes: int,
) -> Backend:
    try:
        from mtserve.backends import hardware
        from mtserve.backends.eager import EagerBackend
        from mtserve.weights import add_heads, load_model
    except ImportError as error:
        raise MissingExtraError("running a torch checkpoint", "torch") from error
    there = hardware.hardware(hardware.device(device))
    name = _checked(checkpoints, profile, there, accepted_only=accepted_only)
    model = load_model(checkpoints[0])
    check_vocabulary(text, model.trunk.config.vocab_size, model.trunk.config.pad_token_id)
    for other in checkpoints[1:]:
        add_heads(model, other)
    ways = {"capture": capture, "graphs": capture}
    return EagerBackend(model.to(there.device), pad_id=text.spec.pad_id, profile=name, keep_bytes=keep_bytes, **ways)


def _onnx(
    checkpoints: Sequence[Checkpoint], exported: Exported, profile: str | None, runtime: Runtime, *, keep_bytes: int
) -> Backend:
    bundle, *others = checkpoints
    if others:
        raise CheckpointError(f"{bundle.folder} is a bundle, which takes no heads of {others[0].folder}")
    if profile not in (None, exported.profile):
        raise ConfigError(f"{bundle.folder} is a bundle that computes in {exported.profile}; found profile {profile}")
    try:
        from mtserve.backends.onnx import OnnxBackend
        from mtserve.backends.sessions import Graphs
    except ImportError as error:
        raise MissingExtraError("running a bundle", "onnx") from error
    text = bundle.manifest.text
    check_vocabulary(bundle.text(), exported.vocab_size, text.pad_id)
    graphs = Graphs(bundle.folder, exported, runtime)
    if keep_bytes and graphs.bound:
        raise ConfigError(
            "the trunk's outputs stay on the GPU between trunk and heads, so none can be kept: MTSERVE_CACHE_MIB=0, or "
            "MTSERVE_ONNX_IO_BINDING=false"
        )
    return OnnxBackend(graphs, pad_id=text.pad_id, keep_bytes=keep_bytes)


def add_head(engine: Engine, task: Task, head: HeadFile) -> None:
    """Put a head that was sent, as this task, on an engine that runs; to be called where that steps (`Stepper.call`).

    Where it fails, nothing has changed. Raises CheckpointError for a bundle, for tensors that do not fit the task, and
    ConfigError for options that do not go with the tokenizer.
    """
    engine.backend.add(task.key, head)
    try:
        engine.add(task)
    except ConfigError:
        engine.backend.remove(task.key)
        raise


def remove_head(engine: Engine, key: str) -> None:
    """Free a head of which no work is left; to be called where the engine steps."""
    engine.remove(key)
    engine.backend.remove(key)


def check_vocabulary(text: Text, rows: int, pad_token_id: int | None) -> None:
    """Raise CheckpointError for a tokenizer with more tokens than the trunk has embeddings (`rows`), or another pad
    token."""
    pad = text.spec.pad_id
    if text.vocab_size > rows:
        raise CheckpointError(f"the tokenizer has {text.vocab_size} tokens, and the trunk embeddings for {rows}")
    if pad not in range(rows) or pad_token_id not in (None, pad):
        raise CheckpointError(f"the pad token is {pad} in the manifest and {pad_token_id} in the trunk's config")


def _checked(checkpoints: Sequence[Checkpoint], profile: str | None, there: Hardware, *, accepted_only: bool) -> str:
    """The profile to load in. Raises as `load_checkpoint`."""
    if profile is None:
        return choose(together(*(each.manifest.accepted for each in checkpoints)), there)
    if profile not in PRECISIONS:
        raise ConfigError(f"profile {profile!r} is unknown; allowed: {', '.join(PRECISIONS)}")
    if accepted_only:
        for each in checkpoints:
            each.manifest.tolerance(profile)
    if not PRECISIONS[profile].runs(there):
        runs = [name for name, precision in PRECISIONS.items() if precision.runs(there)]
        raise ConfigError(f"profile {profile} does not run on {there.key}; those that do: {', '.join(runs)}")
    return profile


def profile_for(checkpoint: Checkpoint, *, profile: str | None, device: str) -> str:
    """The profile in which `load_checkpoint` would load it here. Raises as that does."""
    exported = checkpoint.manifest.exported
    if exported is not None:
        return exported.profile
    try:
        from mtserve.backends import hardware
    except ImportError as error:
        raise MissingExtraError("running a torch checkpoint", "torch") from error
    return _checked([checkpoint], profile, hardware.hardware(hardware.device(device)), accepted_only=True)


def in_force(engine: Engine, fingerprint: str) -> InForce:
    """How an engine that `load_checkpoint` made computes."""
    backend = engine.backend
    key = profile_key(fingerprint, backend.profile, backend.hardware.device)
    return InForce(backend.profile, backend.hardware, padding_free=backend.padding_free, key=key)


def in_profile(engine: Engine, profile: str) -> Engine:
    """An engine over the same loaded model that computes in another profile, whether or not it is accepted."""
    from mtserve.backends.eager import EagerBackend

    loaded = engine.backend
    assert isinstance(loaded, EagerBackend)
    ways = {"capture": loaded.capture, "graphs": loaded.capture}
    backend = EagerBackend(loaded.model, pad_id=loaded.pad_id, profile=profile, **ways)
    limits: dict[str, Any] = {"max_batch_tokens": engine.max_batch_tokens, "max_past_tokens": engine.max_past_tokens}
    return Engine(engine.tasks.values(), backend, engine.text, chains=engine.chains.values(), **limits)
