import pytest
from tokenizers import processors

from sdft_ds.data.prompts import PromptBuilder, PromptTooLong, parse_template
from sdft_ds.data.rows import Example, RowError
from tests.helpers import tiny

TEMPLATE = "{prompt}\n\n{privileged_context}"
NASTY = "{} {prompt} {privileged_context} {0} {{x}} $x ${y} {{ jinja }} {% raw %} ünï — 日本 🤖 \\n"


def builder(tokenizer, template=TEMPLATE, student=None, teacher=None, truncation="truncate", **kwargs):
    return PromptBuilder(tokenizer, template, student, teacher, truncation, **kwargs)


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_plain_text(tokenizer):
    pair = builder(tokenizer).build(Example("Q?", "The hint."), 0)
    assert pair.student.text == "Q?" and pair.teacher.text == "Q?\n\nThe hint."
    assert tokenizer.decode(pair.teacher.ids) == "Q?\n\nThe hint."


def test_conversation_keeps_earlier_turns(tokenizer):
    prompt = chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Q?"))
    pair = builder(tokenizer).build(Example(prompt, "Hint"), 0)
    assert pair.student.prompt == prompt
    assert pair.teacher.prompt == [*prompt[:-1], {"role": "user", "content": "Q?\n\nHint"}]
    for rendered in (pair.student, pair.teacher):
        assert rendered.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
        assert rendered.text.endswith("<|im_start|>assistant\n")
        assert tokenizer.decode(rendered.ids) == rendered.text


def test_values_are_verbatim(tokenizer):
    pair = builder(tokenizer, "Ask: {prompt} {{literal}} Tell: {privileged_context}").build(Example(NASTY, NASTY), 0)
    assert pair.teacher.text == f"Ask: {NASTY} {{literal}} Tell: {NASTY}"
    in_chat = builder(tokenizer).build(Example(chat(("user", NASTY)), NASTY), 0)
    assert f"{NASTY}\n\n{NASTY}" in in_chat.teacher.text


@pytest.mark.parametrize(
    "template, words",
    [
        ("{prompt} only", "privileged_context"),
        ("{privileged_context} only", "prompt"),
        ("{prompt} {privileged_context} {other}", "other"),
        ("{prompt.__class__} {privileged_context}", "__class__"),
        ("{prompt[0]} {privileged_context}", "prompt\\[0\\]"),
        ("{prompt!r} {privileged_context}", "prompt!r"),
        ("{prompt:>9} {privileged_context}", "prompt:>9"),
        ("{} {prompt} {privileged_context}", "\\{\\}"),
        ("{prompt} {privileged_context", "doubled"),
    ],
)
def test_bad_templates_are_refused(template, words):
    with pytest.raises(ValueError, match=words):
        parse_template(template)


def test_chat_template_kwargs_reach_the_template(tokenizer):
    loud = tiny.tokenizer()
    loud.chat_template = "{{ messages[0]['content'] }}{% if loud %}!{% endif %}"
    pair = builder(loud, chat_template_kwargs={"loud": True}).build(Example(chat(("user", "Q")), "H"), 0)
    assert pair.student.text == "Q!" and pair.teacher.text == "Q\n\nH!"


