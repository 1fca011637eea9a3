"""The command that starts a server, checked before it runs. Knows BentoML's command line, but imports nothing of it."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from mtserve.errors import ConfigError, MissingExtraError, SetupError
from mtserve.serve.loading import check_settings, split_prefix
from mtserve.settings import read_settings

SERVICE = "mtserve.serve.service:service"


def command(locations: Sequence[str], *, host: str = "127.0.0.1", port: int = 3000) -> tuple[list[str], dict[str, str]]:
    """(argv, environment) of a server for these checkpoints; of those of MTSERVE_MODEL if there are none.

    `host` is an IP address, or localhost. All that can be known beforehand is checked: installation, settings,
    checkpoints, task names, port. Raises SetupError (one of its classes) with a sentence for the user.
    """
    if find_spec("bentoml") is None:
        raise MissingExtraError("serving", "serve")
    wanted = list(locations or read_settings().model)
    check_settings(read_settings().model_copy(update={"model": tuple(wanted)}))
    address = _address(host)
    check_free(address, port)
    argv = [sys.executable, "-m", "bentoml", "serve", SERVICE, "--host", address, "--port", str(port)]
    return argv, {
        **os.environ,
        "MTSERVE_MODEL": json.dumps([_absolute(location) for location in wanted]),
        "BENTOML_DO_NOT_TRACK": "True",
    }


def _absolute(location: str) -> str:
    """A folder by its whole path, since the server may change its own; a hub id as it is."""
    prefix, unprefixed = split_prefix(location)
    path = Path(unprefixed).expanduser()
    return (prefix and prefix + "=") + (str(path.resolve()) if path.is_dir() else unprefixed)


def _address(host: str) -> str:
    if host == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(host))
    except ValueError as error:
        raise ConfigError(f"host must be an IP address or localhost; found {host!r}") from error


def check_free(address: str, port: int) -> None:
    """Raise ConfigError for a port that is none, SetupError for one that another program holds."""
    if not 1 <= port <= 65535:
        raise ConfigError(f"port must be in 1..65535; found {port}")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise SetupError(f"cannot listen on {address} port {port}: {error.strerror}") from error
