"""A bundle on disk: whole or not there, everything in it once, opened without PyTorch, refused when it is not right."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks import onnx_latency
from mtserve import inspection
from mtserve.backends import bound
from mtserve.backends.bound import Bound
from mtserve.backends.runtime import Runtime
from mtserve.backends.sessions import Graphs
from mtserve.batching import Batch
from mtserve.checkpoint import Checkpoint
from mtserve.cli import app
from mtserve.errors import CheckpointError, ConfigError, ExportError, MtserveError
from mtserve.export import quantizing
from mtserve.export.bundling import export
from mtserve.interop.split import split_head
from mtserve.loading import in_force, load, load_checkpoint
from mtserve.manifest import MANIFEST
from mtserve.rows import Past
from mtserve.safetensors_file import read_header
from mtserve.surgery import remove_heads
from mtserve.tuning import tune
from tests.export.bundles import Pair, backend, pair
from tests.test_contract import assert_close
from tests.test_pasts import Program, answers, assert_plain, row, words
from tests.tiny import tiny, write_checkpoint

ENCODER = ("topic", "names", "cosine")
DECODER = ("forth", "back", "topic")


@pytest.fixture
def encoder() -> Pair:
    return pair("bert", only=ENCODER)


@pytest.fixture
def decoder() -> Pair:
    return pair("gpt2", only=DECODER)


def test_what_is_in_it(encoder: Pair) -> None:
    folder, manifest = encoder.bundle.folder, encoder.bundle.manifest
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*manifest.files, "mtserve.json", "README.md"}
    assert {"trunk.onnx", "weights.safetensors", "tokenizer.json", *(f"heads/{task}.onnx" for task in ENCODER)} < found
    exported = manifest.exported
    assert exported is not None
    assert (manifest.artefact, exported.trunk.exporter, exported.trunk.cache) == ("bundle", "dynamo", None)
    assert {task: head.takes for task, head in exported.heads.items()} == {
        **{"topic": "pooled", "names": "positions", "cosine": "rows"}
    }
    graph = onnx.load(folder / "trunk.onnx", load_external_data=False).graph
    shapes = {one.name: [d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim] for one in graph.input}
    assert shapes == {name: ["rows", "seq"] for name in ("input_ids", "attention_mask", "token_type_ids")}
    assert "| names | 12 |" in (folder / "README.md").read_text(encoding="utf-8")
    encoder.bundle.verify()


def test_the_embeddings_are_in_it_once(decoder: Pair) -> None:
    """Both output matrices are the embeddings, read the other way round: one tensor of the file."""
    trunk = decoder.small.model.trunk
    folder = decoder.bundle.folder
    shape = tuple(trunk.get_input_embeddings().weight.shape)
    stored = read_header(folder / "weights.safetensors")
    assert sum(info.shape in (shape, shape[::-1]) for info in stored.values()) == 1
    for task in ("forth", "back"):
        head = onnx.load(folder / f"heads/{task}.onnx", load_external_data=False)
        assert [one.external_data[0].value for one in head.graph.initializer if one.external_data] == [
            "weights.safetensors"
        ]
        assert str(Path.cwd()).encode() not in head.SerializeToString()  # exporters tell where they were
    trunk_bytes = sum(4 * p.numel() for p in trunk.parameters())
    assert (folder / "weights.safetensors").stat().st_size < 1.05 * trunk_bytes


def test_answers_in_steps_and_streams(decoder: Pair) -> None:
    engine, small = decoder.engine(), decoder.small.engine
    for parameters in (
        {},
        {"do_sample": True, "seed": 3, "temperature": 2.0},
        {"num_beams": 3, "num_return_sequences": 2},
    ):
        for task in ("forth", "back"):
            found = engine.predict(task, ["good", "a man is feeding his dog", "one"], parameters)
            assert_close(found, small.predict(task, ["good", "a man is feeding his dog", "one"], parameters), 1e-4)
    work = engine.prepare("forth", engine.task("forth").kind.parse("good"), stream=True)
    events = []
    while work.rows:
        engine.step([work])
        events += engine.emit(work)
    assert events[-1]["generated_text"] == engine.predict("forth", ["good"])[0][0]["generated_text"]


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_going_on_equals_whole_rows(family: str) -> None:
    """The programs of tests/test_pasts.py, over a bundle: rows that join, go on, fork, are cut and leave."""
    both = pair(family, only=DECODER)

    @settings(max_examples=20)
    @given(seed=st.integers(0, 10**6), steps=st.lists(st.sampled_from(["join", "go", "go", "fork", "cut", "leave"])))
    def check(seed: int, steps: list[str]) -> None:
        of: Any = backend(both.engine())
        plain: Any = backend(both.engine())
        program = Program(of, plain, np.random.default_rng(seed), task="forth")
        for step in ["join", "join", *steps, "go"]:
            getattr(program, step)()

    check()


def test_a_pass_that_fails_costs_time_and_no_answer(decoder: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    of: Any = backend(decoder.engine())
    rows = [row(words(9, at), past=Past()) for at in range(3)]
    answers(of, rows, "forth")
    rows = [one.extended([7], past=one.past) for one in rows]
    with monkeypatch.context() as patch:
        patch.setattr(of.graphs, "logits", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answers(of, rows, "forth")
    assert [one.past.length for one in rows if one.past] == [9, 9, 9]
    assert_plain(answers(of, rows, "forth"), of, rows, "forth")
    rows.clear()
    of.release()
    assert of.kept.slots.shape == (0, 0)


def test_it_opens_without_torch_and_transformers(encoder: Pair, decoder: Pair) -> None:
    """And computes, decodes and serves."""
    code = f"""
