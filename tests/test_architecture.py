"""Who imports whom, read from the code: low layers never import higher ones, heavy packages stay where they belong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mtserve

ROOT = Path(__file__).parent.parent
LAYERS: list[set[str]] = [
    {"errors", "rows", "observer"},
    {"elsewhere"},
    {"settings", "resolve", "preparation", "batching", "safetensors_file", "profiles", "bundle", "overlap", "client"},
    {"text"},
    {"tasks", "trunk"},
    {"chains"},
    {"ticket", "waiting", "decisions", "stepper", "offline"},
    {"text_pool"},
    {"heads"},
    {"model"},
    {"manifest"},
    {"checkpoint"},
    {"folder", "head_file"},
    {"sealing"},
    {"surgery"},
    {"weights"},
    {"backends"},
    {"engine"},
    {"golden", "scheduler"},
    {"loading", "interop", "comparison"},
    {"inspection", "speeds", "share", "opening"},
    {"tuning"},
    {"export"},
    {"shown"},
    {"score"},
    {"serve"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
ONLY_IN = {
    "bentoml": {"serve", "elsewhere"},
    "fastapi": {"serve"},
    "gradio": {"serve"},
    "prometheus_client": {"serve"},
    "starlette": {"serve"},
    "onnx": {"export"},
    "onnxruntime": {"backends", "export"},
    "tokenizers": {"text"},
    "torch": {"trunk", "heads", "model", "weights", "backends", "tasks", "interop", "export"},
    "transformers": {"trunk", "heads", "model", "weights", "backends", "interop", "export"},
}


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """(component, file) of every source file: the component is the file or folder directly in the package."""
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT / package).parts
        yield parts[0].removesuffix(".py"), path


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, at any depth, but for names that only type checkers see."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(component: str) -> int:
    for number, members in enumerate(LAYERS):
        if component in members:
            return number
    raise AssertionError(f"{component} has no layer: name it in LAYERS and in docs/architecture.md")


def test_lower_layers_do_not_import_higher_ones() -> None:
    for component, path in modules("mtserve"):
        if component == "__init__":
            continue
        for name in imports(path):
            root, *rest = name.split(".")
            if root == "mtserve" and rest:
                other = rest[0]
                if other in {component, "__version__"}:
                    continue
                allowed = layer(other) < layer(component)
                assert allowed, f"{path.relative_to(ROOT)} imports mtserve.{other}"


def test_mtserve_never_imports_training() -> None:
    for _, path in modules("mtserve"):
        assert not any(name.split(".")[0] == "training" for name in imports(path)), path


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_heavy_packages_stay_where_they_belong(package: str) -> None:
    for component, path in modules("mtserve"):
        if any(name.split(".")[0] == package for name in imports(path)):
            assert component in ONLY_IN[package], f"{path.relative_to(ROOT)} imports {package}"
            if package in {"fastapi", "gradio"}:
                assert path.parent == ROOT / "mtserve/serve/ui", path


def test_nothing_unpickles_or_trusts_remote_code() -> None:
    """But for the reader of weights from elsewhere, on request, by torch's loader that makes only tensors."""
    for package in ("mtserve", "training"):
        for _, path in modules(package):
            names = set(imports(path))
            if path.relative_to(ROOT).as_posix() == "mtserve/interop/tensors.py":
                source = path.read_text(encoding="utf-8")
                assert {name for name in names if name.startswith("pickle")} == {"pickle.UnpicklingError"}
                assert re.findall(r"torch\.load\(.*\)", source) == [
                    'torch.load(path, map_location="cpu", weights_only=True, mmap=True)'
                ]
                continue
            assert not {n.split(".")[0] for n in names} & {"pickle", "dill", "cloudpickle", "joblib"}, path
            source = path.read_text(encoding="utf-8")
            assert "torch.load" not in source, path
            assert "trust_remote_code=True" not in source, path


def test_importing_the_library_loads_neither_torch_nor_transformers() -> None:
    """So that a bundle serves where neither is installed, and a command's help is quick."""
    code = (
        "import sys, mtserve, mtserve.cli, mtserve.tasks, mtserve.engine, mtserve.checkpoint, mtserve.scheduler, "
        "mtserve.serve.launch; "
        "print(sorted({'torch', 'transformers', 'bentoml', 'onnxruntime', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[]"


def test_all_is_sorted_and_importable() -> None:
    names = mtserve.__all__
    assert sorted(names) == sorted(set(names))
    upper = [n for n in names if not n.startswith("_")]
    assert upper == sorted(upper, key=lambda n: (not n.isupper(), n[0].islower(), n))
    for name in names:
        assert hasattr(mtserve, name)


def test_the_code_stays_small() -> None:
    """Budgets, raised only with a reason in docs/architecture.md; a file is about one noun."""
    for package, budget in (("mtserve", 23_500), ("training", 7800)):
        sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for _, path in modules(package)}
        assert sum(sizes.values()) <= budget
        too_long = {str(path.relative_to(ROOT)): size for path, size in sizes.items() if size > 330}
        assert not too_long
