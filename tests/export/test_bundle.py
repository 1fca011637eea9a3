"""A bundle on disk: whole or not there, everything in it once, opened without PyTorch."""

from __future__ import annotations

import json
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
from mtserve.backends.sessions import Graphs
from mtserve.batching import Batch
from mtserve.chains import Spans
from mtserve.cli import app
from mtserve.errors import CheckpointError
from mtserve.export import quantizing
from mtserve.export.bundling import export
from mtserve.loading import in_force, load
from mtserve.rows import Past
from mtserve.safetensors_file import read_header
from mtserve.surgery import add_chain
from tests.export.bundles import DECODER, ENCODER, Pair, backend, pair
from tests.labelled import write_labelled
from tests.test_contract import assert_close
from tests.test_pasts import Program, answers, assert_plain, row, words
from tests.tiny import OPTIONS, tiny, write_checkpoint

pytestmark = pytest.mark.xdist_group("bundles")  # one process makes each bundle once


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


@pytest.mark.slow
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


def test_the_benchmark_runs(encoder: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(encoder.checkpoint.folder), str(encoder.bundle.folder)]
    monkeypatch.setattr(onnx_latency, "PROFILES", ("fp32",))
    onnx_latency.main([*folders, "--rounds", "1", "--threads", "1"])
    found = json.loads(capsys.readouterr().out)["ms"]
    assert [*found] == ["1 x 16", "1 x 32", "8 x 32", "32 x 32"]  # rows of its trunk have 96 tokens at most
    assert {*found["1 x 16"]} == {"PyTorch fp32", "ONNX fp32"}


def test_chains_go_with_their_tasks(tmp_path: Path) -> None:
    """A bundle answers a chain as the checkpoint does; one of whose tasks is left out stays behind."""
    names = ("token_classification", {"labels": ["a", "b", "c"], "max_length": 48})  # random weights find some
    small = tiny("bert", tasks={"names": names, "topic": OPTIONS["topic"], "tags": OPTIONS["tags"]})
    made = write_labelled(tmp_path / "chained", small)
    made = add_chain(made, Spans(name="about", first="names", then="topic"))
    made = add_chain(made, Spans(name="more", first="names", then="tags"))
    bundle = export(made, tmp_path / "bundle", only=["names", "topic"]).bundle
    assert bundle is not None
    assert (bundle.manifest.chains, bundle.manifest.format) == (made.manifest.chains[:1], 2)
    texts = ["ana silva moved from porto to oslo in may", "good"]
    wanted = load(made.folder, profile="fp32").predict("about", texts)
    assert any(wanted)
    assert_close(load(bundle.folder).predict("about", texts), wanted, 1e-4)
    with pytest.raises(CheckpointError, match="changing its chains needs the checkpoint that it was exported from"):
        add_chain(bundle, Spans(name="again", first="names", then="topic"))
