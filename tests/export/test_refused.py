"""Bundles that are not right get one sentence, and a bundle is not taken for a checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mtserve.checkpoint import Checkpoint
from mtserve.cli import app
from mtserve.errors import CheckpointError, ConfigError, ExportError, MtserveError
from mtserve.export.bundling import export
from mtserve.interop.split import split_head
from mtserve.loading import load, load_checkpoint
from mtserve.manifest import MANIFEST
from mtserve.surgery import remove_heads
from mtserve.tuning import tune
from tests.export.bundles import Pair

pytestmark = pytest.mark.xdist_group("bundles")  # one process makes each bundle once


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
