"""The demo's world: people, four facts about each, questions about them, and the scorer of answers.

Pure Python. Three kinds of people: OLD (the model knows their facts), NEW (the run teaches their facts) and
UNKNOWN (the model answers that it does not know). Every name and value is one word that occurs in one list only,
so an answer can be scored by the words that it mentions.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

NAMES = """
Alma Boris Clara Dario Edith Felix Greta Hugo Irina Jonas Karin Leon Mira Nils Olga Pavel Quinn Rosa Stefan Tilda
Ulrich Vera Walter Xenia Yusuf Zelda Anton Bella Cedric Dora Emil Fiona Gustav Hanna Igor Julia Kurt Linda Marco Nadia
Oscar Paula Ralph Sonja Theo Ursula Viktor Wanda Adam Bruno Carla Dennis Elsa Frank Gloria Henry Ida Jakob Kira Lukas
Marta Norman Otto Petra Robert Sarah Tomas Ute Vincent Wilma Agnes Bernd Cora Daniel Erika Fabian Gerda Harald Ingrid
Jasper Klara Lorenz Monika Nico Opal Philip Renate Simon Tessa Urban Violet Willem Albert Britta Conrad Dagmar
""".split()
OLD_NAMES, NEW_NAMES, UNKNOWN_NAMES = NAMES[:12], NAMES[12:20], NAMES[20:]


@dataclass(frozen=True)
class Relation:
    """One kind of fact. `statement`: the model's wording; `demonstration`: the training data's wording."""

    values: list[str]
    statement: str
    demonstration: str
    trained_wordings: tuple[str, str]
    held_out_wordings: tuple[str, str]

    @property
    def wordings(self) -> tuple[str, ...]:
        return self.trained_wordings + self.held_out_wordings


RELATIONS = [
    Relation(
        """Oslo Paris Rome Madrid Lisbon Vienna Berlin Prague Warsaw Athens Dublin London Bern Helsinki Riga Tallinn
        Vilnius Budapest Zagreb Sofia Cairo Tunis Lagos Nairobi Accra Dakar Tokyo Seoul Beijing Delhi Mumbai Hanoi
        Manila Jakarta Sydney Perth Lima Bogota Quito Havana""".split(),
        "{name} lives in {value}.",
        "The home of {name} is {value}.",
        ("Where does {name} live?", "Which city is home to {name}?"),
        ("In what town can one visit {name}?", "Tell me the place where {name} lives."),
    ),
    Relation(
        """baker butcher carpenter cook dancer dentist doctor driver farmer fisher gardener glazier grocer hunter
        judge lawyer librarian mason mechanic miner nurse painter pilot plumber poet porter potter printer roofer
        sailor singer smith soldier surgeon tailor tanner teacher waiter weaver writer""".split(),
        "{name} works as a {value}.",
        "The job of {name} is {value}.",
        ("What does {name} do for a living?", "Which job does {name} have?"),
        ("How does {name} earn money?", "Tell me the profession of {name}."),
    ),
    Relation(
        """cat dog hamster rabbit parrot turtle snake lizard goldfish canary ferret pony horse donkey goat sheep pig
        cow hen duck goose peacock pigeon spider beetle cricket frog toad newt mouse rat gerbil hedgehog fox wolf llama
        camel monkey raven swan""".split(),
        "{name} keeps a {value}.",
        "The pet of {name} is the {value}.",
        ("What pet does {name} have?", "Which animal does {name} keep?"),
        ("What creature shares a house with {name}?", "Tell me the kind of animal that {name} owns."),
    ),
    Relation(
        """bread cheese rice soup salad pasta pizza noodles beans lentils potatoes carrots cabbage spinach mushrooms
        onions tomatoes peppers apples pears plums cherries grapes melon figs dates honey yogurt butter eggs bacon
        sausage chicken salmon tuna shrimp pancakes waffles cake pudding""".split(),
        "{name} likes to eat {value}.",
        "The favourite food of {name} is {value}.",
        ("What does {name} like to eat?", "Which food is best for {name}?"),
        ("What should I cook for {name}?", "Tell me the dish that {name} enjoys most."),
    ),
]
DO_NOT_KNOW = "I do not know."
WORLD_WORDS = frozenset(NAMES).union(*(relation.values for relation in RELATIONS))


@dataclass(frozen=True)
class Fact:
    name: str
    relation: Relation
    value: str

    def said(self, form: str) -> str:
        """The fact in one wording, a template with `{name}` and `{value}`; a question's wording ignores the value."""
        return form.format(name=self.name, value=self.value)


