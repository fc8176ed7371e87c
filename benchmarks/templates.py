"""What a model says as the teacher, by the template that shows it the context: the choice of the recipe's template.

    python -m benchmarks.templates --model FOLDER [--tasks facts other-ten] [--after 0 4 6] [--templates NAME ...]

Of the invented facts of benchmarks.learning those that the model answers right where their context is shown, greedily:
from the beginning, and after the first tokens of what it says without a context. A rollout is the student's, so a
teacher has to find back to the fact from the student's beginnings. Odd: answers that begin neither like the context
nor with "The", such as those in quotation marks or with words of the template.
"""

import argparse

from benchmarks.greedy import Model
from benchmarks.learning import REPLY, SENTENCE, user
from benchmarks.learning_data import INVENTED, TOLD
from sdft_ds.config.recipes import FACTS_TEMPLATE, RECIPES
from sdft_ds.evaluation.scorers import score

TEMPLATES = {
    "recipe": FACTS_TEMPLATE,
    "this sentence": SENTENCE,
    "this reply": "{prompt}\n\n{privileged_context}\n\nRepeat this reply word for word.",
    "with this": "{prompt}\n\n{privileged_context}\n\nReply with this sentence, word for word.",
    "reply": REPLY,
    "exactly": TOLD,
    "quoted": '{prompt}\n\n"{privileged_context}"\n\nReply to the question like this.',
    "thrice": "{prompt}\n\n" + "{privileged_context}\n" * 3 + "\nReply to the question like this.",
    "example": "Question: {prompt}\nAnswer: {privileged_context}\n\nQuestion: {prompt}",
    "trl": RECIPES["trl"]["teacher_prompt_template"],
}


def is_odd(answer: str, context: str) -> bool:
    first = answer.split()[:1]
    return first not in (context.split()[:1], ["The"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", nargs="+", choices=list(INVENTED), default=["facts", "other-ten"])
    parser.add_argument("--after", type=int, nargs="+", default=[0, 4, 6], help="tokens of the model's own beginning")
    parser.add_argument("--templates", nargs="+", choices=list(TEMPLATES), default=list(TEMPLATES))
    parser.add_argument("--longest", type=int, default=14, help="most tokens of an answer")
    args = parser.parse_args()
    model = Model(args.model, args.longest)
    facts = [fact for task in args.tasks for fact in INVENTED[task]]
    own = model.answers([user(question) for question, *_ in facts])
    print(f"| template | {' | '.join(f'right after {count}' for count in args.after)} | odd |")
    print("|---" * (2 + len(args.after)) + "|", flush=True)
    for name in args.templates:
        prompts = [user(TEMPLATES[name].format(prompt=q, privileged_context=context)) for q, _, context, _ in facts]
        cells, odd = [], 0
        for count in args.after:
            texts = model.texts(model.answers(prompts, [answer[:count] for answer in own]))
            cells.append(sum(score("contains", text, answer) for text, (*_, answer) in zip(texts, facts, strict=True)))
            if count == 0:
                odd = sum(is_odd(text, context) for text, (_, _, context, _) in zip(texts, facts, strict=True))
        print(f"| {name} | {' | '.join(map(str, cells))} | {odd} |", flush=True)


if __name__ == "__main__":
    main()
