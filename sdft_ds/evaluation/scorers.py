"""Scorers: pure functions (completion text, reference answer) -> correct or not, and the table of them by name.

A reference that a scorer cannot use raises ValueError for any completion, so scoring an empty completion validates a
task file.
"""

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

Action = tuple[str, Any]  # (name, input as JSON values)

# A letter at the start of a text that is an answer, not the article "a": alone, or set off from what follows.
_OPENING = re.compile(r"[\s(\[*`\"']*([A-Za-z])(?=[\s)\]*`\"']*(?:$|\n|[.:,)\]*]))")
_STATED = re.compile(r"(?i:\b(?:answer|choice|option)\b\W*(?:is|:|=)?)[\s(\[*`\"'{:]*([A-Z])(?![\w'])")
_MARKED = re.compile(r"\*\*\W{0,2}([A-Z])\W{0,2}\*\*|\(([A-Z])\)|\\boxed\{\W{0,2}(?:\\text\{)?([A-Z])\}")
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*)</answer>", re.DOTALL)
_ACTION = re.compile(r"\bAction\s*:[\s*`]*(.*?)[\s*`]*\bAction[ _]Input\s*:[\s*`]*(?:json\b\s*)?")
# Scripts that write words without spaces or with endings attached: Thai and Lao, Burmese, Khmer, Japanese, Chinese,
# Korean.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
)
_WITHIN_NUMBER = re.compile(r"\d[.,]\d")
_ACTION_MARK = re.compile(r"\bAction\s*:")


def score(name: str, completion: str, answer: Any) -> bool:
    """Whether scorer `name` accepts the completion; with a list of texts, for at least one of them.

    Raises ValueError for an unknown scorer and for an answer that it cannot use.
    """
    if name not in SCORERS:
        raise ValueError(f"there is no scorer {name!r}; there are {', '.join(SCORERS)}")
    several = isinstance(answer, list) and answer and all(isinstance(each, str) for each in answer)
    return any([SCORERS[name](completion, each) for each in (answer if several else [answer])])


def exact(completion: str, answer: Any) -> bool:
    """Equal text, ignoring case, whitespace and trailing punctuation."""
    return _normalised(completion) == _wanted(answer)


def contains(completion: str, answer: Any) -> bool:
    """The answer occurs in the completion at word boundaries, ignoring case and whitespace.

    4 is in "4 legs" and "(4)", but not in "45", "4.5" or "1,4". In scripts that write words without spaces or attach
    endings to them (Chinese, Japanese, Korean, Thai, ...), the answer may touch other letters.
    """
    wanted, text = _wanted(answer), _normalised(completion)
    start = text.find(wanted)
    while start >= 0:
        if _is_boundary(text, start) and _is_boundary(text, start + len(wanted)):
            return True
        start = text.find(wanted, start + 1)
    return False


def choice(completion: str, answer: Any) -> bool:
    """`chosen_letter` of the completion is the answer's letter."""
    return _letter(answer) == chosen_letter(completion)


def answer_letter(completion: str, answer: Any) -> bool:
    """The last `<answer>...</answer>` of the completion contains the letter."""
    wanted, tagged = _letter(answer), _TAGGED.findall(completion)
    return bool(tagged) and wanted == _opening_letter(tagged[-1])


def regex(completion: str, answer: Any) -> bool:
    """The answer, a regular expression, matches somewhere in the completion."""
    try:
        return re.search(_text(answer), completion) is not None
    except re.error as error:
        raise ValueError(f"{answer!r} is not a regular expression: {error}") from None


def action(completion: str, answer: Any) -> bool:
    """The completion calls the same tools in the same order with the same inputs; see `actions` and `same_json`.

    answer: text with `Action: NAME` and `Action Input: JSON`, or one or more objects with those two keys.
    """
    wanted = _wanted_actions(answer)
    try:
        made = actions(completion)
    except ValueError:
        return False
    return len(made) == len(wanted) and all(
        mine == its and same_json(my_input, its_input)
        for (mine, my_input), (its, its_input) in zip(made, wanted, strict=True)
    )


