"""A finished checkpoint to a repository of the Hugging Face hub. Knows no training.

What is sent is what the resolver fetches again (`mtserve.elsewhere.WANTED`): no states of a training, no pickles. A
repository that does not exist is made, and is private.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from mtserve.elsewhere import WANTED
from mtserve.errors import ConfigError


def check_push(repo: str) -> None:
    """Raise ConfigError for what is no name of a repository, and where nobody is logged in or the hub does not answer:
    before a training, which takes longer."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push {repo}: {error}") from error
    try:
        HfApi().whoami()
    except Exception as error:  # errors of the connection are those of the client's HTTP library, which has changed
        raise ConfigError(f"--push {repo}: {_first(error)} (`hf auth login`, or HF_TOKEN)") from error


def push(folder: Path, repo: str) -> str:
    """Send a checkpoint; the address of the commit. Raises ConfigError, after which the checkpoint is still there."""
    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        wanted = [*WANTED, *(f"**/{pattern}" for pattern in WANTED)]
        sent = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=wanted, commit_message="A checkpoint of mtserve"
        )
    except Exception as error:  # as above
        raise ConfigError(f"{folder} is not on the hub: {_first(error)}; push it again with `hf upload`") from error
    return str(sent.commit_url)


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
