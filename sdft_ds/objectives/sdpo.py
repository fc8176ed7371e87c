"""Self-distilled policy optimization (SDPO): self-distillation whose privileged context is made after the rollout: a
successful completion of the same prompt, or feedback on the student's own.

    collect   rollouts -> rewards (objectives/feedback.py) -> the group of each prompt, over all ranks -> the teacher's
              prompt of each completion, and its advantage -> as in self-distillation
    loss      distillation_weight x divergence + (1 - distillation_weight) x policy loss, token by token
"""

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdft_ds.data.batch import Rollout
from sdft_ds.data.prompts import fill_template, parse_template
from sdft_ds.data.schedule import Slot
from sdft_ds.loss.normalization import LossWeights
from sdft_ds.loss.policy import MixedTerms, WholeLogits
from sdft_ds.metrics.meters import Meters
from sdft_ds.model.completion_forward import DistillationLoss
from sdft_ds.objectives import feedback
from sdft_ds.objectives.feedback import Answer
from sdft_ds.objectives.protocol import RunParts
from sdft_ds.objectives.sdft import SelfDistillation
from sdft_ds.teacher.scoring import ScoredBatch

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
_LEAST_STD = 1e-4  # added to the standard deviation that advantages are divided by


class SelfDistilledPolicyOptimization(SelfDistillation):
    description = (
        "Self-distilled policy optimization ([SDPO](https://arxiv.org/abs/2601.20802)): a student learned, on its own "
        "answers, to match the same network when it also sees an answer that was rewarded, or feedback on its own."
    )
    makes_contexts = True

    def __init__(self, parts: RunParts):
        super().__init__(parts)
        args = self.args
        functions = parts.reward_funcs
        weights = [1.0] * len(functions) if args.reward_weights is None else args.reward_weights
        if len(weights) != len(functions):
            raise ValueError(f"reward_weights has {len(weights)} values, and there are {len(functions)} rewards.")
        if args.num_generations < 2 and not args.include_environment_feedback:
            raise ValueError(
                f"num_generations={args.num_generations}: a completion has no siblings that could be successful. Set "
                "it to 2 or more, or include_environment_feedback."
            )
        if parts.context_fn is not None and not args.include_environment_feedback:
            raise ValueError(
                "privileged_context_fn returns feedback for the teacher, which include_environment_feedback=False "
                "leaves out: set it to True."
            )
        self.rewards = feedback.Rewards(functions, weights, args.reward_errors, args.reward_timeout)
        self.templates = {
            name: parse_template(getattr(args, f"{name}_template"), f"{name}_template", placeholders)
            for name, placeholders in (
                ("reprompt", ("prompt", "solution", "feedback")),
                ("solution", ("successful_previous_attempt",)),
                ("feedback", ("feedback_raw",)),
            )
        }

    # ---- rewards and contexts of a generation batch -----------------------------------------------------------------

    def example(self, dataset: Any, slot: Slot) -> Any:
        """The row; its privileged context, if it has one, is feedback."""
        row, example = super().example(dataset, slot)
        return row, replace(example, privileged_context=None, teacher_prompt=None)

    def with_feedback(
        self, slots: tuple[Slot, ...], rows: feedback.Rows, rollouts: list[Rollout], key: str, meters: Meters
    ) -> list[Rollout]:
        mine = feedback.answers_of(slots, rows, rollouts, self.parts.tokenizer)
        answers = feedback.gather(self.rewards.rewarded(mine, self.parts.state()))
        comments = self._comments(answers)
        size = self.args.num_generations
        if key == "eval":
            size = self.args.num_generations_eval or size
        groups: dict[int, list[Answer]] = {}
        for answer in answers:
            groups.setdefault(answer.row // size, []).append(answer)
        advantages = self._advantages(groups)
        found = []
        for rollout, slot in zip(rollouts, slots, strict=True):
            if slot.anchor or not rollout.counted:
                found.append(rollout)
                continue
            siblings = groups[rollout.row // size]
            own = next(answer for answer in siblings if answer.row == rollout.row)
            prompts = self._reprompted(rollout, slot.index, self._solution(own, siblings), comments.get(own.row))
            meters.add("contexts/made_share", prompts is not None)
            self._count(own, siblings, meters)
            rollout = replace(rollout, reward=own.reward, advantage=advantages[own.row])
            rollout = self.learning_from(prompts or rollout.prompts, rollout, meters)
            # The policy loss learns of every completion.
            found.append(replace(rollout, in_loss=rollout.in_loss or self._mixes))
        padded = self._padded(found, None)
        names = ("teacher_input_ids", "teacher_attention_mask", "completion_mask", "self_distillation_mask")
        self.parts.dispatch("on_teacher_context_built", lambda: {name: padded[name] for name in names})
        return found

    @property
    def _mixes(self) -> bool:
        return self.args.distillation_weight < 1.0

    def _comments(self, answers: list[Answer]) -> dict[int, str | None]:
        """Row number -> feedback on it, where the teacher is to see any. Collective."""
        if not self.args.include_environment_feedback:
            return {}
        made = feedback.contexts(self.parts.context_fn, answers) if self.parts.context_fn is not None else {}
        stored = {answer.row: feedback.stored_context(answer) for answer in answers}
        return {row: made.get(row) or stored[row] for row in stored if made.get(row) or stored[row]}

    def _succeeds(self, answer: Answer) -> bool:
        return answer.reward is not None and answer.reward >= self.args.success_reward_threshold

    def _solution(self, own: Answer, siblings: list[Answer]) -> str | None:
        """The first successful completion of the prompt, if there is one that the teacher may see."""
        if not self.args.use_successful_as_teacher:
            return None
        for each in siblings:
            if self._succeeds(each) and not (each is own and self.args.dont_reprompt_on_self_success):
                text = (
                    _THINKING.sub("", each.text).strip() if self.args.remove_thinking_from_demonstration else each.text
                )
                return text.replace("\0", "")
        return None

    def _reprompted(self, rollout: Rollout, index: int, solution: str | None, comment: str | None) -> Any:
        """The prompts with what the teacher sees; None if there is nothing. What does not fit is cut off the solution,
        or off the feedback if there is none."""
        if solution is not None and self.args.environment_feedback_only_without_solution:
            comment = None
        if solution is None and comment is None:
            return None

        def fill(question: str, text: str) -> str:
            shown, said = (text, comment) if solution is not None else (None, text)
            return fill_template(self.templates["reprompt"], {
                "prompt": question,
                "solution": self._filled("solution", "successful_previous_attempt", shown),
                "feedback": self._filled("feedback", "feedback_raw", said),
            })  # fmt: skip

        text = solution if solution is not None else comment
        return self.prompts_with(rollout.prompts, text, index, fill, self.args.max_reprompt_len)

    def _filled(self, template: str, placeholder: str, text: str | None) -> str:
        return "" if text is None else fill_template(self.templates[template], {placeholder: text})

    def _advantages(self, groups: dict[int, list[Answer]]) -> dict[int, float]:
        """Row number -> (reward - mean of its group) / standard deviation; 0 where the reward is unknown."""
        known = {number: [each for each in group if each.reward is not None] for number, group in groups.items()}
        everything = _std([each.reward for group in known.values() for each in group])
        found = {each.row: 0.0 for group in groups.values() for each in group}
        for group in known.values():
            rewards = [each.reward for each in group]
            scale = {"group": _std(rewards), "batch": everything, "none": 1.0}[self.args.scale_rewards]
            for each in group:
                found[each.row] = (each.reward - sum(rewards) / len(rewards)) / (scale + _LEAST_STD)
        return found

    def _count(self, own: Answer, siblings: list[Answer], meters: Meters) -> None:
        meters.add("rewards/unknown", own.reward is None)
        if own.reward is not None:
            meters.add("rewards/mean", own.reward)
        # Each completion counts for its prompt: all prompts have equally many.
        meters.add("rewards/std", _std([each.reward for each in siblings if each.reward is not None]))
        meters.add("rewards/success_share", any(map(self._succeeds, siblings)))

    def _padded(self, rollouts: list[Rollout], old: list[Tensor] | None) -> dict[str, Tensor | None]:
        padded = super()._padded(rollouts, old)
        width = padded["completion_ids"].shape[1]
        lengths = torch.tensor([len(rollout.completion.ids) for rollout in rollouts]).unsqueeze(1)
        mask = (torch.arange(width) < lengths).long().to(self.args.device)
        learns = torch.tensor([float(_learns(rollout)) for rollout in rollouts], device=self.args.device)
        return {**padded, "completion_mask": mask, "self_distillation_mask": learns}

    # ---- the loss ---------------------------------------------------------------------------------------------------

    @property
    def loss_factor(self) -> float:
        return 1.0  # the shares of both losses are in the terms

    def loss_request(
        self, scored: ScoredBatch, weights: LossWeights, inspect_M: Tensor | None = None
    ) -> DistillationLoss:
        request = super().loss_request(scored, weights, inspect_M)
        if not self._mixes:
            return request
        args, rows_N, device = self.args, scored.batch.rows_N, self.args.device
        of_rows = [[rollout.advantage, float(_learns(rollout))] for rollout in scored.batch.rollouts]
        advantages_N, distills_N = torch.tensor(of_rows, device=device)[rows_N].unbind(1)
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        terms = {**vars(request.terms), "divergence": WholeLogits(**vars(args.divergence), inner=args.divergence)}
        return replace(
            request,
            terms=MixedTerms(
                **terms, weight=args.distillation_weight, clip=(1.0 - args.epsilon, 1.0 + high),
                advantages_N=advantages_N, distills_N=distills_N,
                anchors_N=scored.batch.anchor_N, divergence_N=torch.zeros_like(advantages_N),
                policy_N=torch.zeros_like(advantages_N), clipped_N=torch.zeros_like(advantages_N),
            ),
        )  # fmt: skip

    def record(self, request: DistillationLoss, meters: Meters) -> None:
        if self._mixes:
            terms = request.terms
            count = len(terms.policy_N) if terms.anchors_N is None else (~terms.anchors_N).sum()
            meters.add("policy/loss", terms.policy_N.sum(), count)
            meters.add("policy/clip_share", terms.clipped_N.sum(), count)
            request.per_token_N = terms.divergence_N


def _learns(rollout: Rollout) -> bool:
    """Whether a completion has a teacher to match."""
    return rollout.prompts.anchor or rollout.prompts.has_context


def _std(values: list[float]) -> float:
    """The sample standard deviation, 0 for fewer than two values."""
    return torch.tensor(values, dtype=torch.float64).std().item() if len(values) > 1 else 0.0
