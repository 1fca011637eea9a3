"""A trunk's graph in fewer bits. Knows no files.

fp16   what computes in half precision, with inputs and outputs as they were; for GPUs
int8   matrices of linears in 8-bit integers, one scale for so many neighbouring inputs of an output, multiplied with
       activations that ONNX Runtime rounds to 8 bits in the same blocks, row by row (`MatMulNBits`); embeddings with
       one scale for 32 numbers. ONNX Runtime's dynamic quantisation has one scale for a whole batch; what a row gives
       does not depend on what else is in its batch
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16

from mtserve.bundle import Dtype

VARIANTS: Mapping[Dtype, tuple[str, ...]] = {
    "fp32": ("",),
    "fp16": ("",),
    "int8": ("blocks-128", "blocks-64", "blocks-32"),
}
"""Ways to make each, the fastest first; a bundle is the first that is accepted."""
_LARGE = 2**20
_BLOCK = 32
_EIGHT_BITS = 4  # what MatMulNBits calls activations of 8 bits


def made(model: onnx.ModelProto, dtype: Dtype, variant: str) -> onnx.ModelProto:
    """A copy of a trunk's graph in that precision."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if dtype == "fp16":
        return _halved(copy)
    if dtype == "int8":
        _as_products(copy)
        _embeddings_in_bytes(copy)
        return _in_blocks(copy, int(variant.removeprefix("blocks-")))
    return copy


def head_made(model: onnx.ModelProto, dtype: Dtype) -> onnx.ModelProto:
    """A copy of a head's graph: one over a vocabulary as the trunk's, another as it is."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if dtype == "fp32" or max((len(one.raw_data) for one in model.graph.initializer), default=0) < _LARGE:
        return copy
    return _halved(copy) if dtype == "fp16" else _in_blocks(copy, 32)


def _halved(model: onnx.ModelProto) -> onnx.ModelProto:
    found: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)
    return found


def _in_blocks(model: onnx.ModelProto, size: int) -> onnx.ModelProto:
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        config = DefaultWeightOnlyQuantConfig(block_size=size, is_symmetric=True, accuracy_level=_EIGHT_BITS, bits=8)
        quantizer = MatMulNBitsQuantizer(model, algo_config=config)
        quantizer.process()
    finally:
        logging.disable(before)
    found: onnx.ModelProto = quantizer.model.model
    return found


def _as_products(model: onnx.ModelProto) -> None:
    """Every Gemm with a constant matrix as a MatMul and an Add, which is all that the quantiser knows."""
    graph, tensors = model.graph, {one.name: one for one in model.graph.initializer}
    for node in list(graph.node):
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA", 0)
        if node.op_type != "Gemm" or node.input[1] not in tensors or not plain:
            continue
        matrix = node.input[1]
        if attributes.get("transB", 0):
            matrix = f"{node.output[0]}_matrix"
            array = numpy_helper.to_array(tensors[node.input[1]])
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array.T), matrix))
        product = f"{node.output[0]}_product" if len(node.input) > 2 else node.output[0]
        made = [helper.make_node("MatMul", [node.input[0], matrix], [product])]
        if len(node.input) > 2:
            made.append(helper.make_node("Add", [product, node.input[2]], [node.output[0]]))
        _replace(graph, node, made)
    _drop_unused(graph)


def _embeddings_in_bytes(model: onnx.ModelProto) -> None:
    """Large tables that are looked up by row: bytes, and a scale for each block of a row."""
    graph, tensors = model.graph, {one.name: one for one in model.graph.initializer}
    for node in list(graph.node):
        if node.op_type != "Gather" or node.input[0] not in tensors:
            continue
        table = tensors[node.input[0]]
        if table.data_type != TensorProto.FLOAT or len(table.dims) != 2 or len(table.raw_data) < _LARGE:
            continue
        array = numpy_helper.to_array(table)
        size = array.shape[1] if array.shape[1] % _BLOCK else _BLOCK
        blocks = array.reshape(len(array), -1, size)
        scales = np.maximum(np.abs(blocks).max(2, keepdims=True) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        name, out = table.name, node.output[0]
        if f"{name}_bytes" not in {one.name for one in graph.initializer}:
            graph.initializer.append(numpy_helper.from_array(np.rint(blocks / scales).astype(np.int8), f"{name}_bytes"))
            graph.initializer.append(numpy_helper.from_array(scales, f"{name}_scales"))
        graph.initializer.append(numpy_helper.from_array(np.array([array.shape[1]], np.int64), f"{out}_width"))
        made = [
            helper.make_node("Gather", [f"{name}_bytes", node.input[1]], [f"{out}_bytes"], axis=0),
            helper.make_node("Gather", [f"{name}_scales", node.input[1]], [f"{out}_scales"], axis=0),
            helper.make_node("Cast", [f"{out}_bytes"], [f"{out}_cast"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{out}_cast", f"{out}_scales"], [f"{out}_blocks"]),
            helper.make_node("Shape", [node.input[1]], [f"{out}_of"]),
            helper.make_node("Concat", [f"{out}_of", f"{out}_width"], [f"{out}_shape"], axis=0),
            helper.make_node("Reshape", [f"{out}_blocks", f"{out}_shape"], [out]),
        ]
        _replace(graph, node, made)
    _drop_unused(graph)


def _replace(graph: onnx.GraphProto, node: onnx.NodeProto, made: list[onnx.NodeProto]) -> None:
    at = list(graph.node).index(node)
    del graph.node[at]
    for offset, one in enumerate(made):
        graph.node.insert(at + offset, one)


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {one.name for one in graph.output}
    for tensor in list(graph.initializer):
        if tensor.name not in used:
            graph.initializer.remove(tensor)
