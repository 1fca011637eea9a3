"""Text cleaning that training and serving share, as a list of named steps in the manifest. Knows no tokenizer.

The list is empty in this version; a checkpoint that names a step which this version does not have is refused, so
that text is never encoded in another way than the trunk was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mtserve.errors import CheckpointError

STEPS: Mapping[str, Callable[[str], str]] = {}


def check_steps(steps: Sequence[str]) -> None:
    """Raise CheckpointError for the first step that this version cannot do."""
    for step in steps:
        if step not in STEPS:
            known = ", ".join(sorted(STEPS)) or "none"
            raise CheckpointError(f"text preparation step {step!r} is unknown to this version (known: {known})")