import sys
for name in ("torch", "transformers", "onnx", "optimum", "sklearn", "scipy"):
    sys.modules[name] = None
from mtserve.loading import load
from mtserve.settings import Settings
from mtserve.serve.loading import load_table
print(load({str(encoder.bundle.folder)!r}).predict("topic", ["good"])[0][0]["label"])
print(load({str(decoder.bundle.folder)!r}).predict("forth", ["good"])[0][0]["generated_text"])
print(*load_table(Settings(model=({str(encoder.bundle.folder)!r},))).tasks)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    label, text, tasks = run.stdout.split("\n")[:3]
    assert label == encoder.small.engine.predict("topic", ["good"])[0][0]["label"]
    assert text == decoder.small.engine.predict("forth", ["good"])[0][0]["generated_text"]
    assert tasks.split() == [*encoder.engine().tasks]


def test_inspected_and_compared_with_its_checkpoint(encoder: Pair) -> None:
    runner = CliRunner()
    told = runner.invoke(
        app, ["inspect", str(encoder.bundle.folder), "--verify", "--against", str(encoder.checkpoint.folder)]
    )
    assert told.exit_code == 0, told.output
    assert "a bundle in fp32, opset 20" in told.output
    assert "profile onnx-fp32: golden rows reproduced" in told.output
    found = inspection.compare(encoder.bundle, encoder.checkpoint)
    assert found["same_trunk"]
    for task in ENCODER:
        of = found["tasks"][task]
        assert (of["rows"], of["flips"]) == (12, 0)
        assert 0 < of["largest_logit_difference"] < 1e-4
        assert of["metric"]["here"] == pytest.approx(of["metric"]["there"])
    force = in_force(encoder.engine(), encoder.bundle.manifest.trunk.fingerprint)
    assert (force.profile, force.hardware.key, force.padding_free) == ("onnx-fp32", "cpu", False)


