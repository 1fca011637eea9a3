"""Tables that were written are read by the libraries that people have: types, nested columns, nulls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyarrow import parquet

from mtserve.engine import Engine
from tests.score.test_run import scored, texts, write
from tests.tiny import tiny

TASKS = ("topic", "tags", "names")
Rows = Sequence[dict[str, Any]]


def by_pandas(path: Path) -> Rows:
    return [*pd.read_parquet(path).to_dict("records")]


def by_datasets(path: Path) -> Rows:
    import datasets

    return [*datasets.Dataset.from_parquet(str(path), keep_in_memory=True)]


def by_polars(path: Path) -> Rows:
    return list(pytest.importorskip("polars").read_parquet(path).to_dicts())


def by_duckdb(path: Path) -> Rows:
    duckdb = pytest.importorskip("duckdb")
    found = duckdb.execute("select * from read_parquet(?)", [str(path)])
    names = [column[0] for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def by_spark(path: Path) -> Rows:
    sql = pytest.importorskip("pyspark.sql")
    session = sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        return [row.asDict(recursive=True) for row in session.read.parquet(str(path)).orderBy("id").collect()]
    finally:
        session.stop()


QUICK = [by_pandas, by_datasets]
OTHERS = [pytest.param(one, marks=pytest.mark.slow) for one in (by_polars, by_duckdb, by_spark)]


@pytest.mark.parametrize("form", ["flat", "nested"])
@pytest.mark.parametrize("reader", [*QUICK, *OTHERS])
def test_a_table_reads_as_it_was_written(reader: Callable[[Path], Rows], form: str, tmp_path: Path) -> None:
    engine: Engine = tiny("bert").engine
    source = write(tmp_path / "in.jsonl", [*texts(5), {"id": 5}])
    scored(engine, source, tmp_path / "out.parquet", *TASKS, form=form, all_scores=form == "flat")
    wanted = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert wanted[5][TASKS[0] if form == "nested" else f"{TASKS[0]}_label"] is None
    found = reader(tmp_path / "out.parquet")
    assert [simple(row) for row in found] == [simple(row) for row in wanted]


def simple(cell: Any) -> Any:
    """Lists of any class as lists, and what is missing as None, however a library says so."""
    if isinstance(cell, dict):
        return {name: simple(one) for name, one in cell.items()}
    if hasattr(cell, "tolist"):
        cell = cell.tolist()
    if isinstance(cell, list | tuple):
        return [simple(one) for one in cell]
    return None if isinstance(cell, float) and cell != cell else cell
