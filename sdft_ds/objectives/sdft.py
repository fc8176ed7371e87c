"""Self-distillation: the student completes its prompt; the teacher, the same network also shown the privileged
context, scores each completion token; the loss is the divergence between the two distributions.

    collect      prompts -> rollouts (rollouts/) -> contexts made after them, where there is a function for it
                 (objectives/feedback.py) -> teacher hidden states (teacher/scoring.py) -> micro-batches
    loss         student forward, and the divergence of its loss tokens in chunks (loss/)
    after_step   teacher update, for kinds that have one (teacher/)
"""

from collections.abc import Callable
from dataclasses import replace
from weakref import WeakValueDictionary

import torch
from datasets import Dataset
from torch import Tensor, nn

from sdft_ds import teacher
from sdft_ds.config import validate
from sdft_ds.data.batch import MicroBatch, Rollout, bucket_by_length, pad_left, pad_right
from sdft_ds.data.prompts import PromptPair
from sdft_ds.data.rows import DataError
from sdft_ds.data.schedule import Slot
from sdft_ds.data.streams import Stream
from sdft_ds.distributed import ranks
from sdft_ds.loss.chunked import HeadValues, LossTerms
from sdft_ds.loss.normalization import LossWeights
from sdft_ds.metrics.collapse import CollapseGuard
from sdft_ds.metrics.completions import CompletionLog
from sdft_ds.metrics.inspector import Inspector
from sdft_ds.metrics.meters import Meters
from sdft_ds.metrics.mismatch import MismatchGuard
from sdft_ds.model.completion_forward import DistillationLoss
from sdft_ds.objectives import feedback, generation_batch
from sdft_ds.objectives.protocol import BatchUse, GenerationBatch, InFlight, Objective, RunParts, key_of
from sdft_ds.rollouts.draws import uniforms
from sdft_ds.teacher import Teacher, state
from sdft_ds.teacher.scoring import ScoredBatch, Scorer