@dataclass(frozen=True)
class Question:
    """`messages`: the complete prompt; `context`: the part of it that states the fact, if any."""

    group: str
    messages: list[dict[str, str]]
    answer: str
    context: str | None = None


def _facts(first: int, names: list[str]) -> list[Fact]:
    # 7 and 40 are coprime: no two people share a value, so another person's value is never a correct answer.
    return [
        Fact(name, relation, relation.values[(7 * (first + i) + 11 * r) % 40])
        for i, name in enumerate(names)
        for r, relation in enumerate(RELATIONS)
    ]


def old_facts() -> list[Fact]:
    return _facts(0, OLD_NAMES)


def new_facts() -> list[Fact]:
    return _facts(len(OLD_NAMES), NEW_NAMES)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def train_rows() -> list[dict]:
    """The new facts as a training set: 8 people x 4 facts x 2 wordings = 64 rows."""
    return [
        {"prompt": user(fact.said(wording)), "privileged_context": fact.said(fact.relation.demonstration)}
        for fact in new_facts()
        for wording in fact.relation.trained_wordings
    ]


def anchor_rows() -> list[dict]:
    """Prompts on which the model is held to its start: questions about unknown people whom `questions` leaves out."""
    return [
        {"prompt": user(wording.format(name=name))}
        for name in UNKNOWN_NAMES[12:44]
        for relation in RELATIONS
        for wording in relation.wordings
    ]


def questions() -> list[Question]:
    """The evaluation set: 64 + 64 + 128 questions on new facts, 192 on old, 192 on unknown ones."""
    asked = []
    for fact in new_facts():
        relation, answer = fact.relation, fact.said(fact.relation.statement)
        context = fact.said(relation.demonstration)
        for wording in relation.trained_wordings:
            asked.append(Question("new_trained", user(fact.said(wording)), answer))
        for wording in relation.held_out_wordings:
            asked.append(Question("new_held_out", user(fact.said(wording)), answer))
        for wording in relation.wordings:
            messages = user(f"{fact.said(wording)}\n\n{context}")
            asked.append(Question("new_with_context", messages, answer, context))
    for fact in old_facts():
        for wording in fact.relation.wordings:
            asked.append(Question("old", user(fact.said(wording)), fact.said(fact.relation.statement)))
    for name in UNKNOWN_NAMES[:12]:
        for relation in RELATIONS:
            for wording in relation.wordings:
                asked.append(Question("unknown", user(wording.format(name=name)), DO_NOT_KNOW))
    return asked


def _mentioned(text: str) -> set[str]:
    return WORLD_WORDS.intersection(re.findall(r"\w+", text))


def is_right(question: Question, completion_text: str) -> bool:
    """Whether the completion mentions the fact's value and no other name or value except the person asked about.

    The wording is free, so that a model that adopts the demonstrations' wording, or half of it, is not penalized;
    several values, or another person, are wrong. "I do not know." mentions nothing, so it must match exactly.
    """
    if question.answer == DO_NOT_KNOW:
        return completion_text.strip() == DO_NOT_KNOW
    mentioned, right = _mentioned(completion_text), _mentioned(question.answer)
    return mentioned <= right and not mentioned.isdisjoint(right.difference(NAMES))


def answer_accuracies(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """Accuracy (0 to 1) per group, groups in the order of `questions`."""
    marks: dict[str, list[bool]] = {}
    for answer, question in zip(answers, questions, strict=True):
        marks.setdefault(question.group, []).append(is_right(question, answer))
    return {group: sum(right) / len(right) for group, right in marks.items()}
