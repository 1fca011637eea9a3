"""Profiles: what runs where, the choice, several checkpoints at once, the manifest's part and how it is committed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtserve import sealing
from mtserve.backends import hardware, machine
from mtserve.backends.eager import EagerBackend
from mtserve.backends.serving import DTYPES
from mtserve.checkpoint import Checkpoint
from mtserve.errors import CheckpointError, ConfigError
from mtserve.inspection import verify_profiles
from mtserve.loading import in_force, load, load_checkpoint
from mtserve.manifest import FP32, Profile, Speed
from mtserve.profiles import PRECISIONS, Hardware, choose, profile_key, together
from mtserve.sealing import accept_profiles
from mtserve.tasks import KINDS
from tests.tiny import tiny, write_checkpoint

OLD = Hardware("cpu")
ZEN = Hardware("cpu", frozenset({"avx512_bf16", "avx512_vnni"}))
AMX = Hardware("cpu", frozenset({"amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni"}))
GPU = Hardware("cuda", frozenset({"bf16", "sm_90"}))
ALL: dict[str, dict[str, float]] = {name: {} for name in PRECISIONS}


def test_a_key_names_device_and_sorted_flags() -> None:
    assert [one.key for one in (OLD, ZEN, GPU)] == ["cpu", "cpu:avx512_bf16+avx512_vnni", "cuda:bf16+sm_90"]
    assert profile_key("f" * 64, "bf16", "cpu") == "f" * 64 + ":bf16:cpu"


def test_the_backend_knows_every_profile() -> None:
    assert set(DTYPES) == set(PRECISIONS)


@pytest.mark.parametrize(
    ("accepted", "hardware", "chosen"),
    [
        ({"fp32": {}}, AMX, "fp32"),  # never tuned
        (ALL, OLD, "fp32"),  # bf16 runs, and does not pay
        (ALL, ZEN, "bf16"),
        (ALL, Hardware("cpu", frozenset({"avx512_vnni"})), "int8"),
        (ALL, AMX, "bf16"),
        (ALL, GPU, "fp16"),
        (ALL, Hardware("cuda", frozenset({"sm_70"})), "fp16"),
        ({"fp32": {}, "int8": {}}, GPU, "fp32"),
        ({"bf16": {}}, OLD, "bf16"),  # nothing else is accepted, and it runs
        ({"fp32": {ZEN.key: 100.0}, "int8": {ZEN.key: 90.0}}, ZEN, "fp32"),  # as measured, not as expected
        ({"fp32": {ZEN.key: 100.0}, "int8": {ZEN.key: 90.0}}, AMX, "int8"),  # … elsewhere
        ({"fp32": {ZEN.key: 100.0}, "bf16": {ZEN.key: 120.0}, "int8": {}}, ZEN, "bf16"),  # of those measured here
        ({"fp32": {ZEN.key: 100.0}, "int8": {ZEN.key: 100.0}}, ZEN, "int8"),  # a tie
        ({"fp32": {OLD.key: 100.0}, "bf16": {OLD.key: 300.0}}, OLD, "fp32"),  # flags say that it does not pay
        ({"fp4": {ZEN.key: 1e9}, "fp32": {}}, ZEN, "fp32"),  # of a later version
    ],
)
def test_choices(accepted: dict[str, dict[str, float]], hardware: Hardware, chosen: str) -> None:
    assert choose(accepted, hardware) == chosen


FLAGS = st.sets(st.sampled_from(["amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "bf16", "sm_90"]))
HARDWARE = st.builds(Hardware, st.sampled_from(["cpu", "cuda"]), FLAGS.map(frozenset))
SPEEDS = st.dictionaries(HARDWARE.map(lambda one: one.key), st.floats(1, 1e6), max_size=4)
ACCEPTED = st.dictionaries(st.sampled_from([*PRECISIONS, "fp4"]), SPEEDS, max_size=5)


@given(ACCEPTED, HARDWARE, st.randoms(use_true_random=False))
def test_the_choice_is_accepted_runs_pays_and_does_not_depend_on_order(
    accepted: dict[str, dict[str, float]], hardware: Hardware, random: Any
) -> None:
    accepted = {"fp32": {}} | accepted
    chosen = choose(accepted, hardware)
    assert chosen in accepted
    assert PRECISIONS[chosen].pays(hardware)
    measured = {n: of[hardware.key] for n, of in accepted.items() if hardware.key in of and n in PRECISIONS}
    paying = {name: rate for name, rate in measured.items() if PRECISIONS[name].pays(hardware)}
    assert not paying or accepted[chosen][hardware.key] == max(paying.values())
    shuffled = list(accepted.items())
    random.shuffle(shuffled)
    again = Hardware(hardware.device, frozenset(sorted(hardware.flags, reverse=True)))
    assert choose(dict(shuffled), again) == chosen


def test_nothing_that_runs_is_said_so() -> None:
    with pytest.raises(
        CheckpointError, match=r"no profile that the checkpoint accepts runs on cuda:bf16.*accepted: int8"
    ):
        choose({"int8": {}}, GPU)


def test_checkpoints_of_one_trunk_get_what_all_accept() -> None:
    one = {"fp32": {"a": 100.0, "b": 10.0}, "int8": {"a": 300.0}, "bf16": {}}
    other = {"int8": {"a": 600.0}, "fp32": {"a": 100.0}}
    both = together(one, other)
    assert both == {"fp32": {"a": pytest.approx(100)}, "int8": {"a": pytest.approx(400)}}  # 2 / (1/300 + 1/600)
    assert together(one) == {name: {key: pytest.approx(rate) for key, rate in of.items()} for name, of in one.items()}


# the manifest


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("profiles") / "bert", tiny("bert", only=("topic",))).folder


@pytest.fixture
def checkpoint(sealed: Path, tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(Path(shutil.copytree(sealed, tmp_path / "c")))


def accepting(checkpoint: Checkpoint, **speeds: float) -> Checkpoint:
    """The checkpoint, which accepts profiles with such speeds on this machine."""
    key = hardware.hardware("cpu").key
    found = {n: Speed(tokens_per_s=speed, cores=machine.usable_cores()) for n, speed in speeds.items()}
    return accept_profiles(checkpoint, {n: Profile(tolerance=0.2, speeds={key: one}) for n, one in found.items()})


def test_old_manifests_stay_valid(checkpoint: Checkpoint) -> None:
    raw = json.loads((checkpoint.folder / "mtserve.json").read_text())
    raw["profiles"] = {"fp32": {"tolerance": 1e-4}}  # as the version before wrote it
    (checkpoint.folder / "mtserve.json").write_text(json.dumps(raw))
    assert Checkpoint.open(checkpoint.folder).manifest.profiles == {"fp32": FP32}


def test_accepting_touches_the_manifest_alone(checkpoint: Checkpoint) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        files = [path for path in checkpoint.folder.rglob("*") if path.is_file() and path.name != "mtserve.json"]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    profiles = {"fp32": FP32, "bf16": Profile(tolerance=0.05, flips=1, rows=400, max_flips=0.005)}
    after = accept_profiles(checkpoint, profiles)
    assert state() == before
    assert after.manifest.profiles == profiles
    assert after.manifest.model_copy(update={"profiles": checkpoint.manifest.profiles}) == checkpoint.manifest
    after.verify()
    with pytest.raises(CheckpointError, match="was written anew since it was opened"):
        accept_profiles(checkpoint, {"fp32": FP32})
    assert Checkpoint.open(checkpoint.folder).manifest == after.manifest


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_crash_while_accepting_leaves_the_old_manifest(
    checkpoint: Checkpoint, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path if step == "open" else os, step, crash)
    with pytest.raises(KeyboardInterrupt):
        sealing.commit(checkpoint.folder, checkpoint.manifest.model_copy(update={"written_by": "x"}))
    monkeypatch.undo()
    assert Checkpoint.open(checkpoint.folder).manifest == checkpoint.manifest
    accept_profiles(checkpoint, {"fp32": FP32, "bf16": Profile(tolerance=0.1)}).verify()
    assert not list(checkpoint.folder.glob("*.aside"))


# loading


def test_loading_takes_what_is_asked_for_or_chosen(checkpoint: Checkpoint) -> None:
    assert load(checkpoint.folder, device="cpu").backend.profile == "fp32"
    with pytest.raises(
        CheckpointError, match=r"bf16 is not accepted by the checkpoint; accepted: fp32 \(`mtserve tune"
    ):
        load(checkpoint.folder, profile="bf16", device="cpu")
    engine = load(checkpoint.folder, profile="bf16", device="cpu", accepted_only=False)
    assert engine.backend.profile == "bf16"
    with pytest.raises(ConfigError, match="profile 'fp4' is unknown; allowed: fp32, bf16, fp16, int8"):
        load(checkpoint.folder, profile="fp4", accepted_only=False)
    with pytest.raises(ConfigError, match=r"profile fp16 does not run on cpu.*; those that do: fp32, bf16"):
        load(checkpoint.folder, profile="fp16", device="cpu", accepted_only=False)
    with pytest.raises(ConfigError, match="device must be auto, cpu or cuda; found 'tpu'"):
        load(checkpoint.folder, device="tpu")
    found = in_force(engine, checkpoint.manifest.trunk.fingerprint)
    assert (found.padding_free, found.hardware.device) == (True, "cpu")
    assert found.key == profile_key(checkpoint.manifest.trunk.fingerprint, "bf16", "cpu")


def test_speeds_measured_on_such_hardware_decide(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "hardware", lambda device: ZEN)
    slow = accepting(checkpoint, fp32=100, bf16=50)
    assert [load_checkpoint(slow, device="cpu").backend.profile for _ in range(3)] == ["fp32"] * 3
    fast = accepting(slow, fp32=100, bf16=200)
    assert load_checkpoint(fast, device="cpu").backend.profile == "bf16"
    assert load_checkpoint(fast, profile="fp32", device="cpu").backend.profile == "fp32"


def test_every_accepted_profile_is_verified(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "hardware", lambda device: ZEN)
    tight = accept_profiles(checkpoint, {"fp32": FP32, "bf16": Profile(tolerance=1e-9), "fp16": Profile(tolerance=1)})
    found = verify_profiles(tight)
    assert list(found) == ["fp32", "bf16"]
    assert [report.reproduced for reports in found.values() for report in reports] == [True, False]


# the machine


def test_a_control_groups_time_bounds_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, mount = tmp_path / "cgroup", tmp_path / "fs"
    (mount / "a/b").mkdir(parents=True)
    (mount / "cpu/a").mkdir(parents=True)
    (mount / "cpu.max").write_text("max 100000\n")
    (mount / "a/cpu.max").write_text("150000 100000\n")
    (mount / "a/b/cpu.max").write_text("400000 100000\n")
    (mount / "cpu/a/cpu.cfs_quota_us").write_text("-1\n")
    (mount / "cpu/a/cpu.cfs_period_us").write_text("100000\n")
    proc.write_text("4:memory:/a\n3:cpu,cpuacct:/a\n0::/a/b\n")
    assert sorted(machine.cgroup_limits(proc, mount)) == [1.5, 4.0]
    (mount / "cpu/a/cpu.cfs_quota_us").write_text("50000\n")
    assert min(machine.cgroup_limits(proc, mount)) == 0.5
    assert list(machine.cgroup_limits(tmp_path / "none", mount)) == []
    monkeypatch.setattr(machine, "cgroup_limits", lambda: iter([0.5]))
    assert machine.usable_cores() == 1


def test_usable_cores_are_physical_and_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cgroup_limits", lambda: iter([]))
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 8}, raising=False)
    monkeypatch.setattr(machine, "_siblings", lambda cpu: f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}")
    assert machine.usable_cores() == 3  # two whole cores, and one thread of a third


@pytest.mark.parametrize(
    ("cores", "processes", "wanted", "threads"), [(8, 1, None, 8), (8, 3, None, 2), (2, 4, None, 1), (8, 2, 4, 4)]
)
def test_processes_share_the_cores(cores: int, processes: int, wanted: int | None, threads: int) -> None:
    assert machine.threads_for(cores, processes=processes, wanted=wanted) == threads


def test_too_many_threads_are_used_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert machine.threads_for(4, processes=2, wanted=3) == 3
    assert "2 processes of 3 threads each on 4 usable cores" in caplog.text


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("musl", "1.2"))
    assert machine.keep_memory() is False


def test_a_backend_of_a_tiny_model_agrees_across_profiles() -> None:
    """What a profile is: the same model, within rounding."""
    small = tiny("bert", only=("topic",))
    sample = KINDS["classification"].sample(small.tasks[0].options)
    wanted = small.engine.predict("topic", [sample])[0]
    small.engine.backend = EagerBackend(small.model, pad_id=0, profile="bf16")
    found = small.engine.predict("topic", [sample])[0]
    assert [one["label"] for one in found] == [one["label"] for one in wanted]
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in wanted], abs=0.1)
