import json

import datasets
import pytest
from datasets import Dataset, load_dataset

from sdft_ds.prompts import PromptBuilder
from sdft_ds.screening import BadRows, usable_rows


def builder(tokenizer, student=None, truncation="truncate"):
    return PromptBuilder(tokenizer, "{prompt}\n\n{privileged_context}", student, None, truncation)


def lengths():
    return Dataset.from_list([{"prompt": "ab" * n, "privileged_context": "hint"} for n in (1, 5, 2, 9)])


# Rows 1 and 3 are bad.
MIXED = [{"prompt": f"Q{i}", "privileged_context": None if i in (1, 3) else "hint"} for i in range(5)]
SKIP = BadRows("skip")


def test_rows_that_are_too_long_are_dropped_and_warned_about(tokenizer):
    with pytest.warns(UserWarning, match="of 4 rows 2 are dropped"):
        kept = usable_rows(lengths(), "train_dataset", builder(tokenizer, student=8, truncation="drop"))
    assert kept["prompt"] == ["ab", "abab"]


def test_what_is_cut_is_counted(tokenizer):
    with pytest.warns(UserWarning, match="2 lose the beginning of the prompt and 0 the end"):
        assert len(usable_rows(lengths(), "train_dataset", builder(tokenizer, student=8))) == 4


def test_the_first_bad_row_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="train_dataset: Row 1, column 'privileged_context'.*bad_rows='skip'"):
        usable_rows(Dataset.from_list(MIXED), "train_dataset", builder(tokenizer))
    with pytest.raises(ValueError, match="train_dataset is empty"):
        usable_rows(Dataset.from_list([]), "train_dataset", builder(tokenizer))
    with pytest.raises(ValueError, match="train_dataset: .*lacks prompt"):
        usable_rows(Dataset.from_list([{"q": "a"}]), "train_dataset", builder(tokenizer))


def test_bad_rows_are_left_out_and_their_reasons_told(tokenizer):
    with pytest.warns(UserWarning, match="2 of 5 rows are bad and left out: Row 1, column .* Row 3, column"):
        kept = usable_rows(Dataset.from_list(MIXED), "train_dataset", builder(tokenizer), SKIP)
    assert kept["prompt"] == ["Q0", "Q2", "Q4"]


def test_the_limit_of_bad_rows(tokenizer):
    with pytest.raises(ValueError, match="more rows than max_bad_rows=1 cannot be used. The last: Row 3"):
        usable_rows(Dataset.from_list(MIXED), "train_dataset", builder(tokenizer), BadRows("skip", 1))
    with pytest.raises(ValueError, match="all 1 rows are left out: 0 are over .* 1 are bad. .*Row 0"):
        usable_rows(Dataset.from_list(MIXED[1:2]), "train_dataset", builder(tokenizer), SKIP)


def test_skipping_bad_rows_leaves_lengths_to_their_own_policy(tokenizer):
    with pytest.raises(ValueError, match="Row 1: the student's prompt"):
        usable_rows(lengths(), "train_dataset", builder(tokenizer, student=8, truncation="error"), SKIP)


def stored(folder, rows):
    file = folder / "rows.jsonl"
    text = "\n".join(map(json.dumps, rows))
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return load_dataset("json", data_files=str(file), cache_dir=str(folder / "cache"), split="train")


def test_messages_name_the_source_and_the_split(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"eval_dataset \(json, split train\): Row 1, column"):
        usable_rows(stored(tmp_path, MIXED), "eval_dataset", builder(tokenizer))


def test_a_data_set_on_disk_is_looked_at_once(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    looked = []

    class Counting(PromptBuilder):
        def build(self, example, index):
            looked.append(index)
            return super().build(example, index)

    def look(policy=SKIP, **options):
        looked.clear()
        prompts = Counting(tokenizer, "{prompt} {privileged_context}", options.pop("limit", 4), None)
        with pytest.warns(UserWarning, match="2 of 5 rows are bad"):
            return usable_rows(stored(tmp_path, MIXED), "train_dataset", prompts, policy)["prompt"]

    assert look() == ["Q0", "Q2", "Q4"] and looked == [0, 2, 4]
    assert look() == ["Q0", "Q2", "Q4"] and looked == []
    assert look(limit=3) and looked  # with other settings, or other rows, anew
    assert look(BadRows("skip", 7)) and looked
    stored(tmp_path, MIXED[::-1])
    assert look() and looked
