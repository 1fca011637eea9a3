"""`python -m training RUN.yaml key=value…`: messages and progress on stderr, the table of results on stdout."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtserve.errors import MissingExtraError, SetupError
from training.config import RunConfig, read_config
from training.evaluate import Scores, table

if TYPE_CHECKING:
    from training.run import Result

_HELP = """\
example: python -m training run.yaml output=runs/second training.epochs=5 tasks.intent.weight=2

Train every task of a run file on one trunk and write a checkpoint. The keys of a run file are:
{keys}.
Data paths are relative to the run file. Exit code 2 stands for a wrong run file, data, trunk or output."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    try:
        config = read_config(options.run, options.overrides)
        train = _train()
        result = train(config, base=options.run.parent, command=shlex.join(["python", "-m", "training", *given]))
    except SetupError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    trained = result.trained
    sys.stderr.write(
        f"{result.checkpoint.folder}: {trained.steps} steps, {trained.tokens} tokens in {trained.seconds:.0f} s\n"
    )
    sys.stdout.write(_aligned(result.scores))
    return 0


def _train() -> Callable[..., Result]:
    """The run itself, imported late: it takes seconds, and a wrong run file is said first."""
    try:
        from training.run import train
    except ModuleNotFoundError as error:
        raise MissingExtraError("training", "train") from error
    return train


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description=_HELP.format(keys=", ".join(RunConfig.model_fields)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN.yaml", type=Path, help="the run file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="replaces a key; the value is parsed as YAML")
    return parser


def _aligned(scores: dict[str, Scores]) -> str:
    """The main metric of each task beside its baseline, in columns."""
    lines = table(scores)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
