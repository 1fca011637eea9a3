"""Raw records from files and data sets, each with the place that it came from. Knows no kind of task.

A format is one file here and one line in FORMATS.
"""

from training.readers.absa import AbsaOptions, read_absa
from training.readers.commonsenseqa import convert, read_commonsenseqa
from training.readers.conll import ConllOptions, read_conll
from training.readers.delimited import read_csv, read_glue_tsv, read_tsv
from training.readers.documents import PairOptions, read_documents, read_sentence_pairs
from training.readers.jsonl import read_jsonl
from training.readers.lines import canonical
from training.readers.parallel import ParallelOptions, parallel_files, read_parallel
from training.readers.record import BadRecord, Files, Format, NoOptions, Record, Records, converted
from training.readers.strap import StrapOptions, read_strap, strap_files
from training.readers.stsb import read_stsb
from training.readers.table import read_hub, read_parquet

FORMATS = {
    "absa": Format(read_absa, AbsaOptions, encoded=False),
    "commonsenseqa": Format(read_commonsenseqa, convert=convert),
    "conll": Format(read_conll, ConllOptions),
    "csv": Format(read_csv),
    "glue_tsv": Format(read_glue_tsv),
    "jsonl": Format(read_jsonl),
    "lines": Format(read_documents),
    "parallel": Format(read_parallel, ParallelOptions, layout=parallel_files),
    "parquet": Format(read_parquet, encoded=False),
    "sentence_pairs": Format(read_sentence_pairs, PairOptions),
    "strap": Format(read_strap, StrapOptions, layout=strap_files),
    "stsb": Format(read_stsb),
    "tsv": Format(read_tsv),
}

__all__ = [
    "FORMATS",
    "BadRecord",
    "Files",
    "Format",
    "NoOptions",
    "Record",
    "Records",
    "canonical",
    "converted",
    "read_hub",
]
