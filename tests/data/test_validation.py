import copy
import json

import datasets
import pytest
from datasets import Dataset, load_dataset

from sdft_ds.data.prompts import PromptBuilder
from sdft_ds.data.streams import Stream
from sdft_ds.data.validation import BadRows, validate_dataset


def builder(tokenizer, student=None, truncation="truncate"):
    return PromptBuilder(tokenizer, "{prompt}\n\n{privileged_context}", student, None, truncation)


def lengths():
    return Dataset.from_list([{"prompt": "ab" * n, "privileged_context": "hint"} for n in (1, 5, 2, 9)])


# Rows 1 and 3 are bad.
MIXED = [{"prompt": f"Q{i}", "privileged_context": None if i in (1, 3) else "hint"} for i in range(5)]
SKIP = BadRows("skip")


def test_rows_that_are_too_long_are_dropped_and_warned_about(tokenizer):
    with pytest.warns(UserWarning, match="of 4 rows 2 are dropped"):
        kept = validate_dataset(lengths(), "train_dataset", builder(tokenizer, student=8, truncation="drop"))
    assert kept["prompt"] == ["ab", "abab"]


def test_what_is_cut_is_counted(tokenizer):
    with pytest.warns(UserWarning, match="2 lose the beginning of the prompt and 0 the end"):
        assert len(validate_dataset(lengths(), "train_dataset", builder(tokenizer, student=8))) == 4


def test_the_first_bad_row_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="train_dataset: Row 1, column 'privileged_context'.*bad_rows='skip'"):
        validate_dataset(Dataset.from_list(MIXED), "train_dataset", builder(tokenizer))
    with pytest.raises(ValueError, match="train_dataset is empty"):
        validate_dataset(Dataset.from_list([]), "train_dataset", builder(tokenizer))
    with pytest.raises(ValueError, match="train_dataset: .*lacks prompt"):
        validate_dataset(Dataset.from_list([{"q": "a"}]), "train_dataset", builder(tokenizer))


def test_bad_rows_are_left_out_and_their_reasons_told(tokenizer):
    with pytest.warns(UserWarning, match="2 of 5 rows are invalid and skipped: Row 1, column .* Row 3, column"):
        kept = validate_dataset(Dataset.from_list(MIXED), "train_dataset", builder(tokenizer), SKIP)
    assert kept["prompt"] == ["Q0", "Q2", "Q4"]


def test_the_limit_of_bad_rows(tokenizer):
    with pytest.raises(ValueError, match="more rows than max_bad_rows=1 cannot be used. The last: Row 3"):
        validate_dataset(Dataset.from_list(MIXED), "train_dataset", builder(tokenizer), BadRows("skip", 1))
    with pytest.raises(ValueError, match="all 1 rows are skipped: 0 are over .* 1 are bad. .*Row 0"):
        validate_dataset(Dataset.from_list(MIXED[1:2]), "train_dataset", builder(tokenizer), SKIP)


def test_skipping_bad_rows_leaves_lengths_to_their_own_policy(tokenizer):
    with pytest.raises(ValueError, match="Row 1: the student's prompt"):
        validate_dataset(lengths(), "train_dataset", builder(tokenizer, student=8, truncation="error"), SKIP)


def stored(folder, rows):
    file = folder / "rows.jsonl"
    text = "\n".join(map(json.dumps, rows))
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return load_dataset("json", data_files=str(file), cache_dir=str(folder / "cache"), split="train")


def test_messages_name_the_source_and_the_split(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"eval_dataset \(json, split train\): Row 1, column"):
        validate_dataset(stored(tmp_path, MIXED), "eval_dataset", builder(tokenizer))


def test_a_data_set_on_disk_is_looked_at_once(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    looked = []

    class Counting(PromptBuilder):
        def build(self, example, index):
            looked.append(index)
            return super().build(example, index)

    def look(policy=SKIP, **options):
        looked.clear()
        prompts = Counting(tokenizer, "{prompt} {privileged_context}", options.pop("limit", 4), None, **options)
        with pytest.warns(UserWarning, match="2 of 5 rows are invalid"):
            return validate_dataset(stored(tmp_path, MIXED), "train_dataset", prompts, policy)["prompt"]

    assert look() == ["Q0", "Q2", "Q4"] and looked == [0, 2, 4]
    assert look() == ["Q0", "Q2", "Q4"] and looked == []
    assert look(limit=3) and looked  # with other settings, or other rows, anew
    assert look(BadRows("skip", 7)) and looked
    assert look(teacher_chat_template_kwargs={"quick": True}) and looked
    stored(tmp_path, MIXED[::-1])
    assert look() and looked


def templated(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def turns(*texts, **columns):
    """Rows with conversations."""
    rows = [{"prompt": [{"role": "user", "content": text}], "privileged_context": "hint"} | columns for text in texts]
    return Dataset.from_list(rows)


PARTS_ONLY = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content if part.type == 'text' %}{{ part.text }}"
    "{% endfor %}{% endfor %}<assistant>"
)
# Of each message what stands before an empty line: the question, without the context.
FIRST_PARAGRAPH = "{% for m in messages %}{{ m.content.split('\\n\\n')[0] }}{% endfor %}<assistant>"


