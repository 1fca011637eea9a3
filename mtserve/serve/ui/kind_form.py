"""The form of a kind: its part of the page, and what happens when somebody asks by it. Knows no HTTP.

A form is made of the kind alone. The task, and whether it is still there, is found when it is asked.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from mtserve.serve.examples import curl, python
from mtserve.serve.exchange import opened
from mtserve.serve.table import Root, ServedTask
from mtserve.serve.ui import shown
from mtserve.serve.ui.asking import Body, ask, body, read_along
from mtserve.serve.ui.forms import Field, fields, read, show
from mtserve.serve.ui.parts import HINT, NO_CODE, QUIET, RAW, Outputs, address, code_boxes, component, copied, failed
from mtserve.tasks.base import AnyKind


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


def kind_form(root: Root, picker: Any, kind: AnyKind, *, streams: bool) -> KindForm:
    example, parameters, along = fields(kind.example), fields(kind.parameters), kind.streams and streams
    with gr.Column(visible=False, elem_id=f"form-{kind.name}") as column:
        with gr.Row(elem_classes="ask"):
            with gr.Column(min_width=300):
                inputs = [component(field, lines=2) for field in example]
                if parameters:
                    with gr.Accordion("Parameters", open=False):
                        inputs += [component(field) for field in parameters]
                flag = [gr.Checkbox(value=True, label="Read along", info="Token by token.")] if along else []
                with gr.Row():
                    sample = gr.Button("Example", min_width=90)
                    stop = [gr.Button("Stop", variant="stop", min_width=90)] if along else []
                    run = gr.Button("Run", variant="primary", min_width=90)
            with gr.Column(min_width=300):
                answer = gr.HTML(HINT, elem_classes="out", min_height=150)
                facts = gr.HTML()
        outputs = [answer, facts, *code_boxes("curl", "Python")]
    form = KindForm(kind, example, parameters, column, inputs, outputs)
    again = "once" if along else "always_last"  # a click meanwhile is not lost
    asked = gr.on(
        [run.click, *[one.submit for one in inputs if isinstance(one, gr.Textbox)]],
        _growing(root, form) if along else _whole(root, form),
        [picker, *flag, *inputs],
        outputs,
        queue=along,
        trigger_mode=again,
        show_progress="minimal",
        **RAW,
    )
    for one in stop:
        one.click(None, cancels=[asked], queue=False)
    sample.click(_sampled(root, form), picker, inputs, **QUIET)
    return form


def _sampled(root: Root, form: KindForm) -> Callable[[str], Any]:
    def sampled(name: str) -> Any:
        served = root.table().tasks.get(name)
        found = form.sample(served) if served else [gr.skip()] * len(form.inputs)
        return found if len(found) > 1 else found[0]

    return sampled


def _snippets(root: Root, request: gr.Request, name: str, asked: Body) -> Outputs:
    """The request as people type it; a key is never in it."""
    table = root.table()
    url, keys = address(request), bool(table.keys)
    served = table.task(name)
    return (
        copied(curl(url + served.url, asked, keys=keys)),
        copied(python(url, served.name, asked, keys=keys)),
    )


def _whole(root: Root, form: KindForm) -> Callable[..., Any]:
    async def run(request: gr.Request, name: str, *values: Any) -> Outputs:
        code: Outputs = NO_CODE, NO_CODE
        try:
            asked = form.body(values, stream=False)
            code = _snippets(root, request, name, asked)
            found = await ask(root, name, asked)
            looks = shown.answered(found.prediction, asked["inputs"], found.served, joined=found.joined)
            return looks, shown.usage(found.usage.as_dict()), *code
        except Exception as error:
            return failed(error, *code)

    return run


def _growing(root: Root, form: KindForm) -> Callable[..., AsyncIterator[Outputs]]:
    whole = _whole(root, form)

    async def run(request: gr.Request, name: str, stream: Any, *values: Any) -> AsyncIterator[Outputs]:
        opened("")  # the queue's own context has that of some earlier request
        if not stream:
            yield await whole(request, name, *values)
            return
        code: Outputs = NO_CODE, NO_CODE
        try:
            asked = form.body(values, stream=True)
            code = _snippets(root, request, name, asked)
            async with aclosing(_written(root, name, asked)) as pieces:
                async for piece in pieces:
                    yield *piece, *code
        except Exception as error:
            yield failed(error, *code)

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