# As templates of thinking models do: a switch ends the generation prompt with an empty thought.
THINKING = (
    "{% for m in messages %}<user>{{ m.content }}{% endfor %}{% if strict %}!{% endif %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)


def thinking(**kwargs):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = THINKING
    return builder(tokenizer, **kwargs)


def test_the_teachers_chat_template_kwargs_go_over_those_of_both():
    both = {"enable_thinking": False, "strict": True}
    prompts = thinking(chat_template_kwargs=both, teacher_chat_template_kwargs={"enable_thinking": True})
    pair = prompts.build(Example(chat(("user", "Q")), "H"), 0)
    assert pair.student.text == "<user>Q!<assistant><think></think>"
    assert pair.teacher.text == "<user>Q\n\nH!<assistant>"
    own = prompts.build(Example(chat(("user", "Q")), "", teacher_prompt="Told: Q"), 0)
    assert own.teacher.text == "<user>Told: Q!<assistant>"
    # An anchor holds the student to what it answers to its own prompt.
    anchor = prompts.build(Example(chat(("user", "Q")), None), 0)
    assert anchor.student == anchor.teacher == pair.student


def test_what_is_read_from_a_teachers_prompt_is_read_with_its_own_kwargs():
    prompts = thinking(teacher_chat_template_kwargs={"enable_thinking": False, "strict": True})
    pair = prompts.build(Example(chat(("user", "Why?")), "It is so."), 0)
    assert prompts.generation_prompt(pair.student) == "<assistant>"
    assert prompts.generation_prompt(pair.teacher) == "!<assistant><think></think>"
    assert prompts.problems(pair) == []
    _, spans = prompts.spans(pair)
    assert cut_out(pair.teacher.text, spans) == [("prompt", "Why?"), ("privileged_context", "It is so.")]
    prompts.tokenizer.chat_template = "{{ '' if strict else messages[-1].content }}<assistant>"
    assert prompts.problems(prompts.build(Example(chat(("user", "Why?")), "It is so."), 0)) == ["context dropped"]


def test_a_conversation_needs_a_chat_template():
    bare = tiny.tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        builder(bare).build(Example(chat(("user", "Q")), "H"), 0)


def test_truncation_cuts_the_users_text_and_nothing_else(tokenizer):
    prompt = chat(("system", "Be brief."), ("user", "0123456789" * 5 + "the question?"))
    whole = builder(tokenizer).build(Example(prompt, "c" * 60), 0)
    limit_s, limit_t = len(whole.student.ids) - 20, len(whole.teacher.ids) - 50
    cutting = builder(tokenizer, student=limit_s, teacher=limit_t)
    pair = cutting.build(Example(prompt, "c" * 60), 0)
    assert len(pair.student.ids) == limit_s and len(pair.teacher.ids) == limit_t
    assert pair.student.prompt[0] == prompt[0] and pair.student.text.endswith("<|im_start|>assistant\n")
    question = pair.student.prompt[-1]["content"]
    assert prompt[-1]["content"].endswith(question) and question.endswith("the question?")
    # The teacher reads the same question, and the beginning of the context.
    assert pair.teacher.prompt[-1]["content"] == f"{question}\n\n" + "c" * 30
    assert cutting.counts == {"student_prompts_cut": 1, "teacher_prompts_cut": 1}


@pytest.mark.parametrize("keep_bytes", range(1, 9))
def test_truncation_ends_inside_a_character_of_many_bytes(tokenizer, keep_bytes):
    pair = builder(tokenizer, student=keep_bytes + 4).build(Example("a🤖🤖🤖🤖bcd", "hint"), 0)
    assert len(pair.student.ids) <= keep_bytes + 4 and "a🤖🤖🤖🤖bcd".endswith(pair.student.text)


@pytest.mark.parametrize("truncation", ["error", "drop"])
def test_policies_other_than_truncate_raise_with_the_row(tokenizer, truncation):
    with pytest.raises(PromptTooLong, match="Row 3.*max_prompt_length.*limit of 4"):
        builder(tokenizer, student=4, truncation=truncation).build(Example("too long", "hint"), 3)


def test_what_no_cut_can_mend_is_an_error(tokenizer):
    prompt = chat(("system", "long " * 20), ("user", "Q?"))
    with pytest.raises(PromptTooLong, match="Row 1.*never cut"):
        builder(tokenizer, student=50).build(Example(prompt, "hint"), 1)


def test_a_context_that_would_be_cut_to_nothing_is_an_error(tokenizer):
    whole = builder(tokenizer).build(Example("the question", "c"), 0)
    with pytest.raises(PromptTooLong, match="the teacher's prompt.*cannot fix it"):
        builder(tokenizer, teacher=len(whole.teacher.ids) - 1).build(Example("the question", "c"), 0)


def test_a_teacher_prompt_of_the_rows_own_replaces_the_template(tokenizer):
    prompt = chat(("system", "Be brief."), ("user", "Q?"))
    text = builder(tokenizer).build(Example(prompt, "", teacher_prompt="{prompt} as it stands"), 0)
    assert text.student.prompt == prompt
    assert text.teacher.prompt == chat(("system", "Be brief."), ("user", "{prompt} as it stands"))
    turns = chat(("user", "Look."), ("assistant", "I see."), ("user", "Q?"))
    assert builder(tokenizer).build(Example(prompt, "", teacher_prompt=turns), 0).teacher.prompt == turns
    assert builder(tokenizer).build(Example("Q?", "", teacher_prompt="Told: Q?"), 0).teacher.text == "Told: Q?"


def test_a_teacher_prompt_of_the_rows_own_is_never_cut(tokenizer):
    with pytest.raises(PromptTooLong, match="Row 4: the teacher's prompt.*never cut"):
        builder(tokenizer, teacher=20).build(Example("Q?", "", teacher_prompt="long " * 20), 4)


def test_tools_reach_the_chat_template_of_both_prompts():
    armed = tiny.tokenizer()
    armed.chat_template = "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}" + tiny.CHAT_TEMPLATE
    tools = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
    pair = builder(armed).build(Example(chat(("user", "Q")), "H", tools=tools), 0)
    assert pair.student.text.startswith("[search]") and pair.teacher.text.startswith("[search]")
    everywhere = builder(armed, chat_template_kwargs={"tools": tools})
    assert everywhere.build(Example(chat(("user", "Q")), "H"), 0).student.text.startswith("[search]")


def test_a_conversation_that_the_chat_template_refuses_is_a_row_error():
    strict = tiny.tokenizer()
    strict.chat_template = "{{ raise_exception('System role\nnot supported') }}"
    with pytest.raises(
        RowError, match="Row 5, column 'prompt': the model's chat template refuses.*role not supported"
    ):
        builder(strict).build(Example(chat(("system", "S"), ("user", "Q")), "H"), 5)


def cut_out(text, spans):
    return [(span.name, text[span.start : span.end]) for span in spans]


def test_spans_say_where_question_and_context_stand(tokenizer):
    template = "{privileged_context} <{prompt}> {privileged_context}"
    for prompt in ("Q hint?", chat(("system", "hint"), ("user", "Q hint?"))):
        made = builder(tokenizer, template)
        pair = made.build(Example(prompt, "hint"), 0)
        student, teacher = made.spans(pair)
        told, asked = ("privileged_context", "hint"), ("prompt", "Q hint?")
        assert cut_out(pair.student.text, student) == [asked]
        assert cut_out(pair.teacher.text, teacher) == [told, asked, told]
        assert pair.teacher.text[: teacher[0].start].count("hint") == (prompt[0] != "Q")  # not the system's


def test_spans_where_the_template_strips_the_users_text():
    stripping = tiny.tokenizer()
    stripping.chat_template = "<{{ messages[-1]['content'] | trim }}>"
    made = builder(stripping)
    pair = made.build(Example(chat(("user", "  a a \n")), "hint \n"), 0)
    student, teacher = made.spans(pair)
    assert pair.student.text == "<a a>" and cut_out(pair.student.text, student) == [("prompt", "a a")]
    assert cut_out(pair.teacher.text, teacher) == [("prompt", "a a \n"), ("privileged_context", "hint")]
    assert made.context_left(pair) == "hint \n"


def test_no_spans_where_the_template_rewrites_the_users_text():
    loud = tiny.tokenizer()
    loud.chat_template = "{{ messages[-1]['content'] | upper }}"
    made = builder(loud)
    assert made.spans(made.build(Example(chat(("user", "q")), "hint"), 0)) == ([], [])


def test_spans_where_the_row_brings_tools_or_a_teacher_prompt():
    armed = tiny.tokenizer()
    armed.chat_template = "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}" + tiny.CHAT_TEMPLATE
    made = builder(armed)
    example = Example(chat(("user", "Q?")), "hint", tools=[{"name": "search"}])
    pair = made.build(example, 0)
    _, teacher = made.spans(pair)
    assert cut_out(pair.teacher.text, teacher) == [("prompt", "Q?"), ("privileged_context", "hint")]
    own = made.build(Example(chat(("user", "Q?")), "", teacher_prompt="Told: Q?"), 0)
    student, teacher = made.spans(own)
    assert cut_out(own.student.text, student) == [("prompt", "Q?")] and teacher == [] and made.context_left(own) == ""


def test_what_is_left_of_a_context(tokenizer):
    made = builder(tokenizer, "{privileged_context}|{prompt}|", teacher=6)
    pair = made.build(Example("Q", "abcdef"), 0)
    assert pair.teacher.text == "abc|Q|" and made.context_left(pair) == "abc"
    assert cut_out(pair.teacher.text, made.spans(pair)[1])[0] == ("privileged_context", "abc")


def test_offsets_cover_the_text_and_know_what_was_added():
    with_bos = tiny.tokenizer()
    with_bos.add_special_tokens({"bos_token": "<s>"})
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|>",
        special_tokens=[("<s>", with_bos.bos_token_id), ("<|im_end|>", with_bos.eos_token_id)],
    )
    made = builder(with_bos)
    rendered = made.render("ab")
    assert rendered.ids[0] == with_bos.bos_token_id and made.offsets(rendered) == [(0, 0), (0, 1), (1, 2)]
