"""The page as Gradio's blocks: a form a kind, several tasks side by side, and what a choice changes.

It is made once a process, of the kinds and not of the tasks, so that it is the same whatever the server has loaded, and
in every process of it. Which tasks there are is asked when a page is opened, and again by each request; nothing of a
visitor is kept. Only an answer that is read along needs Gradio's queue, which is in one process: with several of them,
answers come whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from mtserve.errors import MtserveError
from mtserve.serve.table import Root, ServedTask
from mtserve.serve.ui import shown
from mtserve.serve.ui.asking import told
from mtserve.serve.ui.kind_form import KindForm, kind_form
from mtserve.serve.ui.parts import QUIET, Outputs, nothing
from mtserve.serve.ui.side_by_side import side_by_side
from mtserve.tasks import KINDS

HEAD = (
    '<header class="top"><h1>mtserve</h1><p>One encoder, every task. '
    '<a href="../docs">Routes and schemas</a></p></header>'
)


def make_page(root: Root, *, streams: bool) -> gr.Blocks:
    """The page over a root; `streams` says whether answers can be read along."""
    with gr.Blocks(title="mtserve", analytics_enabled=False, fill_width=False) as page:
        gr.HTML(HEAD)
        with gr.Tabs():
            with gr.Tab("One task"):
                picker = gr.Radio(label="Task", elem_id="task")
                about = gr.HTML()
                forms = [kind_form(root, picker, kind, streams=streams) for kind in KINDS.values()]
            with gr.Tab("Several tasks, one text"):
                text, several = side_by_side(root)
        columns, inputs = [form.column for form in forms], [one for form in forms for one in form.inputs]
        found = [picker, about, *columns, several, text, *inputs]
        page.load(_loaded(root, forms), None, found, **QUIET)
        picker.input(_picked(root, forms), picker, [about, *columns], **QUIET)
        before = [one for form in forms for one in form.outputs]  # in the browser: nothing may come after an answer
        picker.input(None, None, before, js=f"() => {json.dumps([*nothing()] * len(forms))}", queue=False)
    return page


def _loaded(root: Root, forms: Sequence[KindForm]) -> Callable[[gr.Request], Outputs]:
    """A page opens: its tasks, and a sample in every form; `?task=NAME` names the first to show."""

    def loaded(request: gr.Request) -> Outputs:
        try:
            tasks = root.table().tasks
        except MtserveError as error:
            return gr.skip(), shown.problem(str(error)), *[gr.skip()] * (len(forms) + 2 + _width(forms))
        wanted = request.query_params.get("task", "")
        first = tasks.get(wanted) or next(iter(tasks.values()), None)
        plain = [served for served in tasks.values() if served.task.kind.takes_text]
        chosen = [served.name for served in plain if not served.task.kind.streams]
        names = list(tasks)
        return (
            gr.update(choices=names, value=first.name if first else None),
            *_seen(first, forms),
            gr.update(choices=[served.name for served in plain], value=chosen),
            _text(plain),
            *_samples(list(tasks.values()), forms),
        )

    return loaded


def _picked(root: Root, forms: Sequence[KindForm]) -> Callable[[str], Outputs]:
    def picked(name: str) -> Outputs:
        try:
            return _seen(root.table().task(name), forms)
        except MtserveError as error:
            return shown.problem(told(error)[1]), *[gr.update(visible=False)] * len(forms)

    return picked


def _seen(served: ServedTask | None, forms: Sequence[KindForm]) -> Outputs:
    """What is said of a task, and which form is to be seen."""
    kind = served.task.kind if served else None
    said = shown.about(served) if served else shown.problem("this server has no tasks")
    return said, *[gr.update(visible=form.kind is kind) for form in forms]


def _samples(tasks: Sequence[ServedTask], forms: Sequence[KindForm]) -> list[Any]:
    """Values of all forms: the sample of the first task of each kind."""
    values: list[Any] = []
    for form in forms:
        served = next((one for one in tasks if one.task.kind is form.kind), None)
        values += form.sample(served) if served else [gr.skip()] * len(form.inputs)
    return values


def _text(tasks: Sequence[ServedTask]) -> Any:
    """A text for the tasks that take one."""
    held = [served.example()["inputs"] for served in tasks]
    return next((inputs for inputs in held if isinstance(inputs, str)), gr.skip())


def _width(forms: Sequence[KindForm]) -> int:
    return sum(len(form.inputs) for form in forms)