SCORERS: dict[str, Callable[[str, Any], bool]] = {
    each.__name__: each for each in (exact, contains, choice, answer_letter, regex, action)
}


def chosen_letter(text: str) -> str | None:
    """The letter that a multiple-choice completion selects, in upper case, or None.

    The first match of: the content of the last `<answer>`; the last "the answer is B"; a last line that is a letter; a
    letter at the start of the text (`B`, `B. because`, `(B) 56 pC`); the last marked letter (`**B**`, `(B)`,
    `\\boxed{B}`).
    """
    if tagged := _TAGGED.findall(text):
        return _opening_letter(tagged[-1])
    if stated := _STATED.findall(text):
        return stated[-1]
    last_line = text.strip().rpartition("\n")[2]
    if alone := re.fullmatch(r"\W*([A-Za-z])\W*", last_line):
        return alone.group(1).upper()
    if opening := _opening_letter(text):
        return opening
    marked = _MARKED.findall(text)
    return "".join(marked[-1]) if marked else None


def actions(text: str) -> list[Action]:
    """Every `Action: NAME` with its `Action Input: JSON`, in order. Raises ValueError if one has no valid input."""
    found, at = [], 0
    while match := _ACTION.search(text, at):
        if _ACTION_MARK.search(text, at, match.start()):
            break
        value, at = _JSON.raw_decode(text, match.end())
        found.append((match.group(1), value))
    if _ACTION_MARK.search(text, at):
        raise ValueError("an Action has no Action Input")
    return found


def same_json(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal. A string that contains a JSON object or list is parsed, whitespace in strings
    is ignored, and a number or a boolean equals its string form."""
    a, b = _unpacked(a), _unpacked(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    if isinstance(a, str) != isinstance(b, str):
        a, b = _parsed(a), _parsed(b)
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def _parsed(value: Any) -> Any:
    """A string parsed as JSON; any other value, or text that is not JSON, unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return _JSON.decode(value.lower() if value.lower() in ("true", "false", "null") else value)
    except ValueError:
        return value


def _unpacked(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    parsed = _parsed(value)
    return parsed if isinstance(parsed, dict | list) else " ".join(value.split())


def _wanted_actions(answer: Any) -> list[Action]:
    if isinstance(answer, str):
        wanted = actions(answer)
    else:
        wanted = [_action_of(each) for each in (answer if isinstance(answer, list) else [answer])]
    if not wanted:
        raise ValueError("the answer names no Action")
    return wanted


def _action_of(answer: Any) -> Action:
    fields = answer if isinstance(answer, dict) else {}
    fields = {key.lower().replace("_", " "): value for key, value in fields.items()}
    if not isinstance(fields.get("action"), str) or "action input" not in fields:
        raise ValueError(f"expected an object with Action and Action_Input, found {answer!r}")
    return fields["action"], fields["action input"]


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split()).rstrip(" .,;:!?")


def _is_boundary(text: str, at: int) -> bool:
    """Whether a word or number may start or end before character `at`."""
    if at in (0, len(text)):
        return True
    before, after = text[at - 1], text[at]
    if unicodedata.category(after).startswith("M"):  # a combining mark belongs to the letter before it
        return False
    if _is_of_word(before) and _is_of_word(after):
        return bool(_UNSPACED.match(before) or _UNSPACED.match(after))
    return not _WITHIN_NUMBER.search(text[max(0, at - 2) : at + 2])


def _is_of_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character).startswith("M") or character == "_"


def _wanted(answer: Any) -> str:
    wanted = _normalised(_text(answer))
    if not wanted:
        raise ValueError("the answer is empty")
    return wanted


def _text(answer: Any) -> str:
    if not isinstance(answer, str):
        raise ValueError(f"the answer is {answer!r}; expected a text or a list of texts")
    return answer


def _letter(answer: Any) -> str:
    alone = re.fullmatch(r"\W*([A-Za-z])\W*", _text(answer))
    if alone is None:
        raise ValueError(f"the answer is {answer!r}; expected one letter")
    return alone.group(1).upper()


def _opening_letter(text: str) -> str | None:
    opening = _OPENING.match(text)
    return opening.group(1).upper() if opening else None
