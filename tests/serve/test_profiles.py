"""In which profile a server answers, and with which share of the machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mtserve.backends import hardware, machine
from mtserve.checkpoint import Checkpoint
from mtserve.errors import CheckpointError
from mtserve.manifest import FP32, Profile, Speed
from mtserve.profiles import Hardware
from mtserve.sealing import accept_profiles
from mtserve.serve.loading import load_table
from mtserve.serve.table import TaskTable
from mtserve.settings import Settings
from mtserve.share import Share, wait_briefly
from tests.serve.conftest import sealed

ZEN = Hardware("cpu", frozenset({"avx512_bf16"}))


@pytest.fixture(autouse=True)
def machine_of_four(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Four cores with bf16 units; what the process is told to do is kept in a list and not done."""
    told: list[Any] = []
    monkeypatch.setattr(hardware, "hardware", lambda device: ZEN)
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    monkeypatch.setattr(hardware, "use_threads", told.append)
    monkeypatch.setattr(machine, "keep_memory", lambda: told.append("keep"))
    return told


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one trunk."""
    home = tmp_path_factory.mktemp("profiles")
    sealed(home / "a", "bert", only=("topic",))
    sealed(home / "b", "bert", only=("names",))
    return home / "a", home / "b"


def accepting(folder: Path, to: Path, **speeds: Speed) -> str:
    """A copy that accepts profiles with such speeds on this hardware."""
    profiles = {name: Profile(tolerance=0.5, speeds={ZEN.key: speed}) for name, speed in speeds.items()}
    accept_profiles(Checkpoint.open(Path(shutil.copytree(folder, to))), {"fp32": FP32} | profiles)
    return str(to)


def speed(rate: float, **best: Any) -> Speed:
    return Speed(tokens_per_s=rate, cores=4, **best)


def opened(*locations: str, workers: int = 1, **given: Any) -> TaskTable:
    table = load_table(Settings(model=locations, device="cpu", **given), workers=workers)
    table.model.close()
    return table


def profiles(table: TaskTable) -> list[str]:
    return [task["profile"] for task in table.listing()["tasks"]]


def test_a_server_takes_the_fastest_accepted_profile(homes: tuple[Path, Path], tmp_path: Path) -> None:
    one = accepting(homes[0], tmp_path / "a", fp32=speed(100), bf16=speed(200))
    for _ in range(2):
        table = opened(one)
        assert profiles(table) == ["bf16"]
    assert profiles(opened(one, profile="fp32")) == ["fp32"]
    slow = accepting(homes[0], tmp_path / "slow", fp32=speed(100), bf16=speed(50))
    assert profiles(opened(slow)) == ["fp32"]
    with pytest.raises(CheckpointError, match="profile int8 is not accepted by the checkpoint; accepted: fp32, bf16"):
        opened(one, profile="int8")


def test_checkpoints_of_one_trunk_are_served_in_what_all_accept(homes: tuple[Path, Path], tmp_path: Path) -> None:
    one = accepting(homes[0], tmp_path / "a", fp32=speed(100), bf16=speed(200))
    both = opened(one, str(homes[1]))
    assert len(both.trunks) == 1
    assert profiles(both) == ["fp32", "fp32"]
    other = accepting(homes[1], tmp_path / "b", fp32=speed(100), bf16=speed(150))
    assert profiles(opened(one, other)) == ["bf16", "bf16"]


def test_golden_rows_are_held_to_the_profiles_tolerance(homes: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(accepting(homes[0], tmp_path / "a"))
    tight = {"fp32": FP32, "bf16": Profile(tolerance=1e-9)}
    accept_profiles(Checkpoint.open(folder), tight)
    with pytest.raises(CheckpointError, match="profile bf16 allows 1e-09"):
        opened(str(folder))


@pytest.mark.parametrize(
    ("given", "workers", "threads"),
    [({}, 1, 4), ({}, 2, 2), ({"processes": 2}, 2, 1), ({"processes": 9}, 1, 1), ({"threads": 3}, 2, 3)],
)
def test_workers_and_servers_share_the_cores(
    given: dict[str, Any], workers: int, threads: int, machine_of_four: list[Any]
) -> None:
    share = Share.of(Settings(**given), workers=workers)
    assert (share.threads, machine_of_four) == (threads, [threads])


@pytest.mark.parametrize(
    ("given", "workers", "told"),
    [
        ({}, 1, [4, 2]),  # as tuned; memory given back, as tuned
        ({}, 2, [2, "keep"]),  # tuned on four cores, and this worker has two
        ({"threads": 3}, 1, [3]),
        ({"keep_memory": True}, 1, [4, 2, "keep"]),
        ({"keep_memory": False}, 2, [2]),
    ],
)
def test_what_was_tuned_on_equal_hardware_is_used(
    homes: tuple[Path, Path],
    tmp_path: Path,
    given: dict[str, Any],
    workers: int,
    told: list[Any],
    machine_of_four: list[Any],
) -> None:
    best = speed(200, threads=2, keep_memory=False)
    table = opened(accepting(homes[0], tmp_path / "a", fp32=speed(100), bf16=best), workers=workers, **given)
    assert machine_of_four == told
    assert table.trunks[0].threads == next(one for one in reversed(told) if one != "keep")


def test_threads_of_a_server_wait_briefly_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, found in (({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)):
        environment = {**given}
        monkeypatch.setattr("os.environ", environment)
        wait_briefly()
        assert environment.get("GOMP_SPINCOUNT") == found
