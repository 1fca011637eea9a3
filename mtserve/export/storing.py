"""Large tensors of several graphs in one safetensors file, each once; the graphs name their place there. No torch.

ONNX's external data are bytes of a file, from an offset on; a tensor in a safetensors file is just that. So the file
can be checked and read as any other file of weights, and ONNX Runtime maps it into memory. Tensors are the same where
dtype, shape and bytes are; an output matrix that is the embeddings' transposed is they, read the other way round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from mtserve.bundle import WEIGHTS
from mtserve.safetensors_file import read_header

Array = npt.NDArray[Any]
_LARGE = 1024  # bytes; a trunk's smaller tensors stay in its graph
_LARGE_OF_HEAD = 2**20  # a head of less is a file that needs no other


class Stored:
    """Tensors to be written once. `taken` goes through a graph, `write` writes the file and lets the graphs name it."""

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}
        self._names: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._places: list[tuple[TensorProto, str]] = []

    def take_trunk(self, model: onnx.ModelProto) -> None:
        """Move a trunk's tensors here."""
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.nbytes >= _LARGE:
                self._take(tensor, array, tensor.name)

    def take_head(self, model: onnx.ModelProto, task: str) -> None:
        """Move a head's large tensors here, and those that are here already."""
        _untranspose(model, self._matrices())
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.nbytes >= _LARGE_OF_HEAD or (array.nbytes >= _LARGE and _mark(array) in self._names):
                self._take(tensor, array, f"{task}/{tensor.name}")

    def write(self, folder: Path) -> None:
        path = folder / WEIGHTS
        save_file(self.arrays, path, metadata={"format": "onnx"})
        path.chmod(0o644)  # safetensors writes for the owner alone; a server often runs as another user
        places = read_header(path)
        for tensor, name in self._places:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            del tensor.external_data[:]
            at = places[name]
            found: Mapping[str, Any] = {"location": WEIGHTS, "offset": at.start, "length": at.end - at.start}
            for key, value in found.items():
                tensor.external_data.add(key=key, value=str(value))

    def _take(self, tensor: TensorProto, array: Array, name: str) -> None:
        known = self._names.setdefault(_mark(array), name)
        self.arrays.setdefault(known, np.ascontiguousarray(array))
        self._places.append((tensor, known))

    def _matrices(self) -> dict[tuple[int, ...], list[Array]]:
        """Those that are here, by shape."""
        found: dict[tuple[int, ...], list[Array]] = {}
        for array in self.arrays.values():
            if array.ndim == 2:
                found.setdefault(array.shape, []).append(array)
        return found


def _mark(array: Array) -> tuple[str, tuple[int, ...], bytes]:
    return str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).digest()


def _untranspose(model: onnx.ModelProto, known: Mapping[tuple[int, ...], list[Array]]) -> None:
    """Where a graph multiplies by the transposed of a known matrix, let it multiply by that matrix the other way."""
    graph, tensors = model.graph, {one.name: one for one in model.graph.initializer}
    for at, node in enumerate(list(graph.node)):
        if node.op_type != "MatMul" or node.input[1] not in tensors:
            continue
        array = numpy_helper.to_array(tensors[node.input[1]])
        if not any(np.array_equal(one.T, array) for one in known.get(array.shape[::-1], ())):
            continue
        tensors[node.input[1]].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array.T), node.input[1]))
        wide, flat, out, back = (f"{node.output[0]}_{part}" for part in ("wide", "flat", "product", "shape"))
        graph.initializer.append(numpy_helper.from_array(np.array([-1, array.shape[0]], np.int64), wide))
        graph.initializer.append(numpy_helper.from_array(np.array([-1, 1, array.shape[1]], np.int64), back))
        made = [
            helper.make_node("Reshape", [node.input[0], wide], [flat]),
            helper.make_node("Gemm", [flat, node.input[1]], [out], transB=1),
            helper.make_node("Reshape", [out, back], [node.output[0]]),
        ]
        graph.node.remove(node)
        for offset, one in enumerate(made):
            graph.node.insert(at + offset, one)
