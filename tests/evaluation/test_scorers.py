import json
import random

import pytest

from sdft_ds.evaluation.scorers import SCORERS, actions, chosen_letter, same_json, score

CALL = (
    'Thought: look it up.\nAction: getWeather\nAction Input: {"city": "Oslo", "days": 3, "filter": {"wind": [1, 2]}}'
)
TWO = 'Action: find\nAction Input: {"q": "a {brace} and \\"Action: x\\""}\n\nAction: book\nAction Input:\n{}'

CASES = [
    ("exact", "Paris", "Paris", True),
    ("exact", "  paris.\n", "Paris", True),
    ("exact", "New   York!", "new york", True),
    ("exact", "Paris, France", "Paris", False),
    ("exact", "", "Paris", False),
    ("exact", "Lutetia", ["Paris", "Lutetia"], True),
    ("contains", "It is in PARIS, of course.", "paris.", True),
    ("contains", "It is in Oslo.", "Paris", False),
    ("contains", "", "Paris", False),
    ("contains", "答案是巴黎。", "巴黎", True),
    ("contains", "答案是Paris。", "Paris", True),
    ("contains", "the new  York-bound train", "New York", True),
    ("contains", "It costs $4.50", "$4.50", True),
    ("contains", "서울입니다.", "서울", True),
    ("contains", "A dog has 45 legs.", "4", False),
    ("contains", "A dog has (4) legs.", "4", True),
    ("contains", "About 4.5, or 1,400.", "4", False),
    ("contains", "It is 45, or 4.", "4", True),
    ("contains", "It is sliced.", "ice", False),
    ("contains", "She is Parisian.", "Paris", False),
    ("contains", "It is Paris's  old\nTown hall", "old town", True),
    ("contains", "A cafe\u0301!", "café", True),
    ("contains", "A cafe\u0301!", "cafe", False),
    ("contains", "हिन्दी", "हिन्द", False),
    ("contains", "In C++11.", "C++", True),
    ("choice", "B", "B", True),
    ("choice", " b. ", "B", True),
    ("choice", "(B)", "B", True),
    ("choice", "**B**", "(b)", True),
    ("choice", "B: 56 pC", "B", True),
    ("choice", "B) because A is too small", "B", True),
    ("choice", "The answer is B.", "B", True),
    ("choice", "The correct answer is **(C)**, not (B).", "C", True),
    ("choice", "Answer: D", "D", True),
    ("choice", "(A) is wrong; option B is right", "B", True),
    ("choice", "It is not (A) but (B)", "B", True),
    ("choice", "So $\\boxed{B}$", "B", True),
    ("choice", "A: too small\nB: fits\n\nB", "B", True),
    ("choice", "<answer>\nB\n</answer> although (A)", "B", True),
    ("choice", "A charged particle is here", "A", False),
    ("choice", "the answer is a matter of taste", "A", False),
    ("choice", "I do not know", "I", False),
    ("choice", "", "A", False),
    ("answer_letter", "<reasoning>\nA?\n</reasoning>\n<answer>\nB\n</answer>\n", "B", True),
    ("answer_letter", "<answer>A</answer> no: <answer>(b)</answer>", "B", True),
    ("answer_letter", "<answer>A <answer>B</answer>", "B", True),
    ("answer_letter", "<answer>B: 56 pC</answer>", "B", True),
    ("answer_letter", "<answer>A</answer> no: <answer>B</answer>", "A", False),
    ("answer_letter", "<answer>B is right, I think</answer>", "B", False),
    ("answer_letter", "<answer>\nB", "B", False),
    ("answer_letter", "B", "B", False),
    ("answer_letter", "<answer></answer>", "B", False),
    ("regex", "It is 42 km", r"\b42\b", True),
    ("regex", "It is 142 km", r"\b42\b", False),
    ("regex", "no", ["yes", "^no$"], True),
    ("action", CALL, CALL, True),
    ("action", CALL, [{"Action": "getWeather", "Action_Input": CALL.partition("Input: ")[2]}], True),
    ("action", CALL, {"action": "getWeather", "action input": {"filter": '{"wind": [1, 2]}', "days": "3",
                                                               "city": " Oslo "}}, True),
    ("action", CALL.replace("Oslo", "Rome"), CALL, False),
    ("action", CALL.replace("getWeather", "get_weather"), CALL, False),
    ("action", CALL.replace("[1, 2]", "[2, 1]"), CALL, False),
    ("action", TWO, TWO.replace("\n\n", "\nObservation: done\n"), True),
    ("action", TWO, TWO.partition("\n\n")[0], False),
    ("action", TWO.partition("\n\n")[0], TWO, False),
    ("action", "**Action:** `find`\n**Action Input:** ```json\n{\"a\": 1.0}\n```", {"Action": "find",
                                                                                   "Action_Input": {"a": 1}}, True),
    ("action", "Action: find Action Input: {}", {"Action": "find", "Action_Input": "{}"}, True),
    ("action", "Action: find\nAction Input: {\"a\": ", {"Action": "find", "Action_Input": {"a": 1}}, False),
    ("action", "Action: other\nAction: find\nAction Input: {}", {"Action": "find", "Action_Input": {}}, False),
    ("action", "Action: find\nAction Input: {}\nAction: other", {"Action": "find", "Action_Input": {}}, False),
    ("action", "find it", {"Action": "find", "Action_Input": {}}, False),
]  # fmt: skip


