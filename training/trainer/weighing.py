"""How a task's training weighs errors: checked loss terms, and class weights from the training targets. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from mtserve.errors import ConfigError
from mtserve.tasks.base import IGNORED, AnyKind, LossTerms, Options

ClassWeights = Literal["balanced"] | Mapping[str, float] | None


def loss_terms(
    kind: AnyKind,
    options: Options,
    *,
    targets: Iterable[Any],
    label_smoothing: float = 0.0,
    class_weights: ClassWeights = None,
    r_drop: float = 0.0,
) -> LossTerms:
    """The terms of a task; `targets` are those of its training split, as `Kind.features` makes them.

    Raises ConfigError for a term that the kind's loss cannot use, a share outside [0, 1), and an unknown class.
    """
    asked = {
        "label_smoothing": bool(label_smoothing),
        "class_weights": class_weights is not None,
        "r_drop": bool(r_drop),
    }
    for name in asked:
        if asked[name] and name not in kind.loss_terms:
            allowed = ", ".join(sorted(kind.loss_terms)) or "none"
            raise ConfigError(f"{name}: the loss of {kind.name} cannot use it; it can use: {allowed}")
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing must be at least 0 and less than 1; found {label_smoothing}")
    weights = weights_of_classes(class_weights, kind.head(options).labels, targets=targets)
    return LossTerms(label_smoothing, weights, r_drop)


def weights_of_classes(
    wanted: ClassWeights, names: tuple[str, ...], *, targets: Iterable[Any]
) -> tuple[float, ...] | None:
    """A weight for each of the head's outputs, in their order; classes that a mapping leaves out weigh 1.

    `balanced` is n / (classes * count), with n the number of all targets (King and Zeng, 2001; as in scikit-learn):
    targets of a task of many labels are its positive ones, of a token task the tags of words. A class without a
    target is not counted among the classes, and weighs 1. Raises ConfigError for an unknown name and a weight that is
    not positive.
    """
    if wanted is None:
        return None
    if wanted == "balanced":
        counts = _counts(targets, len(names))
        share = counts.sum() / max(np.count_nonzero(counts), 1)
        return tuple(float(share / count) if count else 1.0 for count in counts)
    for name, weight in wanted.items():
        if name not in names:
            raise ConfigError(f"class_weights: unknown class {name!r}; allowed: {', '.join(names)}")
        if not 0 < weight < float("inf"):
            raise ConfigError(f"class_weights.{name} must be a positive number; found {weight}")
    return tuple(float(wanted.get(name, 1.0)) for name in names)


def _counts(targets: Iterable[Any], classes: int) -> Any:
    """(classes,) how many targets each class has. A target is an index, 0.0 or 1.0 for each class, or one array of
    indexes a row."""
    counts = np.zeros(classes)
    for target in targets:
        for array in map(np.asarray, target if isinstance(target, list) else [target]):
            if array.dtype.kind == "f":
                counts += array
            else:
                counts += np.bincount(array[array != IGNORED].ravel(), minlength=classes)
    return counts
