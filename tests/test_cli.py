"""The command line as a user has it: streams, exit codes, help."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from mtserve import cli
from tests.tiny import tiny, write_checkpoint

COMMANDS = ["train", "serve", "predict", "inspect", "tune", "demo", "import notebook", "import models"]
COMMANDS += ["heads split", "heads add", "heads remove", "heads rename", "chains add", "chains remove"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "bert"
    write_checkpoint(folder, tiny("bert"))
    return folder


def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The command in this process, which has its imports done."""
    argv = ["mtserve", *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch("sys.argv", argv),
        patch("sys.stdin", io.StringIO(stdin)),
        patch("os.execve", side_effect=AssertionError("a server would take the place of this process")),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def process(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The command as a user has it."""
    argv = [sys.executable, "-m", "mtserve", *map(str, arguments)]
    return subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def test_every_command_has_help_with_an_example_first() -> None:
    listed = process("--help").stdout
    for command in COMMANDS:
        assert command.split()[0] in listed
        shown = run(*command.split(), "--help")
        assert shown.returncode == 0
        assert shown.stdout.split("\n\n")[1].strip().startswith(f"mtserve {command}")


def test_predict_prints_one_json_line_an_input(model: Path) -> None:
    done = process("predict", model, "good", "bad", "--task", "topic", "--task", "names", "--task", "tags")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2
    assert list(lines[0]) == ["topic", "names", "tags"]
    assert {label["label"] for label in lines[0]["topic"]} == {"good", "bad", "fine"}
    assert done.stderr == ""


def test_predict_takes_objects_parameters_and_lines(model: Path) -> None:
    pair = json.dumps({"text": "one", "text_pair": "two"})
    done = run("predict", model, "-", "--task", "topic", "--parameters", '{"top_k": 1}', stdin=f"good\n{pair}\n\n")
    assert done.returncode == 0, done.stderr
    assert [len(json.loads(line)["topic"]) for line in done.stdout.splitlines()] == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--task", "nope"], "unknown task 'nope'; this model has choice, cosine, names, score, tags, topic"),
        (["x", "--task", "score"], "input 0: an input of similarity is an object with text, text_pair; found a string"),
        (["x", "--task", "topic", "--parameters", '{"beam": 1}'], "parameters.beam: not allowed here"),
        (["x", "--task", "topic", "--parameters", "3"], "'3' is not a JSON object"),
        (["{x", "--task", "topic"], "is not JSON"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(model: Path, arguments: list[str], message: str) -> None:
    done = run("predict", model, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    for command in (["predict", tmp_path / "no", "x"], ["inspect", tmp_path / "no"], ["serve", tmp_path / "no"]):
        done = run(*command)
        assert done.returncode == 2
        assert "does not exist; a model is a folder or a hub id" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_predict_asks_for_a_task_where_there_are_several(model: Path) -> None:
    done = run("predict", model, "x")
    assert done.returncode == 2
    assert "choose --task from" in done.stderr


def test_inspect(model: Path) -> None:
    shown = run("inspect", model)
    assert shown.returncode == 0, shown.stderr
    for expected in ("bert", "topic", "multiple_choice", "fingerprint"):
        assert expected in shown.stdout
    facts = json.loads(run("inspect", model, "--json", "--verify", "--against", model).stdout)
    assert [task["name"] for task in facts["tasks"]] == ["topic", "tags", "score", "cosine", "choice", "names"]
    assert facts["golden"]["topic"] == {"rows": 1, "difference": 0.0, "ok": True}
    assert facts["against"]["same_trunk"] is True
    assert facts["against"]["tasks"]["names"]["flips"] == 0


def test_inspect_verify_finds_a_changed_byte(model: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    weights = next((copy / "trunk").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert run("inspect", copy).returncode == 0
    done = run("inspect", copy, "--verify")
    assert done.returncode == 2
    assert "has sha256" in done.stderr


def test_train_passes_on_what_the_child_says(tmp_path: Path) -> None:
    done = process("train", tmp_path / "no.yaml")
    assert done.returncode == 2
    assert "no.yaml" in done.stderr


def test_a_task_goes_out_as_a_stock_model_and_comes_back(model: Path, tmp_path: Path) -> None:
    for task in ("topic", "score"):
        done = run("heads", "split", model, tmp_path / task, "--task", task)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(tmp_path / task)
        assert "special tokens that stand in a caller's text are read as such" in done.stderr
    (tmp_path / "golden.jsonl").write_text('{"task": "topic", "text": "the town"}\n')
    tasks = ["--task", f"topic={tmp_path / 'topic'}", "--task", f"score={tmp_path / 'score'}"]
    options = ["--options", 'score={"high": 5, "max_length": 48}', "--options", 'topic={"max_length": 48}']
    done = run("import", "models", tmp_path / "x", *tasks, *options, "--golden", tmp_path / "golden.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{tmp_path / 'x'}: topic, score"
    answers = [run("predict", folder, "the town", "--task", "topic").stdout for folder in (model, tmp_path / "x")]
    ours, theirs = (json.loads(answer)["topic"] for answer in answers)
    assert [one["label"] for one in ours] == [one["label"] for one in theirs]
    assert [one["score"] for one in ours] == pytest.approx([one["score"] for one in theirs], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "models", "x", "--task", "topic"], "--task topic: allowed is NAME=VALUE, each name once"),
        (["import", "models", "x", "--task", "a=b/", "--options", "a=3"], "'3' is not a JSON object"),
        (["import", "notebook", "n", "x", "--task", "a=generation", "--model", "no/where/at-all"], "does not exist"),
        (["heads", "split", "no/where/at-all", "x", "--task", "a"], "does not exist"),
    ],
)
def test_mistakes_of_import_and_split_are_one_sentence(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_import_notebook(tmp_path: Path) -> None:
    from tests.interop import notebook_model as nb

    base = nb.gpt2_folder(tmp_path / "base")
    written = nb.write(tmp_path / "notebook", nb.state(nb.shakespeare(base)[0]), form="bin")
    tasks = ["--task", "translate=generation", "--task", "classify=classification"]
    labels = ["--labels", "classify=modern,original,translate", "--options", 'translate={"max_new_tokens": 4}']
    argv = ["import", "notebook", written, tmp_path / "x", "--model", base, *tasks, *labels]
    refused = run(*argv)
    assert refused.returncode == 2
    assert "--allow-pickle" in refused.stderr
    done = run(*argv, "--allow-pickle")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{tmp_path / 'x'}: translate, classify"
    assert done.stderr == ""
    assert len(json.loads(run("predict", tmp_path / "x", "ana", "--task", "classify").stdout)["classify"]) == 3
