"""Several tasks on one text: their part of the page, and what happens when somebody asks. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from mtserve.serve.examples import curl
from mtserve.serve.table import Root
from mtserve.serve.ui import shown
from mtserve.serve.ui.asking import ask_several
from mtserve.serve.ui.parts import HINT, NO_CODE, RAW, Outputs, address, code_boxes, copied, failed


def side_by_side(root: Root) -> tuple[Any, Any]:
    with gr.Row(elem_classes="ask"):
        with gr.Column(min_width=300):
            text = gr.Textbox(label="Text", lines=3, elem_id="shared-text")
        with gr.Column(min_width=300):
            several = gr.CheckboxGroup(label="Tasks", elem_id="tasks", info="Those that take a text alone.")
            run = gr.Button("Run all", variant="primary")
    facts, answers = gr.HTML(), gr.HTML(HINT, elem_classes="out", min_height=150)
    outputs = [answers, facts, *code_boxes("curl")]
    gr.on(
        [run.click, text.submit],
        _together(root),
        [text, several],
        outputs,
        queue=False,
        show_progress="minimal",
        **RAW,
    )
    return text, several


def _together(root: Root) -> Callable[..., Any]:
    async def run(request: gr.Request, text: str, names: list[str]) -> Outputs:
        code = NO_CODE
        try:
            asked = {"inputs": [text], "tasks": names}
            code = copied(curl(address(request) + "/predict", asked, keys=bool(root.table().keys)))
            outputs, usage, tasks = await ask_several(root, asked)
            return shown.side_by_side(outputs, text, tasks), shown.usage(usage.as_dict()), code
        except Exception as error:
            return failed(error, code)

    return run
