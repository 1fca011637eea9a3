"""The BentoML service: in process, and as a real server with the clients that people use."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from mtserve.checkpoint import Checkpoint
from mtserve.client import Client
from mtserve.errors import ConfigError, InputError, SetupError, UnknownTaskError
from mtserve.head_file import pack_head
from mtserve.serve.launch import SERVICE, command

ROOT = Path(__file__).parent.parent.parent
TEXT = "ana silva moved from porto to oslo"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(
    locations: Sequence[str], home: Path, **settings: str
) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    """(address, process, log) of a server in a process of its own, which must end with 0 when it is told to."""
    port = free_port()
    argv, env = command(locations, port=port)
    url = f"http://127.0.0.1:{port}"
    env |= {"BENTOML_HOME": str(home / "bentoml"), "PYTHONPATH": str(ROOT), **settings}
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(argv, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(url, process, home / "log")
            yield url, process, home / "log"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                assert process.wait(60) == 0
            finally:
                process.kill()


@pytest.fixture(scope="module")
def server(checkpoints: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server."""
    with started(checkpoints, tmp_path_factory.mktemp("server")) as (url, _, log):
        yield url
    said = log.read_text()
    assert "Traceback" not in said
    assert re.search(r"trunk [0-9a-f]{12} \(bert\): profile fp32 on cpu.*, no padding, \d+ threads", said), said


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 150
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(url + "/readyz").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"the server did not become ready:\n{log.read_text()}")


