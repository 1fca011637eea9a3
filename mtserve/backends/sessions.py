"""A bundle's graphs, opened in ONNX Runtime: on which device, with how many threads and how much memory. Knows no rows.

Large tensors stay where they are, in the bundle's file of weights: ONNX Runtime maps it into memory, and processes that
open the same bundle share its pages, but for matrices that it packs for its kernels.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from mtserve.backends.bound import Bound
from mtserve.backends.runtime import ON_GPU, PROVIDERS, Runtime
from mtserve.bundle import GRAPHS, OPSETS, Exported
from mtserve.errors import CheckpointError, ConfigError
from mtserve.profiles import Device

Feeds = Mapping[str, Any]


class Graphs:
    """The trunk and the heads of a bundle, ready to run.

    Raises ConfigError for a provider that cannot be had, CheckpointError for a graph that ONNX Runtime cannot open.
    """

    def __init__(self, folder: Path, exported: Exported, runtime: Runtime) -> None:
        self.runtime, self.exported = runtime, exported
        self.providers = runtime.chosen(ort.get_available_providers(), ort.__version__)
        if exported.opset not in OPSETS:
            found = f"opset {exported.opset} of ONNX; this version opens {OPSETS.start} to {OPSETS.stop - 1}"
            raise CheckpointError(f"the bundle {folder} is of {found}")
        if self.on_gpu and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        # keys and values have other shapes at each step, so there is nothing to record
        record = runtime.cuda_graph and self.providers[0] == "cuda" and runtime.io_binding and not exported.trunk.cache
        self.trunk = self._open(folder, GRAPHS, threads=runtime.threads, record=record)
        # a head's own threads would spin for a while after each pass, on cores that the trunk needs again: an output
        # matrix alone is worth them
        alone = {task for task, head in exported.heads.items() if not exported.trunk.cache or head.takes != "positions"}
        self.heads = {
            task: self._open(folder, head.path, threads=1 if task in alone else runtime.threads)
            for task, head in exported.heads.items()
        }
        bind = self.on_gpu and runtime.io_binding
        self._bound_trunk = Bound(self.trunk, "cuda", runtime.device_id, record=record) if bind else None
        self._bound_heads = {
            task: Bound(session, "cuda", runtime.device_id) for task, session in self.heads.items() if bind
        }
        _check_inputs(self.trunk, exported.trunk.inputs, folder / GRAPHS)
        for task, head in exported.heads.items():
            _check_inputs(self.heads[task], head.inputs, folder / head.path)

    @property
    def on_gpu(self) -> bool:
        return self.providers[0] in ON_GPU

    @property
    def bound(self) -> bool:
        """Whether outputs stay on a GPU until heads have used them."""
        return self._bound_trunk is not None

    @property
    def device(self) -> Device:
        return "cuda" if self.on_gpu else "cpu"

    def states(self, outputs: Sequence[str], feeds: Feeds, *, kept: Sequence[str] = ()) -> dict[str, Any]:
        """The trunk's outputs by name: arrays, or on a GPU with io-binding values there, but those `kept` by us. They
        hold until the next call."""
        if self._bound_trunk is not None:
            return self._bound_trunk.run(outputs, feeds, kept=kept)
        return dict(zip(outputs, self.trunk.run([*outputs], dict(feeds)), strict=True))

    def logits(self, task: str, feeds: Feeds) -> Any:
        """A head's output as an array; states go in as the trunk gave them."""
        if task in self._bound_heads:
            return self._bound_heads[task].run(["logits"], feeds, kept=["logits"])["logits"]
        return self.heads[task].run(["logits"], dict(feeds))[0]

    def _open(self, folder: Path, path: str, *, threads: int | None, record: bool = False) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = self.runtime.arena
        options.intra_op_num_threads = threads or 0  # 0: as many as ONNX Runtime likes
        # a graph in a folder of its own may name a file beside that folder only if it comes as bytes
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        asked = [(PROVIDERS[name], self.runtime.options(name, record=record)) for name in self.providers]
        try:
            session = ort.InferenceSession((folder / path).read_bytes(), options, providers=asked)
        except OSError as error:
            raise CheckpointError(f"{folder / path} cannot be read: {error}") from error
        except Exception as error:  # ONNX Runtime's errors have no class of their own
            reason = str(error).partition("\n")[0]
            by = f"ONNX Runtime {ort.__version__}"
            raise CheckpointError(f"{folder / path} cannot be opened by {by}: {reason}") from None
        if (first := PROVIDERS[self.providers[0]]) not in session.get_providers():
            raise ConfigError(
                f"ONNX Runtime {ort.__version__} has the provider {first}, and cannot start it: libraries that it "
                f"needs are missing. {_libraries(self.providers[0])}, or choose the CPU: MTSERVE_DEVICE=cpu"
            )
        return session


def _libraries(name: str) -> str:
    if name == "openvino":
        return "Install OpenVINO"
    try:
        version = importlib.metadata.version("onnxruntime-gpu")
    except importlib.metadata.PackageNotFoundError:
        version = ort.__version__
    also = " and TensorRT" if name == "tensorrt" else ""
    wanted = f"Install CUDA and cuDNN{also} as onnxruntime-gpu {version} wants them"
    return f"{wanted}: pip install 'onnxruntime-gpu[cuda,cudnn]'"


def _check_inputs(session: ort.InferenceSession, wanted: Sequence[str], path: Path) -> None:
    found = [one.name for one in session.get_inputs()]
    if found != [*wanted]:
        raise CheckpointError(f"{path} takes {', '.join(found)}; the manifest says {', '.join(wanted)}")
