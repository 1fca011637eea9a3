"""How a bundle's graphs are to be opened, as data: on what, with how many threads and how much memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtserve.errors import ConfigError

PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
ON_GPU = ("tensorrt", "cuda")
_MIB = 2**20


@dataclass(frozen=True)
class Runtime:
    """How graphs are opened.

    device       `auto` (a GPU where this ONNX Runtime can use one), `cpu` or `cuda`
    providers    by order of preference, of `tensorrt`, `cuda`, `openvino`, `cpu`; empty: what the device has
    device_id    which GPU
    threads      of one operator; None leaves it to ONNX Runtime
    arena        keep freed memory for the next pass
    memory_mib   most that a session takes of a GPU's memory; None: no limit
    cuda_graph   record passes of a trunk without a cache, for shapes that come again; needs io-binding
    io_binding   states stay on the GPU between trunk and heads
    """

    device: str = "auto"
    providers: tuple[str, ...] = ()
    device_id: int = 0
    threads: int | None = None
    arena: bool = True
    memory_mib: int | None = None
    cuda_graph: bool = False
    io_binding: bool = True

    def chosen(self, available: Sequence[str], version: str) -> tuple[str, ...]:
        """Providers to ask for, CPU last, of those that an ONNX Runtime of that version has by their long names. Raises
        ConfigError for what it has not."""
        if unknown := [name for name in self.providers if name not in PROVIDERS]:
            raise ConfigError(f"ONNX provider {unknown[0]!r} is unknown; allowed: {', '.join(PROVIDERS)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda; found {self.device!r}")
        there = [name for name, long in PROVIDERS.items() if long in available]
        wanted = self.providers or {"cpu": ("cpu",), "cuda": ("cuda",)}.get(self.device, ())
        for name in wanted:
            if name not in there:
                raise ConfigError(f"ONNX Runtime {version} has no {name} provider; {_remedy(name, there)}")
        found = list(wanted or ["cuda" if "cuda" in there else "cpu"])
        return (*found, *(["cpu"] if "cpu" not in found else []))

    def options(self, name: str, *, record: bool = False) -> dict[str, Any]:
        """Of a provider; `record` for a graph whose passes are to be recorded."""
        if name not in ON_GPU:
            return {}
        found: dict[str, Any] = {"device_id": self.device_id}
        if name == "cuda":
            found |= {"enable_cuda_graph": "1"} if record else {}
            found |= {"gpu_mem_limit": self.memory_mib * _MIB} if self.memory_mib else {}
            found |= {} if self.arena else {"arena_extend_strategy": "kSameAsRequested"}
        return found


def _remedy(name: str, there: Sequence[str]) -> str:
    found = f"it has {', '.join(there)}"
    if name in ON_GPU:
        return f"{found}. Install onnxruntime-gpu in place of onnxruntime: pip install 'mtserve[gpu]'"
    return f"{found}. Install the build of ONNX Runtime that has it, such as onnxruntime-{name}"
