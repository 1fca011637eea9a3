"""Parquet files and data sets (of the hub, or a folder) through the `datasets` library; class numbers become names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtserve.errors import ConfigError
from training.readers.record import Files, NoOptions, Record


def read_parquet(files: Files, options: NoOptions) -> Iterator[Record]:
    """Records named by row from 1. Raises ConfigError."""
    return _rows(files.path.name, "parquet", data_files=str(files.path), split="train", streaming=True)


def read_hub(
    name: str, *, base: Path, shown: str, config: str | None, split: str | None, revision: str | None
) -> Iterator[Record]:
    """Records of a data set: a folder relative to `base`, else a name on the hub. Raises ConfigError."""
    folder = base / name
    return _rows(shown, str(folder) if folder.is_dir() else name, name=config, split=split, revision=revision)


def _rows(shown: str, place: str, **which: Any) -> Iterator[Record]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        table = datasets.load_dataset(place, **which)
        features: Mapping[str, Any] = table.features or {}
        for number, row in enumerate(table, 1):
            yield Record(f"{shown}:{number}", {name: _named(features.get(name), v) for name, v in row.items()})
    except (DatasetNotFoundError, datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ConfigError(f"{shown} cannot be read: {(str(error) or repr(error)).splitlines()[0]}") from error


def _named(feature: Any, value: Any) -> Any:
    """A value with class numbers replaced by their names; -1, which stands for no label, by None."""
    import datasets

    if isinstance(feature, datasets.ClassLabel) and isinstance(value, int):
        return None if value < 0 else feature.int2str(value)
    inner = getattr(feature, "feature", None)
    return [_named(inner, v) for v in value] if inner is not None and isinstance(value, list) else value
