"""Random work whose rows differ from rank to rank, for a whole engine at once: what each rank does is recorded."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from sdft_ds import SDFTTrainer
from sdft_ds.data.schedule import Slot
from sdft_ds.distributed import ranks, zero
from sdft_ds.evaluation.task_evaluation import TaskEvaluation
from sdft_ds.evaluation.tasks import Task, TaskRow
from sdft_ds.model import prefix_cache
from sdft_ds.objectives.protocol import BatchUse
from sdft_ds.rollouts.sampler import NonFiniteLogits
from sdft_ds.teacher.scoring import Scorer
from tests.distributed.collective_recorder import Board, Diverged, recording
from tests.helpers import tiny
from tests.helpers.trainers import make_trainer, train

LONG = "word " * 60


def rows(draw: random.Random, count: int) -> list[dict[str, Any]]:
    """Rows of which some prompts and contexts are far longer than others."""
    return [
        {
            "prompt": [{"role": "user", "content": LONG[: draw.choice((1, 5, 40, 200))]}],
            "privileged_context": LONG[: draw.choice((1, 10, 150))],
        }
        for _ in range(count)
    ]


class Cases:
    """Random cases for one trainer. Every rank draws the same; `mine` is what is drawn for this rank alone."""

    def __init__(self, trainer: SDFTTrainer):
        self.trainer = trainer
        self.tasks = TaskEvaluation(trainer, [Task("t", [TaskRow("?", "a", "exact")])]).examination

    def run(self, number: int) -> str:
        """Case `number`; its kind. Settings that it changes are put back."""
        args, sampler = self.trainer.args, self.trainer.rollouts.sampler
        draw = random.Random(number)
        self.mine = random.Random(f"{number}/{ranks.rank()}")
        kept, sampling = dict(vars(args)), sampler.sampling
        try:
            args.scoring_batch_tokens = draw.choice((1, 150, 400, 16384))
            args.num_generations = draw.choice((1, 1, 2, 3))
            args.num_loss_tokens_to_skip = draw.choice((0, 2))
            args.generate_from_teacher = draw.random() < 0.2
            args.num_iterations = draw.choice((1, 2))  # with 2 the log-probabilities of old rollouts are asked for
            sampler.batch_tokens = draw.choice((None, 1, 300))
            options = {"max_new_tokens": draw.choice((1, 1, 1, 2, 4)), "do_sample": draw.random() < 0.8}
            # All tokens end a completion, on one rank perhaps: nothing is left for the loss.
            ends = list(range(264)) if self.mine.random() < 0.2 else list(range(0, 264, 4))
            sampler.sampling = replace(sampling, options={**sampling.options, **options}, eos_token_ids=ends)
            kind = draw.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
            KINDS[kind][0](self, draw)
        finally:
            vars(args).update(kept)
            sampler.sampling, sampler.batch_tokens = sampling, None
        return kind

    def generation_batch(self, draw: random.Random) -> None:
        """As many micro-batches on every rank, of rows that differ; scored, and perhaps the loss of one."""
        trainer, size = self.trainer, draw.randint(1, 2)
        count = size * draw.randint(1, 2)
        dataset = rows(self.mine, count)
        slots = tuple(
            Slot(i // trainer.args.num_generations, i, counted=self.mine.random() < 0.9) for i in range(count)
        )
        use = BatchUse(size, keep_on=trainer.args.device, outlives_step=draw.random() < 0.5)
        scored = trainer.objective.collect(dataset, slots, "train/0", trainer.meters["train"], use)
        for inputs in trainer.with_loss_weights(scored)[: draw.randint(0, 1)]:
            trainer.prediction_step(trainer.model_wrapped, {**inputs, "batches": 1}, True)

    def scoring(self, draw: random.Random) -> None:
        """Not even as many rows on every rank."""
        count = self.mine.randint(1, 4)
        dataset = rows(self.mine, count)
        slots = tuple(Slot(i // self.trainer.args.num_generations, i) for i in range(count))
        use = BatchUse(1, keep_on=self.trainer.args.device, outlives_step=True)
        self.trainer.objective.collect(dataset, slots, "train/1", self.trainer.meters["train"], use)

    def rollout(self, draw: random.Random) -> None:
        """A user's own call, of any number of rows and of none."""
        count = self.mine.randint(0, 4)
        prompts = [[1] * self.mine.choice((1, 5, 80)) for _ in range(count)]
        assert len(self.trainer.rollouts.generate(prompts, [f"a/{i}" for i in range(count)])) == count

    def non_finite(self, draw: random.Random) -> None:
        """Logits of one rank are not numbers: the run ends everywhere, by the same error."""
        sick = draw.randrange(ranks.world_size())
        head = self.trainer.model.get_output_embeddings()
        hook = head.register_forward_hook(lambda module, inputs, logits: logits * float("nan"))
        if ranks.rank() != sick:
            hook.remove()
        try:
            self.trainer.rollouts.generate([[1, 2], [3]], [f"train/7/{ranks.rank()}", "train/7/5"])
        except NonFiniteLogits as error:
            assert f"rollout of train/7, rows {sick}, 5" in str(error), error
        else:
            raise AssertionError("nothing was raised")
        finally:
            hook.remove()

    def evaluation(self, draw: random.Random) -> None:
        self.trainer.args.num_generations_eval = draw.choice((1, 2))
        self.trainer.evaluate(Dataset.from_list(rows(draw, draw.randint(1, 5))))

    def questions(self, draw: random.Random) -> None:
        """An evaluation task, or the retention set twice."""
        name = draw.choice(("task", "retention"))
        asked = [TaskRow(LONG[: draw.choice((1, 5, 40, 200))], "a", "exact") for _ in range(draw.randint(1, 5))]
        self.tasks.tasks, self.tasks.start = [Task(name, asked)], None
        self.tasks.__post_init__()
        for _ in range(2 if name == "retention" else 1):
            self.tasks.evaluate()


