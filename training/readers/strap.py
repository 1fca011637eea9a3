"""The layout of style-transfer-paraphrase (Krishna et al., 2020): styled lines, their styles, neutral paraphrases."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from mtserve.errors import ConfigError
from training.readers.lines import read_aligned
from training.readers.record import BadRecord, Files, Record, Records
from training.section import Section

NEUTRAL = "translate"
"""The third class of the style task: that of the paraphrases."""


class StrapOptions(Section):
    """Pairs into one `style`, or every line with its style."""

    view: Literal["translate", "style"] = "translate"
    style: str | None = None

    @model_validator(mode="after")
    def _style_of_pairs(self) -> StrapOptions:
        if (self.view == "translate") != (self.style is not None):
            raise ValueError("view translate needs a style (a label of the data); view style takes all of them")
        return self


def strap_files(folder: Path, split: str, options: StrapOptions) -> tuple[Path, ...]:
    """Lines, labels and paraphrases of a split; the style view does without paraphrases where there are none."""
    paths = [folder / f"{split}.{end}" for end in ("input0.txt", "label", "paraphrase_250_input0.txt")]
    return tuple(paths if options.view == "translate" or paths[2].is_file() else paths[:2])


def read_strap(files: Files, options: StrapOptions) -> Records:
    """Records of text (the paraphrase) and target (the line) for lines of the style; or of text and label, for each
    line and, as class `translate`, each paraphrase. `pair` counts lines.

    Raises ConfigError at the end where no line has the style.
    """
    styles: set[str] = set()
    for row in read_aligned(files.paths, files.encoding):
        if isinstance(row, BadRecord):
            yield row
            continue
        number, (line, label, *neutral) = row
        styles.add(label)
        where = f"{files.path.name}:{number}"
        if options.view == "style":
            yield Record(where, {"text": line, "label": label, "pair": number})
            for text in neutral:
                yield Record(f"{files.paths[2].name}:{number}", {"text": text, "label": NEUTRAL, "pair": number})
        elif label == options.style:
            yield Record(where, {"text": neutral[0], "target": line, "pair": number})
    if options.style is not None and styles and options.style not in styles:
        found = ", ".join(sorted(styles)[:9])
        raise ConfigError(f"{files.paths[1].name} has no style {options.style!r}; found {found}")
