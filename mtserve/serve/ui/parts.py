"""Parts of the page that its forms share: a field's component, boxes to copy code from, and what stands there before an
answer or instead of one. Knows no task.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from mtserve.serve.ui import PATH, shown
from mtserve.serve.ui.asking import told
from mtserve.serve.ui.forms import Field

HINT = shown.hint("The answer comes here.")
Outputs = tuple[Any, ...]
RAW: dict[str, Any] = {"preprocess": False}  # what a visitor sends is for the table and the task to judge
QUIET: dict[str, Any] = {**RAW, "queue": False, "show_progress": "hidden"}
NO_CODE = {"__type__": "update", "visible": False}


def nothing() -> Outputs:
    """What a form's outputs are before anything was asked."""
    return HINT, "", NO_CODE, NO_CODE


def component(field: Field, *, lines: int = 1) -> Any:
    """The part of a form for a field; a text has room for so many lines."""
    about = {"label": field.label, "info": field.about or None}
    match field.shape:
        case "flag":
            return gr.Checkbox(value=bool(field.default), **about)
        case "choice":
            kept = [] if field.required or field.default is not None else [("as the task has it", "")]
            said = {True: "yes", False: "no"}
            choices = [*kept, *((said[one] if isinstance(one, bool) else str(one), one) for one in field.choices)]
            return gr.Dropdown(choices, value=field.default if field.default is not None else choices[0][1], **about)
        case "number" | "integer":
            return gr.Number(field.default, **about)
        case "lines":
            return gr.Textbox(lines=3, **about)
        case _:
            return gr.Textbox(lines=lines, **about)


def code_boxes(*names: str) -> list[gr.Code]:
    """Where the same request is to be copied from; seen once there is one."""
    how: dict[str, Any] = {"interactive": False, "lines": 1, "visible": False, "wrap_lines": True}
    how["show_line_numbers"] = False
    language = {"curl": "shell", "Python": "python"}
    return [gr.Code(label=name, language=language[name], **how) for name in names]


def copied(code: str) -> Any:
    return gr.update(value=code, visible=True)


def failed(error: Exception, *kept: Any) -> Outputs:
    code, sentence = told(error)
    return shown.problem(sentence, code=code), "", *kept


def address(request: gr.Request) -> str:
    """The server's, as the browser has it."""
    return str(request.request.base_url).rstrip("/").removesuffix(PATH)