KINDS: dict[str, tuple[Callable[[Cases, random.Random], None], int]] = {
    "generation batch": (Cases.generation_batch, 40),
    "scoring": (Cases.scoring, 30),
    "rollout": (Cases.rollout, 10),
    "non-finite": (Cases.non_finite, 5),
    "evaluation": (Cases.evaluation, 8),
    "questions": (Cases.questions, 7),
}


@contextmanager
def batches_alone() -> Iterator[list[int]]:
    """The number of scoring batches that this rank's own rows need, for each pass inside."""
    found: list[int] = []
    plain = Scorer._batches

    def counting(self: Scorer, lengths: list[int], prompts: list[list[int]]) -> list[list[int]]:
        found.append(len(prefix_cache.batches_within(self.tokens_per_batch, lengths, prompts)))
        return plain(self, lengths, prompts)

    Scorer._batches = counting
    try:
        yield found
    finally:
        Scorer._batches = plain


def same_collectives(stage: int | None, board: str, cases: range, **settings: Any) -> dict[str, Any]:
    """Train two steps, and do `cases` before the first (an eighth of them) and after it; what was done."""
    trainer = make_trainer(stage, model=tiny.llama(num_hidden_layers=1), max_steps=2, rows=4, **settings)
    work = Cases(trainer)
    done: list[str] = []

    class BetweenSteps(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            done.extend(work.run(case) for case in cases[: len(cases) // 8])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                done.extend(work.run(case) for case in cases[len(cases) // 8 :])

    trainer.add_callback(BetweenSteps())
    with batches_alone() as alone, recording(Board(board)) as recorder:
        trainer.train()
    finite = all(bool(copy.isfinite().all()) for copy in zero.full_copies(list(trainer.model.parameters())))
    return {"done": done, "collectives": len(recorder.seen), "alone": alone, "finite": finite}


def forwards_of_one_rank_more(stage: int, board: str) -> str:
    """What is said where a rank makes one forward more than the other."""
    trainer = make_trainer(stage, max_steps=1)

    class OneMore(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            with torch.no_grad(), zero.scoring_pass(trainer.model_wrapped) as forward:
                for _ in range(1 + ranks.rank()):
                    forward(input_ids=torch.tensor([[1, 2, 3]]))

    trainer.add_callback(OneMore())
    try:
        with recording(Board(board)):
            trainer.train()
    except Diverged as error:
        return str(error)
    return ""


def train_on_rows_of_unlike_length(stage: int | None = None, **settings: Any) -> dict[str, Any]:
    """As `train`, on rows of which two in five have a context of 300 words and the others one of 4."""
    asked = [
        {"prompt": [{"role": "user", "content": f"Question {i}?"}], "privileged_context": "word " * length}
        for i, length in enumerate([300, 4, 4, 300, 4] * 12)
    ]
    with batches_alone() as alone:
        model = tiny.llama(max_position_embeddings=2048)
        trained = train(stage, rows=asked, model=model, num_generations=1, max_steps=2, **settings)
    return {**trained, "alone": alone}
