"""The recipes that ship: each of them parsed in every form, and run from end to end on a few records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2Model

import mtserve
from mtserve.preparation import PRESETS
from mtserve.text import Text
from tests.shared_data import DATA, ROOT, needs_data
from tests.tiny import FAMILIES, TOKENIZER_JSON
from tests.training.test_arabic import write_arabert
from training.__main__ import main
from training.config import Carve, RunConfig
from training.data.records import read_records
from training.data.splits import carve
from training.run import Result, train
from training.runfile import RECIPES, find, read_config

FORMS = {
    "arabic_hotels": ("hub", "data_dir", "tune"),
    "arabic_ner": ("hub", "data_dir", "tune"),
    "continue_pretraining": ("hub", "data_dir"),
    "glue_trio": ("hub", "data_dir", "tune"),
    "shakespeare": ("strap", "local", "judge"),
}
STRAP = ROOT / "tests" / "fixtures" / "strap"
QUICK = ("training.max_steps=3", "resamples=20", "calibration_rows=4", "golden_rows=1", "training.logging_steps=1")
WORDS = "the parcel arrived two days late but the support team was kind and a man is feeding his dog".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with room for the recipes' lengths, and a mask token."""
    folder = tmp_path_factory.mktemp("trunk") / "tiny-english"
    tokenizer = Tokenizer.from_str(TOKENIZER_JSON)
    tokenizer.add_special_tokens(["[MASK]"])
    torch.manual_seed(0)
    sizes = {**FAMILIES["bert"], "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 512}
    BertModel(BertConfig(**sizes)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def arabic(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random BERT with AraBERT's vocabulary in a folder of that name."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = write_arabert(tmp_path_factory.mktemp("trunk") / name)
        return made[name]

    return folder


def run(recipe: str, output: Path, *changes: str) -> Result:
    """What `python -m training RECIPE changes…` does."""
    path = find(recipe)
    found = train(read_config(path, [f"output={output}", *QUICK, *changes]), base=path.parent, command="a test")
    assert found is not None
    return found


def served(result: Result) -> Any:
    """The sealed checkpoint as a caller loads it; it gives the answers of the engine that trained it."""
    engine = mtserve.load(result.folder)
    assert set(engine.tasks) == set(result.scores)
    for name, task in engine.tasks.items():
        asked = [task.kind.sample(task.options)]
        assert engine.predict(name, asked) == result.engine.predict(name, asked)
    return engine


def sizes(result: Result) -> dict[str, tuple[int, ...]]:
    """Examples of each split of each task, as the manifest says."""
    data = result.checkpoint.manifest.provenance["data"]
    return {name: tuple(split["rows"] for split in splits.values()) for name, splits in data.items()}


def config(recipe: str, form: str) -> RunConfig:
    return read_config(find(recipe), [f"form={form}"])


def test_these_are_the_recipes() -> None:
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == sorted(FORMS)


@pytest.mark.parametrize(("recipe", "form"), [(recipe, form) for recipe, forms in FORMS.items() for form in forms])
def test_every_form_parses_and_says_what_it_is(recipe: str, form: str) -> None:
    found = config(recipe, form)
    assert found.seed == 0
    own = {("shakespeare", "local"): 2e-4, ("shakespeare", "judge"): 1e-4}  # no write-up's: small trunks
    small = ("arabic_hotels", "arabic_ner")
    own |= {(name, form): 1e-4 for name in small for form in ("data_dir", "tune")}
    assert found.training.learning_rate == own.get((recipe, form)) or found.training.learning_rate < 1e-4
    text = find(recipe).read_text(encoding="utf-8")
    assert f"python -m training {recipe}" in text
    documented = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert f"`{recipe}`" in documented
    assert found.trunk.split("/")[-1] in documented


def test_a_data_dir_chooses_its_form() -> None:
    assert read_config(find("glue_trio"), ["data_dir=anywhere"]).trunk.endswith("MiniLM-L6-v2")
    assert config("glue_trio", "hub").trunk == "FacebookAI/roberta-base"
    assert read_config(find("shakespeare"), ["data_dir=anywhere"]).tasks["to_original"].train.format == "parallel"
    assert read_config(find("shakespeare"), ["data_dir=anywhere", "form=strap"]).tasks["style"].train.format == "strap"


def test_the_shakespeare_recipe_is_the_notebooks() -> None:
    made = config("shakespeare", "strap").training
    assert (made.learning_rate, made.epochs, made.optimizer, made.scheduler) == (1e-5, 3, "adafactor", "linear")
    assert (made.batch_size, made.gradient_accumulation) == (2, 32)
    assert config("shakespeare", "strap").trunk == "openai-community/gpt2-large"
    assert list(config("shakespeare", "strap").special_tokens.values()) == ["<bos>", "<eos>", "<pad>", "<cls>"]


@needs_data
def test_glue_trio_on_files(tmp_path: Path, english: Path) -> None:
    result = run("glue_trio", tmp_path / "out", f"data_dir={DATA}", f"trunk={english}", "limit=60")
    assert set(served(result).tasks) == {"stsb", "rte", "commonsenseqa"}
    assert sizes(result) == {"stsb": (60, 60), "rte": (54, 6), "commonsenseqa": (54, 6)}
    assert result.engine.task("rte").options.labels == ("entailment", "not_entailment")


def test_glue_trio_on_data_sets_with_the_hubs_columns(tmp_path: Path, english: Path) -> None:
    pairs = {"sentence1": WORDS[:6], "sentence2": WORDS[6:12], "idx": list(range(6))}
    classes = datasets.ClassLabel(names=["entailment", "not_entailment"])
    rte = datasets.Dataset.from_dict({**pairs, "label": [0, 1] * 3}).cast_column("label", classes)
    choices = [{"label": list("ABCDE"), "text": WORDS[at : at + 5]} for at in range(6)]
    asked = {"id": WORDS[:6], "question": WORDS[:6], "question_concept": WORDS[:6], "choices": choices}
    tables = {
        "stsb": datasets.Dataset.from_dict({**pairs, "label": [0.0, 1.5, 2.0, 3.2, 4.0, 5.0]}),
        "rte": rte,
        "commonsenseqa": datasets.Dataset.from_dict({**asked, "answerKey": list("ABCDEA")}),
    }
    changes = [f"trunk={english}"]
    for name, table in tables.items():
        for split in ("train", "validation"):
            table.to_parquet(tmp_path / name / f"{split}.parquet")
        which = "train.config=null", "eval.config=null"
        changes += [f"tasks.{name}.{part}" for part in (f"train.hub={tmp_path / name}", f"eval.hub={tmp_path / name}")]
        changes += [f"tasks.{name}.{part}" for part in which if name != "commonsenseqa"]
    result = run("glue_trio", tmp_path / "out", *changes)
    assert sizes(result) == {"stsb": (6, 6), "rte": (6, 6), "commonsenseqa": (6, 6)}
    assert result.engine.task("rte").options.labels == ("entailment", "not_entailment")
    served(result)


SHORT = [f"tasks.{task}.options.max_length=64" for task in ("to_original", "to_modern", "style")]
SHORT += [f"tasks.{task}.options.max_new_tokens=12" for task in ("to_original", "to_modern")]


def test_shakespeare_from_paraphrases(tmp_path: Path, trunk_folder: Callable[[str], Path]) -> None:
    """Both directions and the three classes on one GPT-2 with the notebook's four special tokens."""
    trunk = trunk_folder("gpt2")
    result = run("shakespeare", tmp_path / "out", "form=strap", f"data_dir={STRAP}", f"trunk={trunk}", *SHORT)
    assert sizes(result) == {"to_original": (5, 2, 2), "to_modern": (5, 2, 2), "style": (20, 8, 8)}
    engine = served(result)
    assert engine.task("style").options.labels == ("modern", "original", "translate")
    assert engine.task("style").options.pooling == "last"
    assert result.scores["style"].baseline["accuracy"] == 0.5
    assert set(result.test) == {"to_original", "to_modern", "style"}
    (ranked,) = engine.predict("best_original", ["one two"])
    assert len(ranked) == 8
    assert {one["label"] for candidate in ranked for one in candidate["then"]} <= {"original"}
    text, old = engine.text, Text(TOKENIZER_JSON, result.engine.text.spec)
    added = [text.literal(token)[0] for token in ("<bos>", "<eos>", "<pad>", "<cls>")]
    assert added == list(range(old.vocab_size, old.vocab_size + 4))
    assert (text.spec.eos_id, text.spec.pad_id) == (added[1], added[2])
    (translated,) = engine.prepare_all("to_original", ["one <bos> two"])
    assert translated.prompt[0].ids[-1] == added[0]
    assert translated.prompt[0].ids.tolist().count(added[0]) == 1, "special tokens inside a caller's text are text"
    (classified,) = engine.prepare_all("style", ["one two"])
    assert classified.prompt[0].ids[-1] == added[3]
    assert result.checkpoint.manifest.trunk.parameters == sum(
        p.numel() for p in AutoModel.from_pretrained(result.folder / "trunk").parameters()
    )


@needs_data
def test_shakespeare_from_paraphrases_on_gpt2s_own_vocabulary(tmp_path: Path) -> None:
    """The ids that the notebook prints: 50257 to 50260."""
    trunk = tmp_path / "gpt2"
    torch.manual_seed(0)
    GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2)).save_pretrained(trunk)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(DATA / "tokenizers" / "gpt2" / name, trunk / name)
    result = run("shakespeare", tmp_path / "out", "form=strap", f"data_dir={STRAP}", f"trunk={trunk}")
    text = served(result).text
    assert [text.literal(f"<{name}>") for name in ("bos", "eos", "pad", "cls")] == [[50257], [50258], [50259], [50260]]


@needs_data
def test_shakespeare_from_aligned_text(tmp_path: Path, english: Path, trunk_folder: Callable[[str], Path]) -> None:
    """The judge, then the translator with it and with the untrained trunk beside."""
    data = (f"data_dir={DATA}", "limit=60")
    judge = run("shakespeare", tmp_path / "judge", "form=judge", f"trunk={english}", *data)
    assert served(judge).task("style").options.labels == ("modern", "original")
    ends = [f"tasks.{task}.options.template='{{source}} [SEP]{{target}}'" for task in ("to_original", "to_modern")]
    changes = [*data, *SHORT, *ends, f"tasks.to_original.judge.checkpoint={tmp_path / 'judge'}"]
    asked = ["tasks.to_original.zero_shot='{source}{target}'", "tasks.style.options.append=''", "on_bad_record=skip"]
    result = run(
        "shakespeare", tmp_path / "out", f"trunk={trunk_folder('gpt2')}", *changes, *asked, "training.freeze=[]"
    )
    assert sizes(judge) == {"style": (60, 60)}
    assert sizes(result) == {"to_original": (53, 44), "to_modern": (55, 48), "style": (60, 60)}  # the rest is too long
    engine = served(result)
    assert set(engine.tasks) == {"to_original", "to_modern", "style"}
    found = result.scores["to_original"]
    assert set(found.baselines) == {"majority", "copy", "zero-shot"}
    assert {"bleu", "chrf", "pinc", "copy_rate", "style_accuracy"} <= set(found.metrics)
    assert engine.task("style").options.pooling == "last"


@needs_data
def test_arabic_hotels_on_several_trunks(
    tmp_path: Path, arabic: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The write-up's table from one command: valid and test of both tasks, each trunk with its own preparation."""
    names = {"bert-base-arabertv02": "arabert", "some-other": None}
    trunks = [str(arabic(name)) for name in names]
    changes = [f"data_dir={DATA}", f"output={tmp_path / 'out'}", *QUICK, "limit=300"]
    assert main(["arabic_hotels", *changes, *(f"--trunk={trunk}" for trunk in trunks)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["task", "split", "metric", *names]
    told = {tuple(line.split()[:3]) for line in lines}
    for split in ("eval", "test"):
        assert {("sentiment", split, metric) for metric in ("accuracy", "macro_f1", "mcc")} <= told
        assert {("targets", split, metric) for metric in ("accuracy", "f1", "precision", "recall")} <= told
    assert (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8").startswith("| task | split | metric | ")
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    for name, preset in names.items():
        engine = mtserve.load(tmp_path / "out" / name)
        assert engine.task("sentiment").options.labels == ("negative", "neutral", "positive")
        assert engine.text.spec.preparation == PRESETS.get(preset or "", ())
        assert engine.text.spec.pad_id == 17029
        (spans,) = engine.predict("targets", ["الفندق جميل والموظفون ودودون"])
        assert all(span["entity_group"] == "target" for span in spans)
        assert set(numbers[name]) == {"eval", "test"}
        assert set(numbers[name]["test"]) == {"sentiment", "targets"}


@needs_data
@pytest.mark.parametrize("limit", [300, None])
def test_both_tasks_of_the_hotels_split_the_reviews_alike(limit: int | None) -> None:
    """Else a review that one task is tested on would be trained on by the other. A limit counts opinions in one view
    and sentences in the other, and so takes other reviews of the file."""
    places: dict[str, dict[str, str]] = {}
    for name, task in config("arabic_hotels", "data_dir").tasks.items():
        whole = read_records(task.handler, task.train, base=DATA, policy="stop", group="review", limit=limit)
        assert isinstance(task.eval, Carve)
        assert isinstance(task.test, Carve)
        parts = carve(whole, {"eval": task.eval, "test": task.test})
        places[name] = {group: which for which, part in parts.items() for group in part.table["_group"]}
        assert len(whole.table) == sum(len(part.table) for part in parts.values())
    first, second = places.values()
    shared = first.keys() & second.keys()
    assert {group: first[group] for group in shared} == {group: second[group] for group in shared}
    assert (len(first), len(second)) == ((50, 110) if limit else (1839, 1839))
    if limit is None:
        assert [list(first.values()).count(which) for which in ("train", "eval", "test")] == [1467, 177, 195]


@needs_data
def test_arabic_ner(tmp_path: Path, arabic: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    trunk = arabic("bert-base-arabertv02")
    result = run("arabic_ner", tmp_path / "out", f"data_dir={DATA}", f"trunk={trunk}")
    assert sizes(result) == {"entities": (3299, 707)}
    told = capfd.readouterr().err
    assert "entities train: repaired 10 orphan" in told
    assert "entities eval: repaired 1 stray, 4 orphan" in told or "4 orphan, 1 stray" in told
    assert served(result).task("entities").options.labels == ("LOC", "MISC", "ORG", "PERS")


def corpus(folder: Path, lines: list[str]) -> Path:
    """Plain text where the recipe looks for it, for training and held out."""
    home = folder / "shakespeare" / "raw"
    home.mkdir(parents=True)
    for which, part in (("train", lines[: len(lines) * 2 // 3]), ("valid", lines[len(lines) * 2 // 3 :])):
        (home / f"{which}.original").write_text("\n".join(part) + "\n", encoding="utf-8")
    return folder


def test_continued_pretraining_gives_a_trunk_for_the_next_run(tmp_path: Path, english: Path) -> None:
    lines = [" ".join(WORDS[at % 9 :: 1 + at % 3]) for at in range(210)]
    text = corpus(tmp_path / "text", lines)
    result = run("continue_pretraining", tmp_path / "adapted", f"data_dir={text}", f"trunk={english}")
    assert set(result.scores) == {"words", "sentences"}
    for name in ("words", "sentences"):
        assert any(entry.get(f"train_loss_{name}", 0) > 0 for entry in result.trained.log)
    adapted, report = AutoModel.from_pretrained(tmp_path / "adapted", output_loading_info=True)
    assert not any(report[of] for of in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = AutoModel.from_pretrained(english).get_input_embeddings().weight
    assert not torch.equal(adapted.get_input_embeddings().weight, before)
    assert not (tmp_path / "adapted" / "mtserve.json").exists()
    for original in (text / "shakespeare" / "raw").glob("*.original"):
        original.with_suffix(".modern").write_text(original.read_text(encoding="utf-8").upper(), encoding="utf-8")
    next_run = run("shakespeare", tmp_path / "out", "form=judge", f"data_dir={text}", f"trunk={tmp_path / 'adapted'}")
    assert served(next_run).task("style").options.labels == ("modern", "original")


@needs_data
def test_continued_pretraining_on_real_text(tmp_path: Path, english: Path) -> None:
    result = run("continue_pretraining", tmp_path / "out", f"data_dir={DATA}", f"trunk={english}", "limit=200")
    assert result.scores["words"].metrics["loss"] > 0
    assert set(result.scores["sentences"].metrics) >= {"accuracy", "macro_f1"}


def test_continued_pretraining_on_a_data_set_with_the_hubs_columns(tmp_path: Path, english: Path) -> None:
    """Half of WikiText's rows are empty; they have no word to hide."""
    text = datasets.Dataset.from_dict({"text": ["", *(f" {word} = {word} \n" for word in WORDS), ""]})
    for split in ("train", "validation"):
        text.to_parquet(tmp_path / "wiki" / f"{split}.parquet")
    places = [
        f"tasks.words.{part}.{key}" for part in ("train", "eval") for key in (f"hub={tmp_path / 'wiki'}", "config=null")
    ]
    result = run("continue_pretraining", tmp_path / "out", f"trunk={english}", *places)
    assert set(result.scores) == {"words"}
    assert AutoModel.from_pretrained(tmp_path / "out").config.model_type == "bert"
