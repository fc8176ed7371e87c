import pytest
from datasets import Dataset

from sdft_ds.data.prompts import PromptBuilder, PromptTooLong
from sdft_ds.data.schedule import for_generation_batches
from sdft_ds.data.streams import Stream
from sdft_ds.data.validation import BadRows

# Rows 1 and 3 are bad.
MIXED = [{"prompt": f"Q{i}", "privileged_context": None if i in (1, 3) else "hint"} for i in range(5)]
SKIP = BadRows("skip")
GOOD = [{"prompt": f"Q{i}", "privileged_context": "hint"} for i in range(12)]


def prompts(tokenizer, student=None, truncation="truncate"):
    return PromptBuilder(tokenizer, "{prompt} {privileged_context}", student, None, truncation)


def stream(rows, tokenizer, bad_rows=SKIP, builder=None, **options):
    builder = builder or prompts(tokenizer, **options)
    return Stream(Dataset.from_list(rows).to_iterable_dataset(), builder, bad_rows)


def test_ranks_share_a_stream_without_a_row_twice(tokenizer):
    """Each reads all rows and uses its own: together every row once, in order."""
    used = []
    for rank in (0, 1):
        rows = stream(GOOD, tokenizer)
        shape = {"batch_size": 2, "rank": rank, "world_size": 2, "num_generations": 1, "steps_per_generation": 1}
        batches = list(for_generation_batches(3, **shape).epoch(0))
        used += [
            (slot.row + 4 * b, rows[slot.index]["prompt"]) for b, item in enumerate(batches) for slot in item.slots
        ]
    assert [prompt for _, prompt in sorted(used)] == [row["prompt"] for row in GOOD]


def test_a_stream_leaves_bad_rows_out_as_they_come(tokenizer):
    rows = stream(MIXED, tokenizer)
    with pytest.warns(UserWarning, match="train_dataset: skipped: Row 1, column 'privileged_context'"):
        assert [rows[i]["prompt"] for i in range(7)] == ["Q0", "Q2", "Q4", "Q0", "Q2", "Q4", "Q0"]


def test_a_bad_row_of_a_stream_ends_the_run_when_it_comes(tokenizer):
    rows = stream(MIXED, tokenizer, BadRows())
    assert rows[0]["prompt"] == "Q0"
    with pytest.raises(ValueError, match="train_dataset: Row 1, column 'privileged_context'"):
        rows[1]
    with pytest.raises(ValueError, match="more rows than max_bad_rows=1 .*Row 3"), pytest.warns(UserWarning):
        stream(MIXED, tokenizer, BadRows("skip", 1))[2]
    with pytest.raises(ValueError, match="without any usable row"), pytest.warns(UserWarning):
        stream(MIXED[1:2], tokenizer)[0]


LONG = [{"prompt": "ab" * n, "privileged_context": "hint"} for n in (1, 5, 2, 9)]


def test_a_stream_drops_rows_that_are_too_long(tokenizer):
    rows = stream(LONG, tokenizer, student=8, truncation="drop")
    assert [rows[i]["prompt"] for i in range(3)] == ["ab", "abab", "ab"]


def test_a_stream_does_not_go_back(tokenizer):
    rows = stream(GOOD, tokenizer)
    assert rows[5]["prompt"] == "Q5" == rows[5]["prompt"]
    with pytest.raises(IndexError, match="Row 4 of a stream that has gone on to 5"):
        rows[4]


def test_looking_at_rows_does_not_count_them_as_cut(tokenizer):
    builder = prompts(tokenizer, student=8)
    assert stream(LONG, tokenizer, builder=builder)[3] and not builder.counts


def test_a_row_that_is_too_long_is_an_error_on_every_rank_though_one_uses_it(tokenizer):
    rows = stream(LONG, tokenizer, BadRows("error"), student=8, truncation="error")
    with pytest.raises(PromptTooLong):
        rows[len(LONG) - 1]