class SelfDistillation(Objective):
    description = (
        "Self-distilled fine-tuning ([SDFT](https://arxiv.org/abs/2601.19897)): a student that sees only the prompt "
        "learned, on its own answers, to match the same network when it also sees a demonstration or a hint."
    )
    takes_contexts = True

    def __init__(self, parts: RunParts):
        super().__init__(parts)
        args = self.args
        if parts.prompts.context_optional:
            validate.refuse_rollouts_from_teacher(args)
        self.start_model = None if parts.anchors is None else self._model_at_the_start()
        self.teacher = teacher.make(parts.model, args)
        if args.save_teacher and not self.teacher.has_state:
            raise ValueError(
                f"save_teacher=True: a {args.teacher_model_kind} teacher has no weights of its own here, as an EMA "
                "teacher has (teacher_model_kind='ema'). Leave save_teacher False."
            )
        if args.load_best_model_at_end and args.save_only_model and self.teacher.has_state:
            raise ValueError(
                f"load_best_model_at_end loads the best checkpoint's {args.teacher_model_kind} teacher, too, which "
                "save_only_model leaves out: set save_only_model=False."
            )
        self.completion_log = CompletionLog(args, parts.tokenizer, ranks.rank() == 0)
        self.inspector = Inspector(args, self.completion_log)
        self.callbacks = [self.completion_log, CollapseGuard(held=parts.anchors is not None), MismatchGuard()]
        self.weights_version = 0  # of the student's: optimizer steps of this process
        # (version of the weights, whether its batch outlives a step) -> the teacher's head, while a batch holds it.
        self.head_of_step: WeakValueDictionary[tuple[int, bool], HeadValues] = WeakValueDictionary()
        self.in_flight: InFlight | None = None  # rollout of the next generation batch, with rollout_lag

    def _model_at_the_start(self) -> Teacher | None:
        """What anchors hold the student to, where that is not the teacher itself, a base teacher."""
        kind = self.args.teacher_model_kind
        if kind in (None, "base"):
            self.args.teacher_model_kind = "base"
            return None
        start = teacher.adapter_off(self.parts.model, self.args)
        if start is None:
            raise ValueError(
                f"Anchors hold the student to the model at the start, and the teacher is {kind}: set "
                "teacher_model_kind=base, train a LoRA adapter that leaves the head alone, or leave anchor_dataset "
                "(--anchor_path) out."
            )
        return start

    # ---- a generation batch -----------------------------------------------------------------------------------------

    def collect(
        self, dataset: Dataset | Stream, slots: tuple[Slot, ...], key: str, meters: Meters, use: BatchUse
    ) -> list[ScoredBatch]:
        with meters.phase("rollout"):
            version, rollouts, rows = self._rolled_out(dataset, slots, key, meters, use)
        if self.parts.prompts.context_optional:
            with meters.phase("feedback"):
                rollouts = self.with_feedback(slots, rows, rollouts, key, meters)
        with meters.phase("teacher"):
            scorer = self.scorer(use.keep_on)
            old = self._old_log_probs(scorer, rollouts)
            self.parts.dispatch("on_self_distillation_batch_prepared", lambda: self._padded(rollouts, old))
            states = scorer.score(rollouts, head_changes=use.outlives_step)
        head = self._one_per_step(states.head, use) if meters.training else states.head
        number = {rollout.row: i for i, rollout in enumerate(rollouts)}
        scored = []
        for rows in bucket_by_length(rollouts, use.micro_batch_size, use.batches_per_step):
            at = [number[rollout.row] for rollout in rows]
            first = [self.args.loss_mask.first_token(rollout) for rollout in rows]
            old_N = torch.cat([old[i][start:] for i, start in zip(at, first, strict=True)]) if old else None
            batch = self.collate(rows)
            sampler_N = self._sampler_log_probs(rows)
            hidden_ND = torch.cat([states.hidden[i] for i in at])
            scored.append(ScoredBatch(batch, hidden_ND, head, old_N, sampler_N, version))
            meters.count_positions(batch)
        return scored

    def _one_per_step(self, head: HeadValues | None, use: BatchUse) -> HeadValues | None:
        """The teacher's head that an earlier generation batch of the same step holds, which is the same, so that the
        step does not keep a copy for each of them."""
        kept = self.head_of_step.get((self.weights_version, use.outlives_step))
        if kept is None and head is not None:
            self.head_of_step[self.weights_version, use.outlives_step] = kept = head
        return kept

    def _rolled_out(
        self, dataset: Dataset | Stream, slots: tuple[Slot, ...], key: str, meters: Meters, use: BatchUse
    ) -> tuple[int, list[Rollout], feedback.Rows]:
        """(version of the weights that they were sampled from, one rollout per slot, the row of each slot). Begins the
        upcoming batch's."""
        if self.in_flight is not None and self.in_flight.key == key:
            begun, self.in_flight = self.in_flight, None
        else:
            begun = self.begin_rollout(dataset, slots, key, meters, use.progress)
        rollouts = begun.wait()
        rows = begun.rows or [self.example(dataset, slot) for slot in slots]  # before a stream's next ones are read
        meters.count_completions(rollouts)
        if use.upcoming is not None:
            following = key_of(use.upcoming.generation_batch)
            self.in_flight = self.begin_rollout(dataset, use.upcoming.slots, following, meters, use.progress)
        return begun.weights_version, rollouts, rows

    def begin_rollout(
        self, dataset: Dataset | Stream, slots: tuple[Slot, ...], key: str, meters: Meters, progress: float = 1.0
    ) -> InFlight:
        """Begin one rollout per slot, from the student's prompt, or the teacher's: with generate_from_teacher, and of
        some rows with teacher_rollout_fraction. progress: see BatchUse."""
        prompts = self.parts.prompts
        examples = [self.example(dataset, slot) for slot in slots]
        pairs = [prompts.build(example, slot.index) for (_, example), slot in zip(examples, slots, strict=True)]
        for side in ("student", "teacher"):
            meters.add(f"prompts/{side}_cut", prompts.counts.pop(f"{side}_prompts_cut", 0))
        keys = [f"{key}/{slot.row}" for slot in slots]
        share = self._share_from_teacher(progress)
        from_teacher = [self._is_from_teacher(each, share) for each in keys]
        chosen = [pair.teacher if other else pair.student for pair, other in zip(pairs, from_teacher, strict=True)]
        self.parts.dispatch(
            "on_generation_prompts_selected",
            lambda: {
                "generation_prompts": [rendered.prompt for rendered in chosen],
                "generation_prompt_text": [rendered.text for rendered in chosen],
            },
        )
        completions = self.parts.rollouts.begin([rendered.ids for rendered in chosen], keys)

        def wait() -> list[Rollout]:
            # After the teacher's prompt the sampler's log-probabilities are not the student's.
            known = [
                replace(completion, log_probs=None) if other else completion
                for completion, other in zip(completions(), from_teacher, strict=True)
            ]
            rows = zip(slots, pairs, known, strict=True)
            return [Rollout(slot.row, pair, completion, slot.counted) for slot, pair, completion in rows]

        return InFlight(key, self.weights_version, wait, examples)

    def with_feedback(
        self, slots: tuple[Slot, ...], rows: feedback.Rows, rollouts: list[Rollout], key: str, meters: Meters
    ) -> list[Rollout]:
        """The rollouts with the contexts that are made of them. Called by all ranks together, where there are any."""
        answers = feedback.answers_of(slots, rows, rollouts, self.parts.tokenizer)
        made = feedback.contexts(self.parts.context_fn, feedback.gather(answers))
        found = []
        for rollout, slot in zip(rollouts, slots, strict=True):
            context = made.get(rollout.row)
            prompts = None
            if context is not None:
                prompts = self.prompts_with(rollout.prompts, context, slot.index)
            if rollout.counted and not slot.anchor:
                meters.add("contexts/made_share", prompts is not None)
            found.append(self.learning_from(prompts or rollout.prompts, rollout, meters))
        return found

    def prompts_with(
        self, pair: PromptPair, context: str, index: int, fill: Callable[[str, str], str] | None = None,
        limit: int | None = None,
    ) -> PromptPair | None:  # fmt: skip
        """The prompts with this context; None if it does not fit. fill, limit: see PromptBuilder.with_context."""
        try:
            return self.parts.prompts.with_context(pair, context, index, fill, limit)
        except DataError:  # on this rank only, so nothing may be raised
            return None

    def learning_from(self, prompts: PromptPair, rollout: Rollout, meters: Meters) -> Rollout:
        """The rollout with these prompts; one without a context is left out of the loss."""
        learns = prompts.anchor or prompts.has_context
        if rollout.counted and not prompts.anchor:
            meters.add("contexts/missing_share", not learns)
        return replace(rollout, prompts=prompts, in_loss=learns)

    def _share_from_teacher(self, progress: float) -> float:
        """Share of the rollouts from the teacher's prompt: teacher_rollout_fraction, falling linearly to 0."""
        if self.args.generate_from_teacher:
            return 1.0
        return self.args.teacher_rollout_fraction * (1.0 - progress)

    def _is_from_teacher(self, key: str, share: float) -> bool:
        """A function of the row's key, so the same on any number of ranks."""
        if share in (0.0, 1.0):
            return share == 1.0
        return uniforms(f"{self.args.seed}/{key}/teacher", 1)[0] < share

    def scorer(self, keep_on: torch.device) -> Scorer:
        """What scores rollouts with the teacher's and the student's weights. keep_on: see Scorer."""
        return Scorer(
            engine=self.parts.engine(),
            teacher=self.teacher,
            loss_mask=self.args.loss_mask,
            pad_token_id=self.parts.tokenizer.pad_token_id,
            dtype=self.parts.compute_dtype,
            keep_on=keep_on,
            temperature=self.args.temperature,
            tokens_per_batch=self.args.scoring_batch_tokens,
            packing=self.parts.packing,
            start=self.start_model,
        )

    def _old_log_probs(self, scorer: Scorer, rollouts: list[Rollout]) -> list[Tensor] | None:
        """Log-probabilities of each completion's tokens when it was sampled, if rollouts are or become off-policy, so
        that their loss is importance-weighted: the sampler's, if it is another program, else those of a forward."""
        args, sampler = self.args, self.parts.rollouts
        if args.generate_from_teacher or not (args.outlives_step or args.rollout_lag):
            return None
        if sampler.has_own_weights and sampler.knows_log_probs and not args.teacher_rollout_fraction:
            return [torch.tensor(rollout.completion.log_probs, device=args.device) for rollout in rollouts]
        return scorer.student_log_probs(rollouts)

    def _sampler_log_probs(self, rollouts: list[Rollout]) -> Tensor | None:
        """The sampler's log-probabilities of the loss tokens, [N]; None if any are unknown."""
        if any(rollout.completion.log_probs is None for rollout in rollouts):
            return None
        first = [self.args.loss_mask.first_token(rollout) for rollout in rollouts]
        of_rows = [rollout.completion.log_probs[start:] for rollout, start in zip(rollouts, first, strict=True)]
        return torch.tensor([value for values in of_rows for value in values], device=self.args.device)

    def _padded(self, rollouts: list[Rollout], old: list[Tensor] | None) -> dict[str, Tensor | None]:
        """The rollouts as passed to TRL's callbacks: prompts left-padded, completions right-padded."""
        device, pad = self.args.device, self.parts.tokenizer.pad_token_id
        completions = [rollout.completion.ids for rollout in rollouts]
        completion_ids = pad_right(completions, pad, device)
        completion_mask = pad_right([[1] * len(ids) for ids in completions], 0, device)
        teacher_ids, teacher_mask = pad_left([rollout.prompts.teacher.ids for rollout in rollouts], pad, device)
        return {
            "prompt_ids": pad_left([rollout.prompts.student.ids for rollout in rollouts], pad, device)[0],
            "completion_ids": completion_ids,
            "teacher_input_ids": torch.cat([teacher_ids, completion_ids], dim=1),
            "teacher_attention_mask": torch.cat([teacher_mask, completion_mask], dim=1),
            "old_per_token_logps": None if old is None else nn.utils.rnn.pad_sequence(old, batch_first=True),
        }

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def loss(
        self, model: nn.Module, scored: ScoredBatch, weights: LossWeights, meters: Meters, step: int | None
    ) -> Tensor:
        picked = self.inspector.pick(scored, step)
        request = self.loss_request(scored, weights, picked.at_M)
        loss = model(**scored.batch.student.inputs, request=request)
        self.record(request, meters)
        self.inspector.record(picked, request, scored, meters)
        if request.log_probs_N is not None:
            meters.add_mismatch(request.log_probs_N - scored.sampler_log_probs_N)
        return loss * self.loss_factor

    @property
    def loss_factor(self) -> float:
        return self.args.distillation_weight

    def record(self, request: DistillationLoss, meters: Meters) -> None:
        """Add a method's own metrics of a forward."""

    def loss_request(
        self, scored: ScoredBatch, weights: LossWeights, inspect_M: Tensor | None = None
    ) -> DistillationLoss:
        """The request to the student's forward: the loss of a micro-batch, the divergence of each token, and the
        diagnostics of those with indices inspect_M."""
        return DistillationLoss(
            positions_N=scored.batch.student.positions_N,
            terms=LossTerms(
                divergence=self.args.divergence,
                teacher_hidden_ND=scored.teacher_hidden_ND.to(self.args.device),
                teacher_head=scored.teacher_head,
                tokens_N=scored.batch.tokens_N,
                weights_N=weights.weights_N,
                old_log_probs_N=scored.old_log_probs_N,
                is_clip=self.args.distillation_is_clip,
                teacher_scale_N=self._teacher_scale(scored.batch),
                # To compare with the sampler's, while the weights are those it had.
                with_log_probs=scored.sampler_log_probs_N is not None
                and scored.weights_version == self.weights_version,
            ),
            scale=weights.scale,
            chunk_tokens=self.args.loss_chunk_tokens,
            inspect_M=inspect_M,
        )

    def _teacher_scale(self, batch: MicroBatch) -> Tensor | None:
        """Of each loss token; anchors are held to the start as it is."""
        temperature = self.args.teacher_temperature
        if temperature == 1.0:
            return None
        scale_N = torch.full((len(batch.tokens_N),), 1.0 / temperature, device=self.args.device)
        return scale_N if batch.anchor_N is None else scale_N.masked_fill_(batch.anchor_N, 1.0)

    # ---- the teacher over a run -------------------------------------------------------------------------------------

    def start(self, engine: nn.Module, max_steps: int, resumed: bool) -> None:
        validate.warn_of_still_teacher(self.args, max_steps)
        if not resumed:
            self.teacher.start(engine)
            if self.start_model is not None:
                self.start_model.start(engine)

    def after_step(self, engine: nn.Module, step: int) -> None:
        self.weights_version += 1
        self.teacher.after_step(engine, step)

    def measure(self, engine: nn.Module, meters: Meters) -> None:
        drift = self.teacher.drift(engine)
        if drift is not None:
            meters.add("teacher/distance", *drift)

    def reset(self) -> None:
        self.completion_log.taken.clear()
        self.head_of_step.clear()
        self.in_flight = None

    def save(self, folder: str, engine: nn.Module, pending: GenerationBatch | None) -> None:
        state.save(folder, self.teacher, engine)
        if pending is not None:
            generation_batch.save(folder, pending)
        if self.in_flight is not None:
            generation_batch.save_in_flight(folder, self.in_flight)

    def load(self, folder: str, engine: nn.Module, with_batch: bool) -> GenerationBatch | None:
        self.load_weights(folder, engine)
        if not with_batch:
            return None
        self.in_flight = generation_batch.load_in_flight(folder)
        return generation_batch.load(folder, self.collate, self.args.device, self.args.teacher_states_on)

    def load_weights(self, folder: str, engine: nn.Module) -> None:
        self.head_of_step.clear()
        state.load(folder, self.teacher, engine)