@pytest.mark.parametrize(
    "template, words",
    [(PARTS_ONLY, "leaves out the user's text"), (FIRST_PARAGRAPH, "leaves out the privileged context")],
)
def test_a_chat_template_that_leaves_out_the_text_is_an_error(tokenizer, template, words):
    with pytest.raises(ValueError, match=f"train_dataset: 2 of 2 rows, the first of them row 0: .*{words}"):
        validate_dataset(turns("Why?", "How?"), "train_dataset", builder(templated(tokenizer, template)))


def test_a_chat_template_that_changes_the_text_leaves_nothing_out(tokenizer, recwarn):
    template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}<assistant>"
    assert len(validate_dataset(turns("Why?", "How?"), "train_dataset", builder(templated(tokenizer, template)))) == 2
    assert not [each for each in recwarn if each.category is UserWarning]


def test_teacher_prompts_that_equal_the_students(tokenizer):
    same = [{"prompt": "Q1", "teacher_prompt": "Q1"}, {"prompt": "Q2", "teacher_prompt": "Q2"}]
    other = [{"prompt": "Q0", "teacher_prompt": "Told: Q0"}]
    with pytest.raises(ValueError, match="2 of 2 rows, the first of them row 0: the teacher's prompt equals"):
        validate_dataset(Dataset.from_list(same), "train_dataset", builder(tokenizer))
    with pytest.warns(UserWarning, match="train_dataset: 2 of 3 rows, the first of them row 1: the teacher's prompt"):
        assert len(validate_dataset(Dataset.from_list(other + same), "train_dataset", builder(tokenizer))) == 3


def test_text_that_a_chat_template_rendered_before(tokenizer):
    rendered = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    for data in (
        Dataset.from_list([{"prompt": text, "privileged_context": "hint"} for text in ("How?", rendered)]),
        turns("How?", rendered),
    ):
        with pytest.warns(UserWarning, match="1 of 2 rows, the first of them row 1: .*special tokens"):
            validate_dataset(data, "train_dataset", builder(tokenizer))


def test_plain_text_beside_a_chat_template(tokenizer, recwarn):
    validate_dataset(lengths(), "train_dataset", builder(templated(tokenizer, None)))
    validate_dataset(turns("Why?"), "train_dataset", builder(tokenizer))
    assert not [each for each in recwarn if each.category is UserWarning]
    with pytest.warns(UserWarning, match="4 of 4 rows, .* row 0: the prompt is a text, .*--prompt_as user"):
        validate_dataset(lengths(), "train_dataset", builder(tokenizer))


def test_the_first_row_of_a_stream_is_looked_at(tokenizer):
    stream = Stream(turns("Why?", "How?").to_iterable_dataset(), builder(templated(tokenizer, PARTS_ONLY)), BadRows())
    with pytest.warns(UserWarning, match="1 of 1 rows, the first of them row 0: .*leaves out the user's text"):
        stream[0]


# As templates of thinking models do: a word in the user's text switches what the answer begins with.
SWITCHED = (
    "{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>"
    "{% if '/no_think' in messages[-1].content %}<think></think>{% endif %}"
)


@pytest.mark.parametrize("stream", [False, True])
def test_generation_prompts_that_differ(tokenizer, stream):
    data = turns("Why?", "How?").map(lambda row: {"privileged_context": "Shortly. /no_think"})
    prompts = builder(templated(tokenizer, SWITCHED))
    words = "row 0 .*'<assistant>', .*'<assistant><think></think>', .*chat_template_kwargs"
    with pytest.warns(UserWarning, match=words):
        if stream:
            Stream(data.to_iterable_dataset(), prompts, BadRows())[0]
        else:
            validate_dataset(data, "train_dataset", prompts)


BY_A_FLAG = (
    "{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>{% if quick %}<think></think>{% endif %}"
)


def flagged(tokenizer, both, teacher):
    return PromptBuilder(
        templated(tokenizer, BY_A_FLAG), "{prompt} {privileged_context}", None, None,
        chat_template_kwargs=both, teacher_chat_template_kwargs=teacher,
    )  # fmt: skip


def test_generation_prompts_that_the_teachers_kwargs_set_apart(tokenizer):
    words = "row 0 .*'<assistant><think></think>', .*'<assistant>', .*teacher_chat_template_kwargs"
    with pytest.warns(UserWarning, match=words):
        validate_dataset(turns("Why?"), "train_dataset", flagged(tokenizer, {"quick": True}, {"quick": False}))


def test_generation_prompts_that_do_not_differ(tokenizer, recwarn):
    validate_dataset(turns("a", " assistant\n"), "train_dataset", builder(tokenizer))
    validate_dataset(turns("a"), "train_dataset", flagged(tokenizer, {"quick": True}, {"loud": True}))
    validate_dataset(turns("a /no_think"), "train_dataset", builder(templated(tokenizer, SWITCHED)))
    assert not [each for each in recwarn if each.category is UserWarning]