def test_the_command_exports_some_tasks_and_refuses_what_flips(encoder: Pair, tmp_path: Path) -> None:
    runner = CliRunner()
    told = runner.invoke(app, ["export", str(encoder.checkpoint.folder), str(tmp_path / "b"), "--only", "names"])
    assert told.exit_code == 0, told.output
    assert [*load(tmp_path / "b").tasks] == ["names"]
    told = runner.invoke(
        app,
        [
            "export",
            str(encoder.checkpoint.folder),
            str(tmp_path / "c"),
            "--only",
            "cosine",
            "--dtype",
            "int8",
            "--json",
        ],
    )
    assert told.exit_code == 1, told.output
    report = json.loads(told.stdout[told.stdout.index("{") :])
    assert [one["variant"] for one in report["tried"]] == ["blocks-128", "blocks-64", "blocks-32"]
    assert all("pearson falls" in one["verdict"]["reason"] for one in report["tried"])  # its truth is what fp32 says
    assert report["bundle"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_without_any_rows_the_kinds_sample_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Private texts may leave a checkpoint without golden and calibration rows: it is compared all the same."""
    bare = write_checkpoint(tmp_path / "bare", tiny("bert", only=("topic",)), golden=False)
    rows = replace(
        bare,
        manifest=bare.manifest.model_copy(
            update={"tasks": (bare.task("topic").model_copy(update={"calibration": None}),)}
        ),
    )
    assert export(rows, tmp_path / "right").bundle is not None
    answer = Graphs.logits
    monkeypatch.setattr(Graphs, "logits", lambda *of: answer(*of) + 0.1)
    report = export(rows, tmp_path / "wrong")
    assert report.bundle is None
    assert "logits differ by" in report.tried[0].verdict.reason


def test_eight_bits_once_accepted(tmp_path: Path) -> None:
    """Close to fp32, and a row's answer is its own whatever is in its batch."""
    both = pair("bert", only=("topic", "names"), dtype="int8", max_flips=0.5)
    engine, small = both.engine(), both.small
    manifest = both.bundle.manifest
    assert manifest.exported is not None
    assert manifest.exported.variant == "blocks-128"
    assert engine.backend.profile == "onnx-int8"
    of = backend(engine)
    rows = [row(words(size, size)) for size in (4, 9, 30)]
    together = of.run(Batch(tuple(rows), {"topic": (0, 1, 2)}))["topic"]
    plain = small.engine.backend.run(Batch(tuple(rows), {"topic": (0, 1, 2)}))["topic"]
    for one, found, exact in zip(rows, together, plain, strict=True):
        np.testing.assert_allclose(found, of.run(Batch((one,), {"topic": (0,)}))["topic"][0], atol=1e-5)
        assert 0 < np.abs(found - exact).max() < 0.2


@pytest.mark.parametrize("size", [32, 48])
def test_large_embeddings_in_bytes(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Tables by row, looked up by any shape of ids, in blocks of 32 numbers or (48 is no multiple) a row at a time."""
    monkeypatch.setattr(quantizing, "_LARGE", 1024)
    random = np.random.default_rng(0)
    table = random.normal(size=(161, size)).astype(np.float32)
    ids = random.integers(161, size=(2, 3))
    nodes = [onnx.helper.make_node("Gather", ["table", name], [f"of_{name}"]) for name in ("flat", "deep")]
    shapes = {"flat": ["n"], "deep": ["r", "n"]}
    graph = onnx.helper.make_graph(
        nodes,
        "lookup",
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, shape) for name, shape in shapes.items()],
        [onnx.helper.make_tensor_value_info(f"of_{n}", onnx.TensorProto.FLOAT, [*s, size]) for n, s in shapes.items()],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    made = quantizing.made(model, "int8", "blocks-32")
    assert made.ByteSize() < 0.4 * model.ByteSize()
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    flat, deep = session.run(None, {"flat": ids[0], "deep": ids})
    most = np.abs(table).max() / 254 * 1.01
    np.testing.assert_allclose(flat, table[ids[0]], atol=most)
    np.testing.assert_allclose(deep, table[ids], atol=most)


def test_half_precision_keeps_its_inputs_and_outputs() -> None:
    for family, tasks in (("bert", ENCODER), ("gpt2", DECODER)):
        both = pair(family, only=tasks, dtype="fp16", max_flips=1.0)
        if both.report.bundle is None:  # a metric against the model's own answers falls by the least rounding
            assert all("falls" in one.verdict.reason for one in both.report.tried)
        assert all(one.verdict.difference < 0.05 for one in both.report.tried)
        assert (
            both.report.tried[0].bytes
            < 0.6 * (pair(family, only=tasks).bundle.folder / "weights.safetensors").stat().st_size
        )


# what is refused


def copy(of: Checkpoint, to: Path) -> Path:
    return shutil.copytree(of.folder, to / "copy")


def edit(folder: Path, change: Any) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    change(raw)
    (folder / MANIFEST).write_text(json.dumps(raw))


def truncated(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_bytes(folder: Path) -> None:
    path = folder / "trunk.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def other_opset(folder: Path) -> None:
    edit(folder, lambda raw: raw["exported"].update(opset=99))


def other_trunk(folder: Path) -> None:
    edit(folder, lambda raw: raw["trunk"].update(fingerprint="0" * 64))


def other_inputs(folder: Path) -> None:
    edit(folder, lambda raw: raw["exported"]["trunk"]["inputs"].pop())


def unknown_key(folder: Path) -> None:
    edit(folder, lambda raw: raw["exported"].update(colour="blue"))


def no_graphs(folder: Path) -> None:
    edit(folder, lambda raw: raw.update(exported=None))


def other_heads(folder: Path) -> None:
    edit(folder, lambda raw: raw["exported"]["heads"].pop("names"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (truncated, r"weights.safetensors has \d+ bytes; the manifest says \d+"),
        (other_bytes, r"trunk.onnx is not the file that was sealed"),
        (other_opset, r"opset 99 of ONNX; this version opens 17 to 23"),
        (other_trunk, r"the head of task 'topic' was trained on trunk"),
        (other_inputs, r"trunk.onnx takes input_ids, attention_mask, token_type_ids; the manifest says"),
        (unknown_key, r"exported.colour: Extra inputs are not permitted"),
        (no_graphs, r"a bundle has no graphs"),
        (other_heads, r"heads of topic, cosine for tasks topic, cosine, names|heads of .* for tasks"),
    ],
)
def test_a_bad_bundle_gets_one_sentence(encoder: Pair, tmp_path: Path, spoil: Any, said: str) -> None:
    folder = copy(encoder.bundle, tmp_path)
    spoil(folder)
    told = CliRunner().invoke(app, ["predict", str(folder), "good", "--task", "topic"])
    assert isinstance(told.exception, MtserveError)
    assert re.search(said, str(told.exception)), told.exception
    assert "\n" not in str(told.exception)


def test_golden_rows_are_checked_when_it_is_opened(encoder: Pair, tmp_path: Path) -> None:
    folder = copy(encoder.bundle, tmp_path)
    edit(folder, lambda raw: raw["profiles"]["onnx-fp32"].update(tolerance=1e-12))
    with pytest.raises(CheckpointError, match=r"task '\w+': the logits of the golden rows differ by .* allows 1e-12"):
        load(folder)


def test_the_command_line_exits_with_2_and_the_sentence(encoder: Pair, tmp_path: Path) -> None:
    folder = copy(encoder.bundle, tmp_path)
    truncated(folder)
    run = subprocess.run(
        [sys.executable, "-m", "mtserve", "predict", str(folder), "good", "--task", "topic"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2], env={**os.environ},
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.strip().count("\n") == 0
    assert run.stderr.startswith("mtserve: ")


def test_a_bundle_is_no_checkpoint(encoder: Pair, tmp_path: Path) -> None:
    for call in (
        lambda: export(encoder.bundle, tmp_path / "again"),
        lambda: remove_heads(encoder.bundle, ["topic"]),
        lambda: tune(encoder.bundle),
        lambda: split_head(encoder.bundle, "topic", tmp_path / "split"),
    ):
        with pytest.raises(CheckpointError, match=r"is a bundle of ONNX graphs, and .* needs the checkpoint"):
            call()
    with pytest.raises(ConfigError, match="is a bundle that computes in onnx-fp32; found profile bf16"):
        load_checkpoint(encoder.bundle, profile="bf16")


def test_a_folder_that_holds_something_is_left_alone(encoder: Pair, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ExportError, match="is not empty"):
        export(encoder.checkpoint, tmp_path)
    with pytest.raises(ExportError, match=r"has no task 'tpoic'; its tasks: topic, cosine, names|has no task 'tpoic'"):
        export(encoder.checkpoint, tmp_path / "b", only=["tpoic"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("given", "available", "chosen"),
    [
        ({}, CUDA[1:], ("cpu",)),
        ({}, CUDA, ("cuda", "cpu")),
        ({"device": "cpu"}, CUDA, ("cpu",)),
        ({"providers": ("tensorrt", "cuda")}, ["TensorrtExecutionProvider", *CUDA], ("tensorrt", "cuda", "cpu")),
        ({"providers": ("cpu",), "device": "cuda"}, CUDA, ("cpu",)),
    ],
)
def test_providers_by_preference(given: dict[str, Any], available: list[str], chosen: tuple[str, ...]) -> None:
    assert Runtime(**given).chosen(available, "1.32.0") == chosen


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"device": "cuda"}, r"ONNX Runtime 1.32.0 has no cuda provider; it has cpu. Install onnxruntime-gpu in place"),
        (
            {"providers": ("openvino",)},
            r"no openvino provider; it has cpu. Install the build of ONNX Runtime that has it",
        ),
        ({"providers": ("cdua",)}, r"ONNX provider 'cdua' is unknown; allowed: tensorrt, cuda, openvino, cpu"),
        ({"device": "tpu"}, r"device must be auto, cpu or cuda; found 'tpu'"),
    ],
)
def test_a_provider_that_is_not_there(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Runtime(**given).chosen(CUDA[1:], "1.32.0")


def test_what_a_gpu_is_told() -> None:
    told = Runtime(device_id=1, memory_mib=512, arena=False).options("cuda", record=True)
    assert told == {
        **{"device_id": 1, "enable_cuda_graph": "1", "gpu_mem_limit": 512 * 2**20},
        **{"arena_extend_strategy": "kSameAsRequested"},
    }
    assert Runtime(memory_mib=512).options("cpu") == {}


@pytest.mark.parametrize("record", [False, True])
def test_bound_graphs_give_what_plain_ones_give(encoder: Pair, monkeypatch: pytest.MonkeyPatch, record: bool) -> None:
    """With the CPU as the device: places are used again for shapes that come again, and only so many are kept."""
    monkeypatch.setattr(bound, "_MOST", 2)
    of = backend(encoder.engine())
    graphs = of.graphs
    batches = [
        Batch((row(words(n, n + at)), row(words(3, at))), {"topic": (0, 1), "names": (1,)})
        for n in (4, 9, 30)
        for at in (0, 1)
    ]
    plain = [of.run(batch) for batch in batches]
    monkeypatch.setattr(graphs, "_bound_trunk", Bound(graphs.trunk, "cpu", 0, record=record))
    monkeypatch.setattr(graphs, "_bound_heads", {task: Bound(one, "cpu", 0) for task, one in graphs.heads.items()})
    for batch, wanted in zip(batches, plain, strict=True):
        for _ in range(2):
            found = of.run(batch)
            for task in batch.wanted:
                for one, other in zip(found[task], wanted[task], strict=True):
                    np.testing.assert_array_equal(one, other)
    assert len(graphs._bound_trunk._recorded) == (2 if record else 0)


def test_a_provider_that_cannot_start_is_never_left_out_silently(
    encoder: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where onnxruntime-gpu finds no CUDA: the session comes up on the CPU, and says so only in a log."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: CUDA)
    opened = ort.InferenceSession

    class OnTheCpu(opened):  # type: ignore[misc, valid-type]
        def __init__(self, model: bytes, options: Any, providers: Any) -> None:
            super().__init__(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", OnTheCpu)
    with pytest.raises(
        ConfigError, match=r"cannot start it: libraries that it needs are missing. Install CUDA and cuDNN"
    ):
        load_checkpoint(encoder.bundle)
    assert load_checkpoint(encoder.bundle, device="cpu").backend.hardware.device == "cpu"


def test_the_benchmark_runs(encoder: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(encoder.checkpoint.folder), str(encoder.bundle.folder)]
    monkeypatch.setattr(onnx_latency, "PROFILES", ("fp32",))
    onnx_latency.main([*folders, "--rounds", "1", "--threads", "1"])
    found = json.loads(capsys.readouterr().out)["ms"]
    assert [*found] == ["1 x 16", "1 x 32", "8 x 32", "32 x 32"]  # rows of its trunk have 96 tokens at most
    assert {*found["1 x 16"]} == {"PyTorch fp32", "ONNX fp32"}
