"""Models that are neither here nor on the hub: in an object store (a URL of fsspec), or in BentoML's model store.

What an object store holds is kept in a folder here, named by the URL and by what the store says of each file.
Invariants (tests/test_elsewhere.py): such a folder is whole or not there, as it is filled under another name; what is
changed in the store is fetched anew; only files of a model's kinds are fetched, and never a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from mtserve.errors import MissingExtraError, ResolveError

WANTED = ("*.json", "*.jsonl", "*.safetensors", "*.onnx", "*.png", "*.txt", "*.model", "README.md")
"""Files that a model has."""
BENTOML = "bentoml:"
EXTRAS = {"s3": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az"}
"""Which extra has the package for a scheme."""


def from_url(url: str) -> Path:
    """The model at a URL (`s3://bucket/model`), as a folder here. Raises ResolveError and MissingExtraError."""
    scheme = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
    except ImportError as error:
        raise MissingExtraError(f"a model at {scheme}://", EXTRAS.get(scheme, "score")) from error
    except ValueError as error:
        raise ResolveError(f"{url}: {error}") from error
    try:
        files = _files(system, path)
        if not files:
            raise ResolveError(f"{url} holds no model: no file of {', '.join(WANTED)}")
        return _kept(system, url, files)
    except OSError as error:
        raise ResolveError(f"{url} cannot be read: {error}") from error


def from_bentoml(location: str) -> Path:
    """The folder of `bentoml:NAME[:VERSION]` in BentoML's model store. Raises ResolveError and MissingExtraError."""
    try:
        import bentoml
        from bentoml.exceptions import BentoMLException
    except ImportError as error:
        raise MissingExtraError("a model in BentoML's store", "serve") from error
    tag = location.removeprefix(BENTOML)
    try:
        return Path(bentoml.models.get(tag).path)
    except (BentoMLException, ValueError) as error:
        raise ResolveError(f"BentoML's model store has no {tag!r}: {str(error).strip().splitlines()[0]}") from error


def home() -> Path:
    """Where models that were fetched are kept: MTSERVE_CACHE, or mtserve in the user's folder of caches."""
    if given := os.environ.get("MTSERVE_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mtserve"


def _files(system: Any, path: str) -> dict[str, str]:
    """Paths in the store of the files that are wanted, by their names in the model."""
    found = {}
    for one in sorted(system.find(path)):
        name = PurePosixPath(one.removeprefix(path.rstrip("/")).lstrip("/"))
        if ".." not in name.parts and any(fnmatch(name.name, wanted) for wanted in WANTED):
            found[str(name)] = one
    return found


def _kept(system: Any, url: str, files: Mapping[str, str]) -> Path:
    versions = [(name, system.size(one), system.ukey(one)) for name, one in files.items()]
    key = hashlib.sha256(json.dumps([url, versions]).encode()).hexdigest()[:24]
    folder = home() / "models" / key
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder.parent))
    try:
        for name, one in files.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            system.get_file(one, str(aside / name))
        aside.chmod(0o755)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder
