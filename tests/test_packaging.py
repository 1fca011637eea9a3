"""What a user installs: extras, pins, and what the wheel carries."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~ ;]", line)[0].lower().replace("_", "-") for line in requirements}


def test_extras() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {
        *("torch", "serve", "train", "export", "onnx", "gpu", "ray", "ui", "dev", "stemming", "farasa"),
        *("score", "s3", "gs", "az"),
    }
    assert "torch>=2.11" in extras["torch"]
    assert not names(PROJECT["dependencies"]) & {"torch", "transformers", "bentoml"}
    assert len(PROJECT["dependencies"]) <= 12


def test_what_is_installed_for_development_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[^ ]+", pin) for pin in pins)
    assert "torch==2.13.0" in pins
    extras = PROJECT["optional-dependencies"]
    wanted = names(PROJECT["dependencies"]).union(
        *(names(extras[e]) for e in ("torch", "serve", "train", "onnx", "export", "score", "ui", "dev"))
    )
    assert wanted - {"mtserve"} <= names(pins)


@pytest.mark.slow
def test_the_wheel_ships_both_packages_and_the_demo(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(argv, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    sources = {
        p.relative_to(ROOT).as_posix() for package in ("mtserve", "training") for p in (ROOT / package).rglob("*")
    }
    kept = {s for s in sources if s.endswith((".py", ".yaml", ".jsonl", "py.typed"))}
    assert kept <= shipped
    assert {name.split("/")[0] for name in shipped if ".dist-info" not in name} == {"mtserve", "training"}
