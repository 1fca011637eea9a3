"""A graph whose inputs and outputs are bound to places on a device. Knows no rows and no tasks.

Outputs stay on the device but those that are wanted on the host, so that what another graph reads next is not sent to
and fro. A recorded graph (`record`; CUDA graphs) replays its kernels at the addresses that it was recorded with: for
each set of input shapes there is one place for every input and output, made when the shapes first come, and an output
is overwritten when they come again. After `_MOST` sets others run without being recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime as ort

from mtserve.profiles import Device

_MOST = 64
_NOT_RECORDED = "-1"  # what ONNX Runtime calls a run that is neither recorded nor replayed


class Bound:
    """`run` gives outputs by name: values on the device, and arrays of those that are `kept` on the host."""

    def __init__(self, session: ort.InferenceSession, device: Device, device_id: int, *, record: bool = False) -> None:
        self.session, self.place, self.record = session, (device, device_id), record
        self._recorded: dict[tuple[tuple[str, tuple[int, ...]], ...], _Recorded] = {}

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Any], *, kept: Sequence[str] = ()) -> dict[str, Any]:
        if not self.record:
            return self._plain(outputs, feeds, kept)
        shapes = tuple((name, tuple(array.shape)) for name, array in feeds.items())
        if shapes not in self._recorded:
            if len(self._recorded) >= _MOST:
                return self._plain(outputs, feeds, kept)
            made = self._plain(outputs, feeds, ())
            self._recorded[shapes] = _Recorded(self, feeds, made, len(self._recorded) + 1)
        found = self._recorded[shapes].run(feeds)
        return {name: value.numpy() if name in kept else value for name, value in found.items()}

    def _plain(self, outputs: Sequence[str], feeds: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
        binding = self.session.io_binding()
        for name, value in feeds.items():
            if isinstance(value, ort.OrtValue):
                binding.bind_ortvalue_input(name, value)
            else:
                binding.bind_cpu_input(name, value)
        for name in outputs:
            binding.bind_output(name, *(("cpu", 0) if name in kept else self.place))
        self.session.run_with_iobinding(binding, numbered(_NOT_RECORDED) if self.record else None)
        found = zip(outputs, binding.get_outputs(), strict=True)
        return {name: value.numpy() if name in kept else value for name, value in found}


class _Recorded:
    """The places of one set of shapes, and the number of its recording."""

    def __init__(self, of: Bound, feeds: Mapping[str, Any], outputs: Mapping[str, Any], number: int) -> None:
        self.session, self.options, self.outputs = of.session, numbered(str(number)), outputs
        self.inputs = {name: ort.OrtValue.ortvalue_from_numpy(array, *of.place) for name, array in feeds.items()}
        self.binding = of.session.io_binding()
        for name, value in self.inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self.binding.bind_ortvalue_output(name, value)

    def run(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        for name, array in feeds.items():
            self.inputs[name].update_inplace(array)
        self.session.run_with_iobinding(self.binding, self.options)
        return self.outputs


def numbered(number: str) -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", number)
    return options
