"""What benchmarks of generation run on: a causal trunk with a head that generates, and prompts. Measures nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtserve.backends.eager import EagerBackend
from mtserve.checkpoint import Checkpoint
from mtserve.demo.run import STYLE, packaged_trunk
from mtserve.engine import Engine, Task
from mtserve.heads import stock_class
from mtserve.model import Model
from mtserve.tasks import KINDS
from mtserve.tasks.generation import GenerationOptions
from mtserve.text import Text
from mtserve.weights import load_model
from training.trunk import open_trunk

TEXTS = """\
Where did you leave the keys to the house?
I do not think that he will come back before the winter is over.
She told me that her brother was ill, and that nobody had sent for a doctor.
Please be quiet, the children are asleep.
You always say that you will help, and then, when the work begins, you are nowhere to be found.
Why are you so angry with me? I only wanted to know what had happened to your father last night.
The ship left the harbour at dawn, and by noon it was gone.
If you had listened to your mother, you would not be standing here in the rain without a coat, begging for bread.
My friend, I have never seen so beautiful a garden in all my life.
They say the king is dead, but no one knows who killed him or why the gates were open.
Give me your hand, and do not look down.
He ran through the whole town to tell us that the war had ended, and nobody believed him until the bells began to ring \
and the soldiers came home, one by one, thin and silent.
I am tired of waiting for an answer.
What would you do if you were in my place, with no money, no home, and three children to feed?
Nothing is more useful than a good knife and a dry place to sleep.
We should leave now, before they notice that the door is not locked any more.
Tell your master that I will see him tomorrow at noon, and that he should bring the letter which he took from my table.
The old man laughed until he had to sit down.
It was a mistake to trust her with such a secret.
You were right: the bread is better here, but the wine tastes as if someone had kept it in a boot for a year.
Come in and close the door behind you; it is late, and they count everybody who goes in or out after dark.
I remember the day when we first met; you wore a green dress, and you would not speak to me until the music stopped \
and your mother had left the hall.
Nobody asked you what you think of it.
How can I forgive a man who has never said that he was sorry for what he did to my family?
The night is cold and the road is long, so take this blanket and some of the soup.
He loves her, though he would rather die than say it to her face.
There were eleven of them, all armed, and only two of us, with one stick between us and nowhere to hide.
Do you hear that noise behind the wall?
My lord, the guests have been waiting for an hour, and the musicians want to be paid before they play another song; \
shall I tell them that you are ill?
Stay here until I return with the others.
A year ago I had everything that a man could want, and now I sit in this room and count the cracks in the wall.
Who told you that I was going to sell the farm? And what else do they say of me when I am not there to answer?
""".splitlines()


@dataclass(frozen=True)
class Subject:
    """The head is that of a checkpoint's task, with its options, or the trunk's own, which goes on with a text."""

    model: Model
    text: Text
    tokenizer_json: str
    task: str
    options: GenerationOptions

    def engine(self, *others: Task, options: GenerationOptions | None = None) -> Engine:
        """The head under these options, or its own, and other tasks beside it."""
        mine = Task(self.task, KINDS["generation"], options or self.options)
        return Engine([mine, *others], EagerBackend(self.model, pad_id=self.text.spec.pad_id), self.text)

    def with_head(self, name: str, kind: str, **raw: Any) -> Task:
        """A task with a fresh head on the trunk."""
        options = KINDS[kind].options.model_validate(raw)
        self.model.add(name, KINDS[kind].head(options)).eval()
        return Task(name, KINDS[kind], options)

    def stock(self) -> Any:
        """The stock model made of this very trunk and head."""
        auto, config = stock_class(KINDS["generation"].head(self.options), self.model.trunk.config)
        with torch.device("meta"):
            stock = auto.from_config(config)
        setattr(stock, stock.base_model_prefix, self.model.trunk)
        head: Any = self.model.head(self.task)
        for name, module in head.stock.named_children():
            if name != stock.base_model_prefix:
                setattr(stock, name, module)
        left = [name for name, tensor in stock.state_dict(keep_vars=True).items() if tensor.is_meta]
        assert not left, f"{left[0]} belongs neither to the trunk nor to the head"
        return stock.eval()

    def long_text(self, tokens: int) -> str:
        """A text of at least so many tokens."""
        words = " ".join(TEXTS).split() * (1 + tokens // len(TEXTS))
        count = next(n for n in range(1, len(words)) if len(self.text.plain(" ".join(words[:n]))) >= tokens)
        return " ".join(words[:count])


def step_bytes(stock: Any) -> int:
    """What one step must read: all parameters but the tables in which it looks rows up, unless tied to the output."""
    output = stock.get_output_embeddings().weight
    looked_up = {id(module.weight) for module in stock.modules() if isinstance(module, nn.Embedding)} - {id(output)}
    return sum(parameter.nbytes for parameter in stock.parameters() if id(parameter) not in looked_up)


def plain(*, prompt: int = 64, new_tokens: int) -> GenerationOptions:
    """Answers to bare texts, which are cut to `prompt` tokens."""
    return GenerationOptions(template="{source}{target}", max_length=prompt + new_tokens, max_new_tokens=new_tokens)


def open_subject(location: str | None, task: str | None = None) -> Subject:
    """A checkpoint, with the named or its first task of generation, or a trunk; by default the demo's language model.

    Raises as opening them does.
    """
    folder = Path(location) if location else packaged_trunk(STYLE)
    if (folder / "mtserve.json").is_file():
        checkpoint = Checkpoint.open(folder)
        entries = [e for e in checkpoint.manifest.tasks if e.kind == "generation" and task in (None, e.name)]
        if not entries:
            raise SystemExit(f"{folder} has no task of generation" + (f" named {task}" if task else ""))
        options = entries[0].parsed_options
        assert isinstance(options, GenerationOptions)
        model = load_model(checkpoint)
        return Subject(model, checkpoint.text(), checkpoint.tokenizer_json, entries[0].name, options)
    trunk = open_trunk(str(folder), Path.cwd())
    model, options = Model(trunk.model), plain(new_tokens=64)
    model.add("say", KINDS["generation"].head(options))
    return Subject(model.eval(), trunk.text(), trunk.tokenizer_json, "say", options)