def test_huggingface_clients_parse_the_answers(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import InferenceClient, constants
    from huggingface_hub.errors import HfHubHTTPError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # offline, it refuses the loopback too

    def client(task: str) -> InferenceClient:
        return InferenceClient(model=f"{server}/tasks/{task}")

    labels = client("topic").text_classification(TEXT)
    assert {label.label for label in labels} == {"good", "bad", "fine"}
    assert len(client("topic").text_classification(TEXT, top_k=2)) == 2
    for strategy in (None, "simple", "first", "average", "max"):
        spans = client("names").token_classification(TEXT, aggregation_strategy=strategy)
        assert spans
        for span in spans:
            assert TEXT[span.start : span.end] == span.word
    scores = client("cosine").sentence_similarity(TEXT, other_sentences=["good", TEXT])
    assert scores[1] == pytest.approx(1, abs=1e-5)
    assert client("forth").translation(TEXT).translation_text is not None
    with pytest.raises(HfHubHTTPError, match="unknown task 'nothing'"):
        client("nothing").text_classification(TEXT)


def test_examples_of_every_task_run_as_they_stand(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    paths = httpx.get(server + "/openapi.json").json()["paths"]
    tasks = httpx.get(server + "/tasks").json()["tasks"]
    for task in tasks:
        page = paths[task["url"]]["post"]["description"]
        (shell,), (code,) = (re.findall(rf"```{name}\n(.*?)\n```", page, re.DOTALL) for name in ("bash", "python"))
        exec(compile(code, task["name"], "exec"), {})
        printed = ast.literal_eval(capsys.readouterr().out)
        assert printed == httpx.post(server + task["url"], json=task["example"]).json()
        every = shell.split("\ncurl")
        assert len(every) == (2 if task["kind"] == "generation" else 1)
        for line in every:
            words = [word for word in shlex.split("curl" + line.removeprefix("curl")) if word != "\n"]
            said = subprocess.run([*words, "-s", "-S", "--max-time", "60"], capture_output=True, text=True, check=True)
            found = said.stdout if "-N" not in words else said.stdout.split("data: ")[-1]
            assert json.loads(found), line


def test_our_own_client(server: str) -> None:
    with Client(server) as client:
        assert client.is_ready()
        tasks = client.tasks()
        assert (tasks["topic"]["kind"], tasks["forth"]["kind"]) == ("classification", "generation")
        for name, task in tasks.items():
            assert client.predict(name, task["example"]["inputs"]), name
        assert len(client.predict("topic", [TEXT, "good"], {"top_k": 2})[1]) == 2
        assert {name: len(of) for name, of in client.predict_tasks([TEXT], ["topic", "names"]).items()} == {
            "topic": 1,
            "names": 1,
        }
        events = list(client.stream("forth", TEXT))
        assert events[-1]["generated_text"] == client.predict("forth", TEXT)[0]["generated_text"]
        with pytest.raises(UnknownTaskError, match="unknown task 'nothing'"):
            client.predict("nothing", TEXT)
        with pytest.raises(InputError, match="input 1"):
            client.predict("topic", [TEXT, 3])


def test_tritons_client_speaks_the_open_inference_protocol(server: str) -> None:
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
    from tritonclient.utils import InferenceServerException

    client = InferenceServerClient(server.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("topic", "1")
    assert client.get_server_metadata()["name"] == "mtserve"
    names = [tensor["name"] for tensor in client.get_model_metadata("topic")["outputs"]]
    assert names == ["label", "score", "prediction"]
    wanted = [one[0] for one in httpx.post(server + "/tasks/topic", json={"inputs": [TEXT, "good é"]}).json()]
    for binary in (True, False):
        texts = InferInput("text", [2], "BYTES")
        texts.set_data_from_numpy(np.array([TEXT, "good é"], object), binary_data=binary)
        outputs = [InferRequestedOutput(name, binary_data=binary) for name in names]
        for asked in (None, outputs):
            found = client.infer("topic", [texts], request_id="7", outputs=asked, parameters={"top_k": 1})
            assert found.get_response()["id"] == "7"
            labels = [one.decode() if isinstance(one, bytes) else one for one in found.as_numpy("label")]
            assert labels == [one["label"] for one in wanted]
            assert found.as_numpy("score") == pytest.approx([one["score"] for one in wanted], abs=1e-6)
            assert [len(json.loads(cell)) for cell in found.as_numpy("prediction")] == [1, 1]
    with pytest.raises(InferenceServerException, match="unknown task 'nothing'"):
        client.infer("nothing", [texts])
    client.close()


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # BentoML's imports
@pytest.mark.filterwarnings("ignore:The `__get_pydantic_core_schema__` method:DeprecationWarning")
def test_bentoml_clients_call_the_native_apis(server: str) -> None:
    import bentoml
    from bentoml.exceptions import BentoMLException

    with bentoml.SyncHTTPClient(server) as client:
        assert "topic" in [task["name"] for task in client.call("tasks")["tasks"]]
        answer = client.call("predict", inputs=[TEXT], tasks=["topic", "names"])
        routed = httpx.post(server + "/predict", json={"inputs": [TEXT], "tasks": ["topic", "names"]}).json()
        assert answer["outputs"] == routed["outputs"]
        assert answer["usage"]["trunk_passes"] == 1
        with pytest.raises(BentoMLException, match="invalid_input"):
            client.call("predict", inputs=[3], tasks=["topic"])
    client._temp_dir.cleanup()  # it leaves that to the garbage collector, with a warning


def test_the_server_has_our_pages_and_errors(server: str) -> None:
    assert httpx.get(server + "/").headers["location"] == "docs"
    assert len(httpx.get(server + "/docs/assets/swagger-ui-bundle.js").content) > 500_000
    assert "/tasks/topic" in httpx.get(server + "/openapi.json").json()["paths"]
    assert httpx.get(server + "/livez").status_code == 200
    metrics = httpx.get(server + "/metrics").text
    for family in ("bert", "gpt2"):
        pattern = rf'mtserve_trunk_padding_free{{family="{family}",profile="fp32",trunk="[0-9a-f]{{12}}"}} 1.0'
        assert re.search(pattern, metrics), metrics
    assert httpx.get(server + "/nothing").json()["error"]["code"] == "not_found"
    assert httpx.get(server + "/static_content/index.css").status_code == 404


def test_a_server_with_keys_counts_logs_and_ends_without_loss(checkpoints: tuple[str, str], tmp_path: Path) -> None:
    """All of its routes, BentoML's too; then SIGTERM while a request waits for a fuller batch."""
    key = "a-key-of-the-tests"
    given = {"MTSERVE_API_KEYS": key, "MTSERVE_MAX_WAIT_MS": "3000", "MTSERVE_CAPTURE": "false"}
    with started(checkpoints[:1], tmp_path, **given) as (url, process, log):
        routes = [("GET", path) for path in ("/", "/docs", "/docs.json", "/schema.json", "/metrics", "/tasks", "/x")]
        routes += [("GET", "/static_content/index.css"), ("POST", "/native/predict"), ("POST", "/native/tasks")]
        for method, path in routes:
            assert httpx.request(method, url + path).status_code == 401, path
        assert [httpx.get(url + path).status_code for path in ("/livez", "/readyz", "/healthz")] == [200, 200, 200]
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30) as client:
            assert client.post("/native/tasks", json={}).json()["tasks"]
            asked = {"inputs": TEXT, "tasks": ["topic", "names"]}
            with ThreadPoolExecutor() as pool:
                answer = pool.submit(client.post, "/predict", json=asked)
                time.sleep(1)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.5)
                refused = httpx.post(url + "/predict", json=asked, headers={"X-API-Key": key})
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
                assert httpx.get(url + "/readyz").status_code == 503
                metrics = client.get("/metrics").text
                assert answer.result().status_code == 200
        assert process.wait(20) == 0
    assert 'mtserve_requests_total{route="",status="503",task=""} 1.0' in metrics
    waiting = re.search(r'mtserve_queue_rows{trunk="[0-9a-f]{12}"} (\d)', metrics)
    assert waiting is not None
    assert waiting[1] == "2"
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"time"')]
    assert [line["status"] for line in lines if line["path"] == "/predict"] == [503, 200]
    assert key not in log.read_text()


def test_command_checks_before_it_starts(checkpoints: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    argv, env = command([checkpoints[0]], host="localhost", port=free_port())
    assert argv[:5] == [sys.executable, "-m", "bentoml", "serve", SERVICE]
    assert env["BENTOML_DO_NOT_TRACK"] == "True"
    assert checkpoints[0] in env["MTSERVE_MODEL"]
    monkeypatch.setenv("MTSERVE_MODEL", checkpoints[1])
    assert checkpoints[1] in command([], port=free_port())[1]["MTSERVE_MODEL"]
    with pytest.raises(ConfigError, match="IP address"):
        command([checkpoints[0]], host="example.org")
    with pytest.raises(SetupError, match="task 'topic'"):
        command([checkpoints[0], checkpoints[0]])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SetupError, match="cannot listen"):
            command([checkpoints[0]], port=taken.getsockname()[1])


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # BentoML's imports
@pytest.mark.filterwarnings("ignore:The `__get_pydantic_core_schema__` method:DeprecationWarning")
@pytest.mark.parametrize(("set_to", "found"), [(None, True), ("False", False), ("True", True)])
def test_usage_is_not_tracked_unless_the_operator_says_so(
    monkeypatch: pytest.MonkeyPatch, set_to: str | None, found: bool
) -> None:
    """As under plain `bentoml serve`, which has asked before it imports us."""
    from bentoml._internal.utils.analytics import usage_stats

    from mtserve.serve.service import do_not_track

    monkeypatch.setenv("BENTOML_DO_NOT_TRACK", "before")  # is put back afterwards
    monkeypatch.delenv("BENTOML_DO_NOT_TRACK")
    if set_to is not None:
        monkeypatch.setenv("BENTOML_DO_NOT_TRACK", set_to)
    usage_stats.do_not_track.cache_clear()
    assert usage_stats.do_not_track() is (set_to == "True")
    do_not_track()
    assert usage_stats.do_not_track() is found


def bare(model: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`bentoml serve` without our command, beside bentofile.yaml."""
    env = {**os.environ, "MTSERVE_MODEL": model, "BENTOML_DO_NOT_TRACK": "True", "PYTHONPATH": str(ROOT), **more}
    argv = [sys.executable, "-m", "bentoml", "serve", "--host", "127.0.0.1", "--port", str(free_port())]
    return subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_bare_bentoml_ends_with_one_sentence(tmp_path: Path) -> None:
    ended = bare(str(tmp_path / "nothing"))
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines() == [
        f"mtserve: {tmp_path / 'nothing'} does not exist; "
        "a model is a folder or a hub id (owner/name or owner/name@revision), a URL (s3://bucket/model) or a tag of "
        "BentoML's store (bentoml:name:version)"
    ]


def test_a_model_that_cannot_be_loaded_ends_the_server(checkpoints: tuple[str, str], tmp_path: Path) -> None:
    """Found by the worker only, since weights are read there: no restart loop."""
    import shutil

    shutil.copytree(checkpoints[0], tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "mtserve.json").read_text())
    manifest["tasks"][0]["options"]["labels"] = ["good", "bad"]
    (tmp_path / "c" / "mtserve.json").write_text(json.dumps(manifest))
    ended = bare(str(tmp_path / "c"))
    assert ended.returncode == 2
    assert ended.stderr.count("mtserve: task 'topic'") == 1
    assert "Traceback" not in ended.stdout + ended.stderr


def test_importing_the_service_loads_no_model() -> None:
    code = "import mtserve.serve.service, sys; raise SystemExit(bool({'torch', 'transformers'} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(("name", "extra"), [("bentofile.yaml", "torch"), ("bentofile-onnx.yaml", "onnx")])
def test_bentofile_builds_what_the_command_serves(name: str, extra: str) -> None:
    bentofile: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert bentofile["service"] == SERVICE
    assert sorted(bentofile["python"]["packages"]) == sorted(
        [*project["dependencies"], *extras[extra], *extras["serve"]]
    )


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # BentoML's imports
@pytest.mark.filterwarnings("ignore:The `__get_pydantic_core_schema__` method:DeprecationWarning")
def test_the_service_file_of_the_documentation_has_an_image_with_all_packages() -> None:
    (code,) = re.findall(r"```python\n(# service\.py.*?)```", (ROOT / "docs/deploy.md").read_text(), re.DOTALL)
    made: dict[str, Any] = {}
    exec(compile(code, "service.py", "exec"), made)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [one.partition(";")[0] for one in (*extras["serve"], *extras["torch"])]
    assert made["service"].image.python_requirements.split()[1:] == wanted


def test_several_workers_share_one_model_process(checkpoints: tuple[str, str], tmp_path: Path) -> None:
    """Its loss is told to those who wait, and it comes back, with heads that had come; SIGTERM to all of them loses
    nothing."""
    given = {"MTSERVE_WORKERS": "2", "MTSERVE_MAX_WAIT_MS": "1500", "MTSERVE_CAPTURE": "false"}
    given["MTSERVE_ADMIN_KEYS"] = admin = "a-key-of-the-operator"
    pack_head(Checkpoint.open(Path(checkpoints[0])), "topic", tmp_path / "head")
    asked = {"inputs": TEXT, "tasks": ["topic", "names"]}
    with started(checkpoints[:1], tmp_path, **given) as (url, process, log):
        (model,) = _models(process.pid)
        home = Path(_argv(model)[-1]).parent
        with httpx.Client(base_url=url, timeout=30) as client, ThreadPoolExecutor() as pool:
            first = client.post("/predict", json=asked)
            assert first.status_code == 200
            assert client.post("/native/predict", json=asked).json()["outputs"] == first.json()["outputs"]
            with Client(url, api_key=admin) as operator:
                came = operator.push_head("later", tmp_path / "head")
            listed = client.get("/tasks").json()
            assert came in listed["tasks"]
            answer = pool.submit(httpx.post, url + "/predict", json=asked, timeout=30)
            time.sleep(0.5)
            os.kill(model, signal.SIGKILL)
            lost = answer.result()
            assert (lost.status_code, lost.json()["error"]["code"]) == (503, "unavailable")
            assert _comes(lambda: client.get("/readyz").status_code == 503)  # the other worker may hear of it later
            wait_until_ready(url, process, log)
            assert client.get("/tasks").json() == listed
            both = client.post("/predict", json={**asked, "tasks": ["topic", "names", "later"]}).json()["outputs"]
            assert both == {**first.json()["outputs"], "later": first.json()["outputs"]["topic"]}
            metrics = client.get("/metrics").text
            assert 'mtserve_requests_total{route="/predict",status="503",task="topic"} 1.0' in metrics
            assert re.search(r'mtserve_batch_rows_count{trunk="[0-9a-f]{12}"} 5.0', metrics), metrics
            answer = pool.submit(httpx.post, url + "/predict", json=asked, timeout=30)
            time.sleep(0.5)
            (model,) = _models(process.pid)
            os.kill(model, signal.SIGTERM)  # as service managers do, to all processes
            process.send_signal(signal.SIGTERM)
            assert answer.result().status_code == 200
        assert process.wait(20) == 0
    assert not home.exists()
    assert "Traceback" not in log.read_text()


def _comes(true: Callable[[], bool], *, within_s: float = 2.0) -> bool:
    """Whether it does so in time."""
    ends = time.monotonic() + within_s
    while time.monotonic() < ends:
        if true():
            return True
        time.sleep(0.01)
    return False


def _models(parent: int) -> list[int]:
    """The model process among the children of a process (Linux)."""
    threads = Path(f"/proc/{parent}/task").iterdir()
    children = [int(pid) for each in threads for pid in (each / "children").read_text().split()]
    return [pid for pid in children if "mtserve.serve.process" in _argv(pid)]


def _argv(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
