"""Setup and teardown around train and evaluate: one model object can be trained, evaluated, copied and trained again,
by this trainer or another."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import set_seed

from sdft_ds.distributed import engines, launch, zero
from sdft_ds.loop.resume import ResumableTrainer
from sdft_ds.model import loading
from sdft_ds.model.completion_forward import RequestForward, causal_lm_of, check, head_of
from sdft_ds.model.lm_head import tensors_of as head_tensors
from sdft_ds.model.modes import settings_kept


class ReusableTrainer(ResumableTrainer):
    """A trainer whose `train` and `evaluate` can be called in any order, any number of times."""

    def __init__(self, *arguments: Any, optimizers: tuple[Any, Any] = (None, None), **options: Any):
        self.optimizer_is_given = optimizers[0] is not None
        self.is_prepared = self.head_is_checked = False
        super().__init__(*arguments, optimizers=optimizers, **options)
        self.process_state = launch.ProcessState(self.args, self.accelerator)
        self.request_forward = RequestForward(self.model)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Within the block the model computes as in training: it handles loss requests, and its dropout is disabled
        (disable_dropout). Afterwards everything but its weights is restored. Reentrant."""
        if self.is_prepared:
            yield
            return
        causal_lm = causal_lm_of(self.model)
        self.is_prepared = True
        try:
            with self.process_state.entered(), settings_kept(self.model):
                zero.refuse_sharded(self.model, self.accelerator)
                if self.args.disable_dropout:
                    loading.disable_dropout(self.model)
                with self.request_forward:
                    yield
        finally:
            self.is_prepared = self.is_in_train = False
            engines.hold(causal_lm, self.model_wrapped)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """As in ResumableTrainer. Another call starts a new run from the current weights, with a new teacher,
        optimizer and schedule."""
        with self.prepared():
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.reset_run()
        return super()._inner_training_loop(*args, **kwargs)

    def reset_run(self) -> None:
        """Reset all state but the weights left by an earlier run or evaluation, of this or another trainer."""
        set_seed(self.args.seed)
        engines.release(causal_lm_of(self.model))
        self.request_forward.renew()
        self.model_wrapped, self.deepspeed = self.model, None
        if not self.optimizer_is_given:
            self.optimizer = None
        self.steps_at_last_log = 0
        self.head_is_checked = False

    def check_head(self) -> None:
        """Check once per engine that the model's logits are those of its LM head, as the loss computes them."""
        if self.head_is_checked:
            return
        head = head_of(self.model)
        zero.register_external_params(head, head_tensors(head).present())
        with zero.scoring_pass(self.model_wrapped) as forward:
            check(self.model, forward, self.args.device)
        self.head_is_checked = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers. Collective."""
        with self.prepared():
            super().save_model(output_dir, _internal_call)
