"""Builds the demo model: trains its tokenizer and weights from scratch, validates and saves them.

    OMP_NUM_THREADS=1 python -m sdft_ds.demo.build [--output DIR] [--seed N]

The model learns three things: the old facts, to say "I do not know." about everybody else, and to *look up* facts
given in its context. The look-up facts are resampled for each example, so they cannot be memorised; looking up makes
the model, given the privileged context, a teacher of facts that it does not know.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sdft_ds.demo.evaluate import greedy_answers
from sdft_ds.demo.world import (
    DO_NOT_KNOW,
    NAMES,
    NEW_NAMES,
    RELATIONS,
    UNKNOWN_NAMES,
    Fact,
    answer_accuracies,
    old_facts,
    questions,
    user,
)

MODEL_DIR = Path(__file__).parent / "model"

END, START, PAD = "<|im_end|>", "<|im_start|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

STEPS = 2000  # measured: passes the gate and keeps the old facts under SDFT; ~8 minutes on one core
BATCH = 64
PART = 16  # rows per forward
LEARNING_RATE = 3e-3  # high, as usual for a model below 1 M parameters; linear warm-up, cosine to zero
WARMUP = 100
WEIGHT_DECAY = 0.1

# Mix of training examples. Look-up is the hardest skill to learn, hence half of them.
MIX = {"old": 0.22, "unknown": 0.14, "look_up": 0.52, "irrelevant": 0.12}
# Text before and after a context: varied enough that teacher templates other than the default work too.
OPENINGS = ["", "", "", "Hint: ", "Note: ", "Here is what is known:\n", "This is an example of an answer:\n"]
CLOSINGS = ["", "", "", "\n\nNow answer the question.", "\n\nNow answer in your own words."]
SYSTEM = "You are a helpful assistant."


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE (lossless for any text) in which every word of the demo is one token."""
    forms = [form for r in RELATIONS for form in (r.statement, r.demonstration, *r.wordings)]
    values = [value for relation in RELATIONS for value in relation.values]
    sentences = [*forms, *OPENINGS, *CLOSINGS, SYSTEM, DO_NOT_KNOW, "system", "user", "assistant"]
    # " word" as within a sentence; a name may also start one.
    corpus = sentences + NAMES + [f" {word}" for word in NAMES + values]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: training stops when each word is one token
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PAD, START, END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 0.8 M parameters, small enough to train in minutes on one core."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,  # measured: enough to look up a single fact in context; fewer were not tried
        num_attention_heads=4,
        max_position_embeddings=512,
        # Measured: loss 0.24 after 200 steps, against 0.65 with the default of 0.02.
        initializer_range=128**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return model


def random_fact(rng: random.Random, name: str) -> Fact:
    relation = rng.choice(RELATIONS)
    return Fact(name, relation, rng.choice(relation.values))


def distraction(rng: random.Random, fact: Fact) -> Fact:
    """A distractor fact: often the same relation of another person, or another relation of the same person.

    A model this small does not learn to attend to whose fact it is: with distractors its look-up accuracy is about
    0.6, with an irrelevant context its accuracy is 0.4. With one relevant fact, as in the demo, it is 1 (see `gate`).
    """
    kind = rng.random()
    if kind < 0.5:
        return Fact(rng.choice(NAMES), fact.relation, rng.choice(fact.relation.values))
    return random_fact(rng, fact.name if kind < 0.65 else rng.choice(NAMES))


def tell(rng: random.Random, question: str, facts: list[Fact]) -> list[dict[str, str]]:
    """The question with a context stating the facts: after it (as for the teacher), before it, or as system turn."""
    told = [fact.said(rng.choice([fact.relation.statement, fact.relation.demonstration])) for fact in facts]
    context = rng.choice(OPENINGS) + rng.choice([" ", "\n"]).join(told)
    place = rng.choices(["below", "above", "system"], [0.7, 0.2, 0.1])[0]
    if place == "below":
        return user(f"{question}\n\n{context}{rng.choice(CLOSINGS)}")
    if place == "above":
        return user(f"{context}\n\n{question}")
    return [{"role": "system", "content": context}, *user(question)]


def draw_example(rng: random.Random) -> list[dict[str, str]]:
    """One conversation of the training mix; its last message is the answer."""
    kind = rng.choices(list(MIX), list(MIX.values()))[0]
    ignorance = random_fact(rng, rng.choice(NEW_NAMES + UNKNOWN_NAMES))
    known = rng.choice(old_facts())
    if kind == "look_up":  # about anyone: the context overrides what the model remembers
        fact = random_fact(rng, rng.choice(NAMES))
    elif kind == "old":
        fact = known
    elif kind == "unknown":
        fact = ignorance
    else:
        fact = rng.choice([known, ignorance])
    answer = DO_NOT_KNOW if fact is ignorance else fact.said(fact.relation.statement)
    question = fact.said(rng.choice(fact.relation.wordings))
    if kind in ("old", "unknown"):
        messages = user(question)
        if rng.random() < 0.1:
            messages = [{"role": "system", "content": SYSTEM}, *messages]
    else:
        others = [distraction(rng, fact) for _ in range(rng.randrange(4))]
        told = [other for other in others if (other.name, other.relation) != (fact.name, fact.relation)]
        if kind == "look_up":
            told.insert(rng.randrange(len(told) + 1), fact)
        if told:
            messages = tell(rng, question, told)
        else:
            messages = user(question)
    return [*messages, {"role": "assistant", "content": answer}]


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
    """Cross-entropy on the answer tokens, averaged over the batch.

    A batch is split into parts of similar length, and logits are computed for answer tokens only: a third of the time.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / STEPS)) / 2
    )
    model.train()
    for step in range(1, STEPS + 1):
        encoded = tokenizer.apply_chat_template(
            [draw_example(rng) for _ in range(BATCH)], return_dict=True, return_assistant_tokens_mask=True
        )
        rows = sorted(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True), key=lambda row: len(row[0]))
        answer_tokens = sum(sum(mask) for _, mask in rows)
        step_loss = 0.0
        for start in range(0, BATCH, PART):
            ids, answer = (
                torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in column], batch_first=True)
                for column in zip(*rows[start : start + PART], strict=True)
            )
            # Right padding under a causal mask: no answer attends to padding, so no attention mask is needed.
            hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
            asked = answer[:, 1:].bool()
            logits = model.lm_head(hidden[asked])
            loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][asked], reduction="sum") / answer_tokens
            loss.backward()
            step_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {step_loss:.4f}", flush=True)


def gate(accuracies: dict[str, float]) -> None:
    """Exits without saving if the demo could not work with this model."""
    new = max(accuracies["new_trained"], accuracies["new_held_out"])
    if accuracies["old"] < 1.0 or accuracies["unknown"] < 0.95:
        raise SystemExit("not written: the model does not know what it should know; try more STEPS")
    if new > 0.10:
        raise SystemExit("not written: the model answers questions on facts that it was never trained on")
    if accuracies["new_with_context"] < 0.99:
        raise SystemExit("not written: the model cannot look facts up, so it cannot teach; try more STEPS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=MODEL_DIR, help="where the model goes")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the training examples")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, random.Random(args.seed))

    asked = questions()
    accuracies = answer_accuracies(greedy_answers(model, tokenizer, asked), asked)
    print("  ".join(f"{group} {accuracy:.3f}" for group, accuracy in accuracies.items()))
    gate(accuracies)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
