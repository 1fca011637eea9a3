"""Predictions as HTML: bars for scores, marks for spans, text for text, and JSON for all else. Pure; knows no Gradio.

What a prediction looks like follows from its shape, so a kind that is added later is shown as its answers' shape says.
Whatever comes from a request, a label or a model is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mtserve.serve.table import ServedTask

_COLOURS = 8
_MOST_BARS = 24


def answered(prediction: Any, inputs: Any, served: ServedTask, *, joined: Any) -> str:
    """One prediction for one input; folded beneath, the JSON that the route `joined` it to."""
    looks = _shown(prediction, inputs, served)
    said = escape(json.dumps(joined, ensure_ascii=False, indent=2))
    opened = "" if looks else " open"
    folded = f"<details{opened}><summary>Answer as JSON</summary><pre>{said}</pre></details>"
    return f'<div class="answer">{looks}{folded}</div>'


def _shown(answer: Any, inputs: Any, served: ServedTask) -> str:
    if isinstance(answer, Mapping) and set(answer) == {"score"}:
        options = served.task.options.model_dump()
        return _scale(answer["score"], low=options.get("low", 0.0), high=options.get("high", 1.0))
    if not isinstance(answer, list) or not all(isinstance(one, Mapping) for one in answer):
        return ""
    if not answer:
        return '<p class="quiet">Nothing was found.</p>'
    if all({"start", "end"} <= set(one) for one in answer):
        return _marks(answer, _text(inputs))
    if all("generated_text" in one for one in answer):
        return "".join(_generated(one) for one in answer)
    if all("score" in one and {"label", "choice"} & set(one) for one in answer):
        return _bars([(str(one.get("choice", one.get("label"))), one["score"]) for one in answer])
    return ""


def _text(inputs: Any) -> str:
    """The text that offsets of an answer count in."""
    if isinstance(inputs, Mapping):
        return str(inputs.get("text") or " ".join(inputs.get("words") or ()))
    return str(inputs)


def _bars(scores: Sequence[tuple[str, float]]) -> str:
    """A bar a score; of scores beyond 0 to 1, the longest is the highest."""
    values = [score for _, score in scores]
    low, high = min(0.0, *values), max(1.0, *values)
    rows = [
        f'<li><span class="name">{escape(name)}</span><span class="value">{score:.3f}</span>'
        f'<span class="track"><span style="width:{100 * (score - low) / (high - low):.1f}%"></span></span></li>'
        for name, score in scores[:_MOST_BARS]
    ]
    left = len(scores) - len(rows)
    more = f'<p class="quiet">and {left} more</p>' if left else ""
    return f'<ol class="bars">{"".join(rows)}</ol>{more}'


def _scale(score: float, *, low: float, high: float) -> str:
    share = 100 * min(1.0, max(0.0, (score - low) / (high - low)))
    return (
        f'<p class="score">{score:.3f}</p><div class="scale"><span class="track"><span style="width:{share:.1f}%">'
        f"</span></span><span>{low:g}</span><span>{high:g}</span></div>"
    )


def _marks(spans: Sequence[Mapping[str, Any]], text: str) -> str:
    """The text with its spans marked, each label in a colour of its own; a span inside another one is left out."""
    labels: dict[str, int] = {}
    parts, at = [], 0
    for span in sorted(spans, key=lambda one: (one["start"], -one["end"])):
        if span["start"] < at:
            continue
        label = str(span.get("entity_group", span.get("entity", span.get("label", ""))))
        colour = labels.setdefault(label, len(labels)) % _COLOURS
        said = escape(label) + (f" {span['score']:.2f}" if "score" in span else "")
        inside = escape(text[span["start"] : span["end"]])
        parts += [escape(text[at : span["start"]]), f'<mark class="c{colour}">{inside}<small>{said}</small></mark>']
        at = span["end"]
    return f'<p class="marked">{"".join(parts)}{escape(text[at:])}</p>'


def _generated(one: Mapping[str, Any]) -> str:
    facts = [f"ended by {one['finish_reason']}"] if "finish_reason" in one else []
    facts += [f"score {one['score']:.3f}"] if "score" in one else []
    return written(str(one["generated_text"])) + f'<p class="quiet">{escape(", ".join(facts))}</p>'


def written(text: str, *, growing: bool = False) -> str:
    """Generated text; with a caret while it grows."""
    return f'<p class="written">{escape(text)}{"<i></i>" if growing else ""}</p>'


def side_by_side(outputs: Mapping[str, Sequence[Any]], text: str, tasks: Mapping[str, ServedTask]) -> str:
    """A card a task."""
    cards = [
        f"<section><h3>{escape(name)} <small>{escape(tasks[name].task.kind.name)}</small></h3>"
        f"{answered(given[0], text, tasks[name], joined=given[0])}</section>"
        for name, given in outputs.items()
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def problem(message: str, *, code: str = "") -> str:
    """An error's own sentence."""
    said = f"<strong>{escape(code)}</strong> " if code else ""
    return f'<div class="problem" role="alert">{said}{escape(message)}</div>'


def usage(found: Mapping[str, Any]) -> str:
    """What a request cost: `Usage.as_dict()`."""
    times = [(name.removesuffix("_time_ms"), value) for name, value in found.items() if name.endswith("_time_ms")]
    said = [
        _count(found["tokens"], "token"),
        _count(found["trunk_passes"], "trunk pass", "trunk passes"),
        *(f"{name} {value:.1f} ms" for name, value in times),
    ]
    if found["truncated"]:
        said.append("some text was cut")
    return facts(said)


def facts(said: Sequence[str]) -> str:
    """Short facts in a row."""
    return f'<ul class="facts">{"".join(f"<li>{escape(one)}</li>" for one in said)}</ul>' if said else ""


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"


def about(served: ServedTask) -> str:
    """A line on a task: its kind, its trunk, its metric and its labels."""
    kind, trunk = served.task.kind, served.trunk
    labels, metric = kind.label_names(served.task.options), served.task.metrics.get(kind.metric)
    said = [
        kind.name.replace("_", " "),
        f"{trunk.entry.family} in {trunk.in_force.profile} on {trunk.in_force.hardware.device}",
        *([f"{kind.metric} {metric:.3f} held out"] if isinstance(metric, float) else []),
        *([f"labels: {', '.join(labels)}"] if labels else []),
    ]
    return f'<p class="quiet">{" · ".join(map(escape, said))}</p>'


def hint(sentence: str) -> str:
    """What stands where an answer will be."""
    return f'<p class="quiet">{escape(sentence)}</p>'
