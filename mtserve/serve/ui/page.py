"""The page as Gradio's blocks: a form a kind, side by side, and what happens on a click. Knows no HTTP.

It is made once a process, of the kinds and not of the tasks, so that it is the same whatever the server has loaded, and
in every process of it. Which tasks there are is asked when a page is opened, and again by each request; nothing of a
visitor is kept. Only an answer that is read along needs Gradio's queue, which is in one process: with several of them,
answers come whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from mtserve.errors import MtserveError
from mtserve.serve.examples import curl, python
from mtserve.serve.exchange import opened
from mtserve.serve.table import Root, ServedTask
from mtserve.serve.ui import shown
from mtserve.serve.ui.asking import Body, ask, ask_several, body, read_along, told
from mtserve.serve.ui.forms import Field, fields, read, show
from mtserve.tasks import KINDS
from mtserve.tasks.base import AnyKind

HEAD = (
    '<header class="top"><h1>mtserve</h1><p>One encoder, every task. '
    '<a href="../docs">Routes and schemas</a></p></header>'
)
HINT = shown.hint("The answer comes here.")
STREAM = "Read along"
Outputs = tuple[Any, ...]
_RAW: dict[str, Any] = {"preprocess": False}  # what a visitor sends is for the table and the task to judge
_QUIET: dict[str, Any] = {**_RAW, "queue": False, "show_progress": "hidden"}
_NO_CODE = {"__type__": "update", "visible": False}


@dataclass(frozen=True)
class KindForm:
    """The part of the page for one kind: its fields, in the order of `inputs`, and where answers go."""

    kind: AnyKind
    example: list[Field]
    parameters: list[Field]
    column: gr.Column
    inputs: list[Any]
    outputs: list[Any]

    def body(self, values: Sequence[Any], *, stream: bool) -> Body:
        """The request that the values of the form are. Raises InputError."""
        cut = len(self.example)
        example, parameters = read(self.example, values[:cut]), read(self.parameters, values[cut:])
        return body(self.kind, example, parameters, stream=stream)

    def sample(self, served: ServedTask) -> list[Any]:
        """Values of the form for the task's own sample, and no parameters."""
        held = self.kind.sample(served.task.options).model_dump(mode="json", exclude_none=True)
        return [*show(self.example, held), *show(self.parameters, {})]


def make_page(root: Root, *, streams: bool) -> gr.Blocks:
    """The page over a root; `streams` says whether answers can be read along."""
    with gr.Blocks(title="mtserve", analytics_enabled=False, fill_width=False) as page:
        gr.HTML(HEAD)
        with gr.Tabs():
            with gr.Tab("One task"):
                picker = gr.Radio(label="Task", elem_id="task")
                about = gr.HTML()
                forms = [_kind_form(root, picker, kind, streams=streams) for kind in KINDS.values()]
            with gr.Tab("Several tasks, one text"):
                text, several = _side_by_side(root)
        columns, inputs = [form.column for form in forms], [one for form in forms for one in form.inputs]
        found = [picker, about, *columns, several, text, *inputs]
        page.load(_loaded(root, forms), None, found, **_QUIET)
        picker.input(_picked(root, forms), picker, [about, *columns], **_QUIET)
        before = [one for form in forms for one in form.outputs]  # in the browser: nothing may come after an answer
        picker.input(None, None, before, js=f"() => {json.dumps([*_nothing()] * len(forms))}", queue=False)
    return page


def _nothing() -> Outputs:
    """What a form's outputs are before anything was asked."""
    return HINT, "", _NO_CODE, _NO_CODE


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


def _kind_form(root: Root, picker: Any, kind: AnyKind, *, streams: bool) -> KindForm:
    example, parameters, along = fields(kind.example), fields(kind.parameters), kind.streams and streams
    with gr.Column(visible=False, elem_id=f"form-{kind.name}") as column:
        with gr.Row(elem_classes="ask"):
            with gr.Column(min_width=300):
                inputs = [_component(field) for field in example]
                if parameters:
                    with gr.Accordion("Parameters", open=False):
                        inputs += [_component(field) for field in parameters]
                flag = (
                    [gr.Checkbox(value=True, label=STREAM, info="Token by token, by server-sent events.")]
                    if along
                    else []
                )
                with gr.Row():
                    sample = gr.Button("Example", min_width=90)
                    stop = [gr.Button("Stop", variant="stop", min_width=90)] if along else []
                    run = gr.Button("Run", variant="primary", min_width=90)
            with gr.Column(min_width=300):
                answer = gr.HTML(HINT, elem_classes="out", min_height=150)
                facts = gr.HTML()
        outputs = [answer, facts, *_code("curl", "Python")]
    form = KindForm(kind, example, parameters, column, inputs, outputs)
    again = "once" if along else "always_last"  # a click meanwhile is not lost
    asked = {
        **_RAW,
        "trigger_mode": again,
        "inputs": [picker, *flag, *inputs],
        "outputs": outputs,
        "queue": along,
        "show_progress": "minimal",
    }
    began = [run.click, *[one.submit for one in inputs if isinstance(one, gr.Textbox)]]
    event = gr.on(began, _growing(root, form) if along else _whole(root, form), **asked)
    for one in stop:
        one.click(None, cancels=[event], queue=False)
    sample.click(_sampled(root, form), picker, inputs, **_QUIET)
    return form


