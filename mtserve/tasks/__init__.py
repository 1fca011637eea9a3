"""The kinds of task, by name. Adding one is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from mtserve.tasks.base import AnyKind
from mtserve.tasks.classification import Classification
from mtserve.tasks.generation import Generation
from mtserve.tasks.multiple_choice import MultipleChoice
from mtserve.tasks.similarity import Similarity
from mtserve.tasks.token_classification import TokenClassification

KINDS: Mapping[str, AnyKind] = {
    "classification": Classification(),
    "similarity": Similarity(),
    "multiple_choice": MultipleChoice(),
    "token_classification": TokenClassification(),
    "generation": Generation(),
}

__all__ = ["KINDS", "AnyKind"]
