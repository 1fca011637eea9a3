"""Checkpoints of one trunk opened as the settings say, with what tuning found on hardware like this. Serves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mtserve.backends.runtime import Runtime
from mtserve.checkpoint import Checkpoint
from mtserve.engine import Engine
from mtserve.loading import InForce, in_force, load_checkpoint
from mtserve.manifest import Speed
from mtserve.settings import Settings


@dataclass(frozen=True)
class Loaded:
    """Checkpoints of one trunk with their engine."""

    checkpoints: Sequence[Checkpoint]
    engine: Engine
    in_force: InForce

    @property
    def fingerprint(self) -> str:
        return self.checkpoints[0].manifest.trunk.fingerprint

    def speeds(self, cores: int) -> list[Speed]:
        """What tuning found for the profile in force on hardware like this with so many cores."""
        of = [each.manifest.profiles.get(self.in_force.profile) for each in self.checkpoints]
        found = [None if one is None else one.speeds.get(self.in_force.hardware.key) for one in of]
        return [speed for speed in found if speed is not None and speed.cores == cores]


def opened(checkpoints: Sequence[Checkpoint], settings: Settings, threads: int) -> Loaded:
    """Checkpoints of one trunk, or a bundle, as the settings say. Raises as `load_checkpoint`."""
    engine = load_checkpoint(
        *checkpoints,
        profile=None if settings.profile == "auto" else settings.profile,
        device=settings.device,
        capture=settings.capture,
        max_batch_tokens=settings.max_batch_tokens,
        max_past_tokens=settings.max_past_tokens,
        keep_bytes=settings.cache_mib * 2**20,
        runtime=Runtime(
            device=settings.device,
            providers=settings.onnx_providers,
            device_id=settings.onnx_device_id,
            threads=threads,
            arena=settings.onnx_arena,
            memory_mib=settings.onnx_memory_mib,
            cuda_graph=settings.onnx_cuda_graph,
            io_binding=settings.onnx_io_binding,
        ),
    )
    return Loaded(checkpoints, engine, in_force(engine, checkpoints[0].manifest.trunk.fingerprint))
