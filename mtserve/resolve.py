"""Where a model is: one resolver for every command and for MTSERVE_MODEL. Knows nothing of what is in a model."""

from __future__ import annotations

import re
from pathlib import Path

from mtserve.elsewhere import BENTOML, WANTED, from_bentoml, from_url
from mtserve.errors import MissingExtraError, ResolveError

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+|[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def resolve(location: str | Path) -> Path:
    """The local folder of a model: a path as it is; or a hub id (`owner/name`, `owner/name@revision`), a URL of an
    object store (`s3://…`, `gs://…`, `az://…`) or a tag of BentoML's store (`bentoml:NAME:VERSION`), fetched.

    A path that exists wins over a hub id of the same name. Pickles are never fetched. Raises ResolveError, and
    MissingExtraError for a place whose package is not installed.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        return path
    text = str(location)
    if isinstance(location, str) and "://" in location:
        return from_url(location)
    if text.startswith(BENTOML):
        return from_bentoml(text)
    if path.exists():
        raise ResolveError(f"{text} is a file; a model is a folder")
    hub = _HUB_ID.fullmatch(text)
    if hub is None or text.startswith((".", "~", "/")):
        raise ResolveError(
            f"{text} does not exist; a model is a folder or a hub id (owner/name or owner/name@revision), a URL "
            "(s3://bucket/model) or a tag of BentoML's store (bentoml:name:version)"
        )
    return _download(hub["repo"], hub["revision"])


def _download(repo: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingExtraError("loading from the hub", "train") from error
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        where = repo if revision is None else f"{repo}@{revision}"
        first = str(error).strip().splitlines()[0]
        raise ResolveError(
            f"{where} is neither a folder here nor a model on the hub that can be reached: {first}"
        ) from error