@pytest.mark.parametrize("name, completion, answer, right", CASES)
def test_plain_cases(name, completion, answer, right):
    assert score(name, completion, answer) is right


UNUSABLE = [
    ("exact", "."),
    ("exact", 3),
    ("contains", ""),
    ("contains", ["Paris", ""]),
    ("contains", []),
    ("choice", "B or C"),
    ("answer_letter", "<answer>B</answer>"),
    ("regex", "(unclosed"),
    ("action", "no action"),
    ("action", []),
    ("action", {"Action": "find"}),
    ("action", [{"name": "find", "arguments": {}}]),
    ("action", "Action: find\nAction Input: not JSON"),
    ("nothing", "B"),
]


@pytest.mark.parametrize("completion", ["", "B", CALL])
@pytest.mark.parametrize("name, answer", UNUSABLE)
def test_an_answer_that_cannot_be_used_is_refused_whatever_the_completion(name, answer, completion):
    with pytest.raises(ValueError):
        score(name, completion, answer)


def test_numbers_and_text_in_json():
    same = [(1, 1.0), (1, "1"), ("1.50", 1.5), (True, "True"), (None, "null"), ("a  b", " a b"), ("[1]", ["1"])]
    other = [(1, True), (0, False), (1, 2), ("007", 7), ("1.0", "1"), ("a", "A"), ([], {}), (None, ""), ([1], [1, 1])]
    assert all(same_json(a, b) and same_json(b, a) for a, b in same)
    assert not any(same_json(a, b) or same_json(b, a) for a, b in other)


def words(rng):
    return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(1, 8))) for _ in range(rng.randint(1, 6)))


def value(rng, depth=3):
    """A random JSON value; below the top level also lists, objects and text that looks like a marker."""
    kinds = [words(rng), rng.randint(-99, 99), rng.random(), rng.random() < 0.5, None, 'Action: x {"', "}{"]
    if depth:
        kinds += [[value(rng, depth - 1) for _ in range(rng.randint(0, 3))]] * 3
        kinds += [{words(rng): value(rng, depth - 1) for _ in range(rng.randint(0, 3))}] * 3
    return rng.choice(kinds)


def rewritten(rng, value):
    """The same value: keys in another order, and lists and objects here and there as text."""
    if isinstance(value, dict):
        items = [(key, rewritten(rng, each)) for key, each in value.items()]
        rng.shuffle(items)
        value = dict(items)
    elif isinstance(value, list):
        value = [rewritten(rng, each) for each in value]
    elif isinstance(value, int | float) and rng.random() < 0.3:
        return json.dumps(value)
    return (
        json.dumps(value, indent=rng.choice([None, 2]))
        if isinstance(value, dict | list) and rng.random() < 0.3
        else value
    )


def called(rng, calls):
    """A completion that makes the calls."""
    return "".join(
        f"Thought: {words(rng)}\nAction: {name}\nAction Input: {json.dumps(given, indent=rng.choice([None, 1]))}\n"
        for name, given in calls
    )


@pytest.mark.parametrize("seed", range(200))
def test_actions_survive_rewriting_and_nothing_else(seed):
    rng = random.Random(seed)
    calls = [(words(rng).replace(" ", "_"), value(rng)) for _ in range(rng.randint(1, 4))]
    text = called(rng, calls)
    assert actions(text) == calls
    answer = [{"Action": name, "Action_Input": rewritten(rng, given)} for name, given in calls]
    assert score("action", text, answer) and score("action", text, called(rng, calls))
    other = list(calls)
    at = rng.randrange(len(calls))
    other[at] = (calls[at][0], {"wrapped": calls[at][1], "more": 1})
    for wrong in (other, calls[:-1], [*calls, calls[0]]):
        assert not score("action", called(rng, wrong), answer)


@pytest.mark.parametrize("seed", range(100))
def test_text_scorers_on_random_text(seed):
    rng = random.Random(seed)
    answer, before, after = words(rng), words(rng), words(rng)
    spread = answer.upper().replace(" ", " \n ")
    assert score("exact", f"\n{spread} .", answer) and not score("exact", f"{before} {answer} x", answer)
    assert score("contains", f"{before} {spread} {after}", answer)
    assert not score("contains", before + after, answer + "z")
    letter, other = rng.sample("ABCDEFGH", 2)
    for form in ("{}", "({})", "**{}**", "The answer is {}", "{}.", "{}) {after}", "{before} ({})"):
        said = form.format(letter, before=before, after=after)
        assert chosen_letter(said) == letter and not score("choice", said, other), said
    tagged = f"<answer>{other}</answer> {before} <answer>\n{letter}\n</answer>"
    assert score("answer_letter", tagged, letter) and not score("answer_letter", tagged, other)


@pytest.mark.parametrize("seed", range(100))
def test_no_completion_makes_a_scorer_raise(seed):
    rng = random.Random(seed)
    pieces = [
        "Action:",
        "Action Input:",
        "{",
        "}",
        '"',
        "<answer>",
        "</answer>",
        "A",
        "(",
        "**",
        "\n",
        "[1,",
        "answer is",
    ]
    completion = " ".join(rng.choices(pieces, k=rng.randint(0, 30)))
    for name in SCORERS:
        assert score(name, completion, "Action: a\nAction Input: {}" if name == "action" else "A") in (True, False)
