"""A test for every defect of the write-ups that could come back, where no other file has it; and where the others are.

The first write-up (RoBERTa, then GPT-2 on Shakespeare), by the numbers of its inventory:

6   STS-B as 1 to 5      test_defects.py::test_6_scores_of_stsb_go_from_0_to_5
40  label ids drift      test_defects.py::test_40_label_ids_are_those_of_training_whatever_a_split_holds
                         test_examples.py::test_labels_are_fitted_on_training_alone_and_other_columns_ignored
41  a file of another    test_defects.py::test_41_a_table_is_found_by_its_own_content
42  pickles, appended    ../test_architecture.py::test_nothing_unpickles_or_trusts_remote_code
                         test_multitask.py::test_a_saved_model_loads_without_the_code_that_made_it
43  caches that are not  test_examples.py::test_a_second_run_reads_and_tokenises_nothing
44  shared tensors       test_multitask.py::test_a_state_dict_has_each_tensor_once_and_loads_strictly
                         test_multitask.py::test_a_saved_model_loads_without_the_code_that_made_it
45  a table of families  test_multitask.py::test_every_family_shares_its_trunk_whichever_task_comes_first
46  the first's trunk    test_multitask.py::test_every_family_shares_its_trunk_whichever_task_comes_first
47  types on GPT-2       test_multitask.py::test_type_ids_reach_only_trunks_that_have_types
48  a target cut off     test_defects.py::test_48_a_long_source_is_cut_and_never_the_target
                         test_collation.py::test_what_makes_no_batch_is_said
                         test_reporting.py::test_losses_that_are_not_finite_stay_visible
49  pooled elsewhere     test_multitask.py::test_rows_that_would_be_pooled_at_a_wrong_token_are_refused
50  the label mask       test_writeups.py::test_shakespeare_labels_are_the_target_and_its_end
                         test_defects.py::test_50_what_the_loss_counts_is_the_target_and_its_end
51  fixed padding        test_collation.py::test_padding_that_features_bring_is_cut_to_the_longest_row
52  collator not callable  test_writeups.py::test_roberta_with_three_formats
53  a loader of its own  test_defects.py::test_53_training_goes_on_from_a_saved_state_as_if_never_stopped
                         test_sampler.py::test_training_resumed_in_a_later_epoch_goes_on_where_it_was
                         test_mixture.py::test_order_changes_with_seed_and_epoch
54  evaluation of others test_writeups.py::test_shakespeare_learns_both_tasks_over_one_trunk
55  nothing measured     test_evaluate.py::test_a_task_is_scored_as_a_caller_would_see_it
                         test_run.py::test_the_same_seed_gives_the_same_weights
56  the last steps lost  test_run.py::test_a_sealed_run_predicts_the_same_in_another_process
57  one dummy for all    test_defects.py::test_57_only_rows_without_an_answer_get_the_dummy_label
58  dead code, old text  no behaviour: linters, and commands of the README are run by ../test_readme.py
59  classes, overlaps    test_audit.py::test_repeats_conflicts_and_overlaps
                         test_audit.py::test_held_out_lines_of_shakespeare_that_training_has
60  losses times 32      test_defects.py::test_60_accumulation_changes_neither_losses_nor_weights
                         test_accumulation.py::test_accumulation_over_several_tasks
61  no throughput        test_plan.py::test_rows_tokens_and_seconds_by_hand

The second (Arabic sentiment and names), the parts of its number 12:

no sizes, no seeds       test_card.py::test_tables_hold_every_number
names by accuracy        test_defects.py::test_names_are_not_scored_by_tokens
stems before tokens      ../test_preparation.py::test_stems_are_of_the_words_of_token_classification
leaks across splits      test_examples.py::test_carved_splits_are_disjoint_follow_the_seed_and_keep_groups_whole
classes out of balance   test_audit.py::test_label_drift_counts_beyond_what_chance_gives

The third (a Trainer that reports), its number 10:

a   an old name          test_reporting.py::test_a_gathering_works_on_this_version_of_transformers
b   never gathered       test_reporting.py::test_b_values_of_all_processes_count
c   one class patched    test_reporting.py::test_c_two_modules_of_one_class_and_two_trainers
d   graphs kept          test_reporting.py::test_d_no_graph_outlives_its_step
e   train and eval       test_reporting.py::test_e_training_and_evaluation_are_apart
f   a log of its own     test_reporting.py::test_f_entries_of_transformers_stay_and_none_is_hidden
g   the rest             test_reporting.py::test_g_model_init
                         test_reporting.py::test_g_training_again_begins_at_nothing
                         test_reporting.py::test_g_evaluation_counts_batches_by_their_rows
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, TrainingArguments

from mtserve.errors import InputError
from mtserve.tasks import KINDS
from mtserve.tasks.base import IGNORED
from mtserve.text import Text, text_spec
from tests.tiny import EOS, FAMILIES, PAD, TOKENIZER_JSON
from tests.training.writeups.s1_roberta import converters
from training.stock.collation import FeatureCollator
from training.stock.multitask import MultitaskModel
from training.trainer.multitask import MultitaskTrainer

Folder = Callable[[str], Path]
TEXT = Text(TOKENIZER_JSON, text_spec(TOKENIZER_JSON, pad_id=PAD, eos_id=EOS))


def labelled(kind: str, **fields: Any) -> Any:
    return KINDS[kind].labelled.model_validate(fields)


def test_the_table_names_tests_that_exist() -> None:
    named = re.findall(r"(\S+\.py)::(\w+)", __doc__)
    assert len(named) > 40
    for path, name in named:
        assert f"\ndef {name}(" in (Path(__file__).parent / path).read_text(encoding="utf-8"), f"{path} has no {name}"


def test_6_scores_of_stsb_go_from_0_to_5() -> None:
    kind, options = KINDS["similarity"], KINDS["similarity"].options.model_validate({"low": 0, "high": 5})
    targets = [
        kind.target(labelled("similarity", text="a", text_pair="b", score=score), [], options) for score in (0, 2.5, 5)
    ]
    assert targets == [0.0, 0.5, 1.0]
    with pytest.raises(InputError, match="not in"):
        kind.target(labelled("similarity", text="a", text_pair="b", score=5.2), [], options)


def test_40_label_ids_are_those_of_training_whatever_a_split_holds() -> None:
    kind = KINDS["classification"]
    train = [{"text": "a", "label": label} for label in ("translate", "modern", "original")]
    options = kind.options.model_validate(kind.fit(train, {}))
    held_out = labelled("classification", text="a", label="translate")  # a split without `original`
    assert kind.target(held_out, [], options) == options.labels.index("translate") == 2


def test_41_a_table_is_found_by_its_own_content(tmp_path: Path) -> None:
    """Features of one direction were written under the name of the other."""
    from training.data.source import Source, fingerprint

    found = []
    for name, target in (("original", "thou art"), ("modern", "you are")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "a", "target": "{target}"}}\n', encoding="utf-8")
        found.append(fingerprint(Source(path=f"{name}.jsonl"), tmp_path))
    assert found[0] != found[1]


@pytest.mark.parametrize("words", [3, 60])
def test_48_a_long_source_is_cut_and_never_the_target(words: int) -> None:
    kind = KINDS["generation"]
    options = kind.options.model_validate({"template": "{source} [SEP]{target}", "max_length": 16, "max_new_tokens": 8})
    example = labelled("generation", text="town " * words, target="the rain")
    rows, target = kind.features(example, options, TEXT)
    answer = [*TEXT.plain("the rain"), EOS]
    assert len(rows[0]) <= 16
    assert target[target != IGNORED].tolist() == answer == rows[0].ids[-len(answer) :].tolist()
    with pytest.raises(InputError, match="no room for the text"):
        kind.features(labelled("generation", text="town", target="rain " * 20), options, TEXT)


def test_50_what_the_loss_counts_is_the_target_and_its_end() -> None:
    kind = KINDS["generation"]
    options = kind.options.model_validate({"template": "{source} [SEP]{target}", "max_length": 32, "max_new_tokens": 8})
    for source, target in (("the town", "ana silva"), ("red", "the red town in may")):
        rows, counted = kind.features(labelled("generation", text=source, target=target), options, TEXT)
        kept = counted[counted != IGNORED].tolist()
        assert (TEXT.decode(kept), kept[-1]) == (target, EOS)
        assert [rows[0].ids[at + 1] for at in (counted != IGNORED).nonzero()[0]] == kept


def test_57_only_rows_without_an_answer_get_the_dummy_label() -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), pad_token="[PAD]")
    choices = {"label": list("ABCDE"), "text": ["red", "green", "blue", "one", "may"]}
    batch = {"question": ["what"] * 3, "choices": [choices] * 3, "answerKey": ["", "D", ""]}
    assert converters(tokenizer, max_length=16)["commonsense_qa"](batch)["labels"] == [0, 3, 0]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(TOKENIZER_JSON)


HEADS = {
    "pair": ("bert", "AutoModelForSequenceClassification", {"num_labels": 3}),
    "score": ("roberta", "AutoModelForSequenceClassification", {"num_labels": 1}),
    "choice": ("roberta", "AutoModelForMultipleChoice", {}),
    "tags": ("bert", "AutoModelForTokenClassification", {"num_labels": 3}),
    "masked": ("bert", "AutoModelForMaskedLM", {}),
    "translate": ("gpt2", "AutoModelForCausalLM", {}),
    "classify": ("gpt2", "AutoModelForSequenceClassification", {"num_labels": 3}),
}


def items(task: str, count: int = 8) -> list[dict[str, Any]]:
    """Features of equally many tokens that count."""
    made = []
    for number in range(count):
        ids = [10 + (number * 7 + at) % 50 for at in range(6)]
        label: Any = {"pair": number % 3, "classify": number % 3, "score": number / 2, "choice": number % 2}.get(task)
        if task == "tags":
            label = [at % 3 for at in range(6)]
        elif task in ("masked", "translate"):
            label = ids
        made.append({"input_ids": [ids, ids[::-1]] if task == "choice" else ids, "labels": label})
    return made


def model_of(task: str, folder: Folder) -> MultitaskModel:
    family, auto, extra = HEADS[task]
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **extra})
    model = MultitaskModel.create(str(folder(family)), {task: getattr(transformers, auto)}, {task: config})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # what is random would hide the comparison
    return model


def trained(task: str, folder: Folder, out: Path, *, resume: str | None = None, **arguments: Any) -> MultitaskTrainer:
    fixed: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    args = TrainingArguments(output_dir=str(out), **{**fixed, "learning_rate": 1e-2, **arguments})
    trainer = MultitaskTrainer(
        model_of(task, folder), args, train_dataset={task: items(task)}, data_collator=FeatureCollator(pad_id=PAD)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("task", sorted(HEADS))
def test_60_accumulation_changes_neither_losses_nor_weights(task: str, trunk_folder: Folder, tmp_path: Path) -> None:
    """Stock heads take `num_items_in_batch` and most ignore it, so that a stock Trainer would not divide at all."""
    once, often = (
        trained(
            task,
            trunk_folder,
            tmp_path / str(count),
            optim="sgd",
            max_grad_norm=0.0,
            num_train_epochs=1,
            per_device_train_batch_size=8 // count,
            gradient_accumulation_steps=count,
        )
        for count in (1, 4)
    )
    rows = [trainer.state.log_history[0] for trainer in (once, often)]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5) == rows[1][f"train_loss_{task}"]
    assert rows[0]["grad_norm"] > 0
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4)
    for (name, one), other in zip(once.model.named_parameters(), often.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


def test_53_training_goes_on_from_a_saved_state_as_if_never_stopped(trunk_folder: Folder, tmp_path: Path) -> None:
    """Shared and tied weights come back once and together."""
    run: dict[str, Any] = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "save_steps": 5}
    whole = trained("translate", trunk_folder, tmp_path / "whole", **run)
    assert whole.state.global_step == 12
    state = str(tmp_path / "whole" / "checkpoint-5")
    again = trained("translate", trunk_folder, tmp_path / "again", resume=state, **run)
    again.model.check_sharing()
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_names_are_not_scored_by_tokens() -> None:
    """On ANERcorp nine of ten tokens are no name, so finding none at all is right about nine tokens of ten."""
    kind = KINDS["token_classification"]
    options = kind.options.model_validate({"labels": ["person", "place"]})
    words = ("the", "rain", "in", "porto", "was", "great", "and", "the", "town", "fine")
    tags = ("O", "O", "O", "B-place", *["O"] * 6)
    example = labelled("token_classification", words=words, tags=tags)
    assert kind.metrics([[]], [example], options)[kind.metric] == 0.0
