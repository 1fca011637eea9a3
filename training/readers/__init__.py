"""Raw records from files and data sets, each with the place that it came from. Knows no kind of task."""

from training.readers.delimited import read_delimited
from training.readers.jsonl import read_jsonl
from training.readers.record import BadRecord, Record
from training.readers.table import read_hub, read_parquet

__all__ = ["BadRecord", "Record", "read_delimited", "read_hub", "read_jsonl", "read_parquet"]
