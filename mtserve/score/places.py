"""Where rows are and where answers go: files, globs, folders and URLs, with format and compression by their names.

Knows bytes, and no rows. All file systems are fsspec's: a path without a scheme is local, `s3://`, `gs://` and `az://`
need the packages of their extras.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal, cast, get_args

from mtserve.elsewhere import EXTRAS
from mtserve.errors import ConfigError, MissingExtraError, ResolveError

Format = Literal["jsonl", "csv", "tsv", "parquet", "arrow"]
Compression = Literal["gzip", "zstd"]
FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
LINES: tuple[Format, ...] = ("jsonl", "csv", "tsv")
"""Formats of lines, which may be compressed as a whole and come over a pipe."""
STREAM = "-"
HUB = "hub:"
_CHUNK = 2**20


@dataclass(frozen=True)
class Place:
    """One file, on whatever file system, or `-`. `quotes`: whether cells of text may stand in quotes."""

    url: str
    format: Format
    compression: Compression | None = None
    quotes: bool = True

    @property
    def name(self) -> str:
        """Its last part, as messages and error records have it."""
        return self.url.rstrip("/").rsplit("/", 1)[-1]


def as_format(name: str) -> Format:
    """Raises ConfigError for a name that is none."""
    for one in get_args(Format):
        if name == one:
            return cast("Format", one)
    raise ConfigError(f"format {name!r} is unknown; allowed: {', '.join(get_args(Format))}")


def place(url: str, form: Format | None = None) -> Place:
    """The file of that URL; its format is by its name unless given. Raises ConfigError for a name that says none."""
    stem, compression = url, None
    for ending, found in COMPRESSIONS.items():
        if url.lower().endswith(ending):
            stem, compression = url[: -len(ending)], found
    by_name = FORMATS.get(posixpath.splitext(stem)[1].lower())
    chosen = form or by_name or ("jsonl" if url == STREAM else None)
    if chosen is None:
        allowed = f"{', '.join(FORMATS)}, with .gz or .zst behind it where it is of lines; or --format"
        raise ConfigError(f"the format of {url} is not known by its name; allowed: {allowed}")
    if compression is not None and chosen not in LINES:
        raise ConfigError(f"{url}: a {chosen} file is compressed inside; allowed: {url.rpartition('.')[0]}")
    return Place(url, chosen, compression)


def inputs(location: str, form: Format | None = None, *, quotes: bool = True) -> list[Place]:
    """The files that a location names, in the order of their names: a file, a glob, or a folder, whose files of known
    formats count but for those whose name begins with `.` or `_`. Raises ResolveError if there is none."""
    if location.startswith(HUB):
        return [Place(location, "jsonl")]
    if location == STREAM:
        return [replace(place(location, form), quotes=quotes)]
    system, path = file_system(location)
    if any(one in path for one in "*?["):
        found = sorted(one for one in system.glob(path) if not posixpath.basename(one).startswith("."))
    elif system.isdir(path):
        found = sorted(one for one in system.find(path) if _counts(one[len(path) :], form))
    else:
        found = [path] if system.isfile(path) else []
    if not found:
        raise ResolveError(f"{location} names no file of rows; allowed: a file, a glob, or a folder of such files")
    return [replace(place(_url(system, one, location), form), quotes=quotes) for one in found]


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there. Raises MissingExtraError for one whose package is not here."""
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0] if "://" in url else ""
    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        raise MissingExtraError(f"{scheme}:// ", EXTRAS.get(scheme, scheme)) from error
    except ValueError as error:
        raise ConfigError(f"{url}: {error}") from error
    return system, path


def is_local(system: Any) -> bool:
    return "file" in ([system.protocol] if isinstance(system.protocol, str) else system.protocol)


@contextmanager
def opened(of: Place) -> Iterator[BinaryIO]:
    """Its bytes, decompressed. Raises ResolveError for a file that cannot be read."""
    if of.url == STREAM:
        with os.fdopen(os.dup(0), "rb") as raw:
            yield cast("BinaryIO", _decompressed(raw, of.compression))
        return
    system, path = file_system(of.url)
    try:
        raw = system.open(path, "rb")
    except OSError as error:
        raise ResolveError(f"{of.url} cannot be read: {error}") from error
    with raw:
        yield cast("BinaryIO", _decompressed(raw, of.compression))


def compressed(content: bytes, by: Compression | None) -> bytes:
    """As a member of its own, so that the concatenation of several is a file; equal bytes for equal content."""
    if by == "gzip":
        return gzip.compress(content, 6, mtime=0)
    return bytes(_arrow().Codec("zstd").compress(content, asbytes=True)) if by == "zstd" else content


@dataclass(frozen=True)
class Content:
    """What changes with the content of a file: its sha256, or of a remote one what its store says of the version; and
    its lines, where they are counted."""

    mark: str
    lines: int | None = None


def content(of: Place) -> Content:
    """Reads a local file once."""
    if of.url == STREAM or of.url.startswith(HUB):
        return Content(of.url)
    system, path = file_system(of.url)
    if not is_local(system) and "memory" not in system.protocol:
        return Content(f"version:{system.ukey(path)}")
    digest, lines = hashlib.sha256(), 0
    with system.open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            lines += chunk.count(b"\n")
    counted = of.format in LINES and of.compression is None
    return Content(f"sha256:{digest.hexdigest()}", lines if counted else None)


def targets(places: Sequence[Place], output: str, form: Format | None) -> list[Place]:
    """Where answers go: to one file, or, if the output ends in `/`, for each input to a file of its name there, of the
    format given or its own. Raises ConfigError where two inputs would go to one file."""
    if not output.endswith("/"):
        return [place(output, form)]
    found = []
    for one in places:
        stem = posixpath.splitext(one.name.removesuffix(".gz").removesuffix(".zst"))[0]
        made = form or one.format
        ending = next(ending for ending, of in FORMATS.items() if of == made)
        found.append(place(f"{output}{stem}{ending}", made))
    urls = [one.url for one in found]
    if twice := sorted({url for url in urls if urls.count(url) > 1}):
        raise ConfigError(f"several inputs have one name, so {twice[0]} would be written twice; choose one output file")
    return found


def _decompressed(raw: Any, by: Compression | None) -> Any:
    if by == "gzip":
        return gzip.GzipFile(fileobj=raw)
    return io.BufferedReader(_arrow().CompressedInputStream(raw, "zstd")) if by == "zstd" else raw


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtraError("zstd", "score") from error
    return pyarrow


def _counts(name: str, form: Format | None) -> bool:
    """Whether a file in a folder, by its path there, is one of rows."""
    parts = name.strip("/").split("/")
    if any(part.startswith((".", "_")) for part in parts) or any(part.endswith(".parts") for part in parts[:-1]):
        return False
    stem = parts[-1].lower()
    for ending in COMPRESSIONS:
        stem = stem.removesuffix(ending)
    by_name = FORMATS.get(posixpath.splitext(stem)[1])
    return by_name is not None and by_name == (form or by_name)


def _url(system: Any, path: str, location: str) -> str:
    return path if is_local(system) and "://" not in location else str(system.unstrip_protocol(path))
