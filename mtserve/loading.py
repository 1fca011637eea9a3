"""A checkpoint's location to an engine that answers, in one of the profiles that it accepts. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtserve.checkpoint import Checkpoint
from mtserve.engine import DEFAULT_BUDGET, DEFAULT_PAST, Engine, Task
from mtserve.errors import CheckpointError, ConfigError, MissingExtraError
from mtserve.profiles import PRECISIONS, Device, Hardware, choose, profile_key, together
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
    """Load a checkpoint (a folder, or a hub id with an optional revision) once, for all its tasks.

    `profile`, `device`, `accepted_only` and `capture` as for `load_checkpoint`. Raises ResolveError, CheckpointError,
    ConfigError, or MissingExtraError where torch is not installed.
    """
    checkpoint = Checkpoint.open(resolve(location))
    return load_checkpoint(
        checkpoint,
        profile=profile,
        device=device,
        accepted_only=accepted_only,
        capture=capture,
        max_batch_tokens=max_batch_tokens,
    )


def load_checkpoint(
    checkpoint: Checkpoint,
    *others: Checkpoint,
    profile: str | None = None,
    device: str = "auto",
    accepted_only: bool = True,
    capture: bool = False,
    max_batch_tokens: int = DEFAULT_BUDGET,
    max_past_tokens: int = DEFAULT_PAST,
) -> Engine:
    """An engine over an opened checkpoint, and over the heads of others that have the same trunk and other tasks.

    profile         its name; None chooses as serving does, the same one on every start (`mtserve.profiles.choose`)
    device          `auto`, `cpu` or `cuda`
    accepted_only   False takes a profile that the checkpoints do not accept too: to measure it
    capture         make the trunk's pass a graph before the first request: some seconds, after which every pass has
                    less overhead, a short one most (`mtserve.backends.captured`; on a GPU `mtserve.backends.graphs`)

    Raises CheckpointError for a profile that one of them does not accept, ConfigError for one that is unknown, or does
    not run here.
    """
    try:
        from mtserve.backends.eager import EagerBackend
        from mtserve.backends.hardware import device as device_of
        from mtserve.backends.hardware import hardware
        from mtserve.weights import add_heads, load_model
    except ImportError as error:
        raise MissingExtraError("running a torch checkpoint", "torch") from error
    every = (checkpoint, *others)
    there = hardware(device_of(device))
    name = _checked(every, profile, there, accepted_only=accepted_only)
    model, text = load_model(checkpoint), checkpoint.text()
    check_vocabulary(text, model.trunk.config)
    for other in others:
        add_heads(model, other)
    entries = [entry for each in every for entry in each.manifest.tasks]
    return Engine(
        [Task(entry.name, entry.handler, entry.parsed_options, entry.metrics) for entry in entries],
        EagerBackend(
            model.to(there.device),
            pad_id=checkpoint.manifest.text.pad_id,
            profile=name,
            capture=capture,
            graphs=capture,
        ),
        text,
        max_batch_tokens=max_batch_tokens,
        max_past_tokens=max_past_tokens,
    )


def check_vocabulary(text: Text, config: Any) -> None:
    """Raise CheckpointError for a tokenizer with more tokens than the trunk has embeddings, or another pad token."""
    pad, rows = text.spec.pad_id, int(config.vocab_size)
    if text.vocab_size > rows:
        raise CheckpointError(f"the tokenizer has {text.vocab_size} tokens, and the trunk embeddings for {rows}")
    if pad not in range(rows) or config.pad_token_id not in (None, pad):
        raise CheckpointError(f"the pad token is {pad} in the manifest and {config.pad_token_id} in the trunk's config")


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


def in_force(engine: Engine, fingerprint: str) -> InForce:
    """How an engine that `load_checkpoint` made computes."""
    from mtserve.backends.eager import EagerBackend
    from mtserve.backends.hardware import hardware

    backend = engine.backend
    assert isinstance(backend, EagerBackend)
    device: Device = "cuda" if backend.served.device.type == "cuda" else "cpu"
    key = profile_key(fingerprint, backend.profile, device)
    return InForce(backend.profile, hardware(device), padding_free=backend.served.flat, key=key)


def in_profile(engine: Engine, profile: str) -> Engine:
    """An engine over the same loaded model that computes in another profile, whether or not it is accepted."""
    from mtserve.backends.eager import EagerBackend

    loaded = engine.backend
    assert isinstance(loaded, EagerBackend)
    ways = {"capture": loaded.capture, "graphs": loaded.capture}
    backend = EagerBackend(loaded.model, pad_id=loaded.pad_id, profile=profile, **ways)
    limits: dict[str, Any] = {"max_batch_tokens": engine.max_batch_tokens, "max_past_tokens": engine.max_past_tokens}
    return Engine(engine.tasks.values(), backend, engine.text, **limits)