def _component(field: Field) -> Any:
    """The part of a form for a field."""
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
            return gr.Textbox(lines=2 if field.required else 1, **about)


def _code(*names: str) -> list[gr.Code]:
    """Where the same request is to be copied from; seen once there is one."""
    how: dict[str, Any] = {"interactive": False, "lines": 1, "visible": False, "wrap_lines": True}
    how["show_line_numbers"] = False
    language = {"curl": "shell", "Python": "python"}
    return [gr.Code(label=name, language=language[name], **how) for name in names]


def _said(code: str) -> Any:
    return gr.update(value=code, visible=True)


def _sampled(root: Root, form: KindForm) -> Callable[[str], Any]:
    def sampled(name: str) -> Any:
        served = root.table().tasks.get(name)
        found = form.sample(served) if served else [gr.skip()] * len(form.inputs)
        return found if len(found) > 1 else found[0]

    return sampled


def _failed(error: Exception, *kept: Any) -> Outputs:
    code, sentence = told(error)
    return shown.problem(sentence, code=code), "", *kept


def _snippets(root: Root, request: gr.Request, name: str, asked: Body) -> Outputs:
    """The request as people type it; a key is never in it."""
    table = root.table()
    url, keys = _address(request), bool(table.keys)
    served = table.task(name)
    return (
        _said(curl(url + served.url, asked, keys=keys)),
        _said(python(url, served.name, asked, keys=keys)),
    )


def _address(request: gr.Request) -> str:
    """The server's, as the browser has it."""
    return str(request.request.base_url).rstrip("/").removesuffix("/ui")


def _whole(root: Root, form: KindForm) -> Callable[..., Any]:
    async def run(request: gr.Request, name: str, *values: Any) -> Outputs:
        code: Outputs = _NO_CODE, _NO_CODE
        try:
            asked = form.body(values, stream=False)
            code = _snippets(root, request, name, asked)
            found = await ask(root, name, asked)
            looks = shown.answered(found.prediction, asked["inputs"], found.served, joined=found.joined)
            return looks, shown.usage(found.usage.as_dict()), *code
        except Exception as error:
            return _failed(error, *code)

    return run


def _growing(root: Root, form: KindForm) -> Callable[..., AsyncIterator[Outputs]]:
    whole = _whole(root, form)

    async def run(request: gr.Request, name: str, stream: Any, *values: Any) -> AsyncIterator[Outputs]:
        opened("")  # the queue's own context has that of some earlier request
        if not stream:
            yield await whole(request, name, *values)
            return
        code: Outputs = _NO_CODE, _NO_CODE
        try:
            asked = form.body(values, stream=True)
            code = _snippets(root, request, name, asked)
            async with aclosing(_written(root, name, asked)) as pieces:
                async for piece in pieces:
                    yield *piece, *code
        except Exception as error:
            yield _failed(error, *code)

    return run


async def _written(root: Root, name: str, asked: Body) -> AsyncGenerator[tuple[str, str], None]:
    """Text and facts as an answer grows."""
    began, text, first = time.perf_counter(), "", 0.0
    async with aclosing(read_along(root, name, asked)) as events:
        async for event in events:
            now = 1000 * (time.perf_counter() - began)
            first, text = first or now, text + event["token"]["text"]
            said = [f"{event['index']} tokens", f"first after {first:.0f} ms", f"total {now:.0f} ms"]
            whole = event.get("generated_text")
            if whole is not None:
                said.append(f"ended by {event['details']['finish_reason']}")
            yield shown.written(text if whole is None else whole, growing=whole is None), shown.facts(said)


def _side_by_side(root: Root) -> tuple[Any, Any]:
    with gr.Row(elem_classes="ask"):
        with gr.Column(min_width=300):
            text = gr.Textbox(label="Text", lines=3, elem_id="shared-text")
        with gr.Column(min_width=300):
            several = gr.CheckboxGroup(label="Tasks", elem_id="tasks", info="Those that take a text alone.")
            run = gr.Button("Run all", variant="primary")
    facts, answers = gr.HTML(), gr.HTML(HINT, elem_classes="out", min_height=150)
    outputs = [answers, facts, *_code("curl")]
    gr.on(
        [run.click, text.submit],
        _together(root),
        [text, several],
        outputs,
        queue=False,
        show_progress="minimal",
        **_RAW,
    )
    return text, several


def _together(root: Root) -> Callable[..., Any]:
    async def run(request: gr.Request, text: str, names: list[str]) -> Outputs:
        code = _NO_CODE
        try:
            asked = {"inputs": [text], "tasks": names}
            code = _said(curl(_address(request) + "/predict", asked, keys=bool(root.table().keys)))
            outputs, usage, tasks = await ask_several(root, asked)
            return shown.side_by_side(outputs, text, tasks), shown.usage(usage.as_dict()), code
        except Exception as error:
            return _failed(error, code)

    return run
