"""What an exception leaves behind, on every rank: nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from transformers import TrainerCallback

from sdft_ds import SDFTTrainer
from sdft_ds.data.batch import LossMask
from sdft_ds.data.schedule import Slot
from sdft_ds.distributed import engines, launch, zero
from sdft_ds.model.completion_forward import causal_lm_of
from sdft_ds.model.modes import evaluating
from sdft_ds.objectives.protocol import BatchUse
from tests.helpers import tiny
from tests.helpers.trainers import Recorder, digest, make_trainer, state_of, trainable


class OnPurpose(Exception):
    pass


@contextmanager
def broken_forward(trainer: SDFTTrainer) -> Iterator[None]:
    """The last decoder layer raises."""

    def raising(*args: Any, **kwargs: Any) -> None:
        raise OnPurpose

    layer = causal_lm_of(trainer.model).model.layers[-1]
    layer.forward = raising
    try:
        yield
    finally:
        del layer.forward


def in_a_rollout(trainer: SDFTTrainer) -> None:
    with broken_forward(trainer):
        make(trainer)


def in_the_teachers_forward(trainer: SDFTTrainer) -> None:
    """After the rollout, weights swapped in."""
    whole = trainer.rollouts.generate
    broken = broken_forward(trainer)

    def generate(*args: Any, **kwargs: Any) -> Any:
        made = whole(*args, **kwargs)
        broken.__enter__()
        return made

    trainer.rollouts.generate = generate
    try:
        make(trainer)
    finally:
        broken.__exit__(None, None, None)
        del trainer.rollouts.generate


def after_the_teachers_forward(trainer: SDFTTrainer) -> None:
    """Where ZeRO-3 has begun to gather for the next forward."""
    first_token = LossMask.count

    def raising(*args: Any) -> None:
        raise OnPurpose

    LossMask.count = raising
    try:
        make(trainer)
    finally:
        LossMask.count = first_token


def half_way_through_a_swap(trainer: SDFTTrainer) -> None:
    """The last value does not fit its parameter."""
    teacher, engine = trainer.teacher, trainer.model_wrapped
    if not getattr(teacher, "values", None):
        raise OnPurpose
    name, values = list(teacher.values.items())[-1]
    teacher.values[name] = torch.zeros(len(values) + 1)
    try:
        with zero.scoring_pass(engine), evaluating(engine), teacher.weights(engine):
            raise AssertionError("swapped in")
    except RuntimeError as error:
        assert "size" in str(error), error
        raise OnPurpose from error
    finally:
        teacher.values[name] = values


WAYS: tuple[Callable[[SDFTTrainer], None], ...] = (
    in_a_rollout, in_the_teachers_forward, after_the_teachers_forward, half_way_through_a_swap,
)  # fmt: skip


def make(trainer: SDFTTrainer) -> None:
    slots = tuple(Slot(i, i) for i in range(2))
    with trainer.meters["train"].phase("student"):
        use = BatchUse(1, keep_on=trainer.args.device, outlives_step=True)
        trainer.objective.collect(tiny.rows(2), slots, "train/9", trainer.meters["train"], use)


def hooks_of(module: nn.Module) -> list[list[tuple[int, Any]]]:
    """In the order in which they run."""
    return [list(hooks.items()) for hooks in (module._forward_pre_hooks, module._forward_hooks)]


def everything(trainer: SDFTTrainer) -> dict[str, Any]:
    """What must be as before."""
    engine, teacher = trainer.model_wrapped, trainer.teacher
    modules = list(trainer.model.modules())
    found = {
        "modules": state_of(trainer.model),
        "hooks": [hooks_of(module) for module in modules],
        "parameters": [id(module._parameters) for module in modules],
        "linear": nn.functional.linear,
        "in a forward": [getattr(module._parameters, "_in_forward", False) for module in modules],
        "forwards": [vars(module).get("forward") for module in modules],
        "grad": torch.is_grad_enabled(),
        "phases": list(trainer.meters["train"].nested),
    }
    if engines.stage(engine) == 3:
        offload = engine.optimizer.parameter_offload
        found["coordinator"] = id(offload.param_coordinator)
        # Those that persist may be there or not.
        sharded = [param for param in trainer.model.parameters() if not param.ds_persist]
        found["gathered"] = [param.ds_status.name for param in sharded]
        found["in use"] = [len(param.ds_active_sub_modules) for param in trainer.model.parameters()]
    found["shadow"] = digest(getattr(teacher, "values", {}).values())
    found["weights"] = digest(zero.full_copies([param for _, param in teacher.trainable]))
    return found


def train_with_exceptions(stage: int | None, faults: bool, **settings: Any) -> dict[str, Any]:
    """Train two steps, with or without exceptions before each of them."""
    recorder = Recorder()
    trainer = make_trainer(stage, callbacks=[recorder], max_steps=2, **settings)

    def stumble() -> None:
        for way in WAYS if faults else ():
            before = everything(trainer)
            try:
                way(trainer)
            except OnPurpose:
                pass
            else:
                raise AssertionError(f"{way.__name__} did not raise")
            after = everything(trainer)
            for name, value in before.items():
                assert after[name] == value, (way.__name__, name)

    class Stumble(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            stumble()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                stumble()

    trainer.add_callback(Stumble())
    trainer.train()
    return {
        "losses": [log["loss"] for log in recorder.logs if "loss" in log],
        "completions": recorder.completions[-1:],
        "weights": digest(zero.full_copies(trainable(trainer))),
        "shadow": digest(getattr(trainer.teacher, "values", {}).values()),
    }


def offsets_in_a_group_of_one() -> list[tuple[int, int, int]]:
    """(offset, elements of the piece, elements of the whole) of parameters that each rank has whole, in a group of its
    own, as DeepSpeed shards them over groups that are smaller than the world."""
    import deepspeed

    launch.start_process_group("zero3", use_cpu=True, timeout_seconds=60)
    groups = [distributed.new_group([rank]) for rank in range(distributed.get_world_size())]
    model: nn.Module = tiny.llama(num_hidden_layers=1)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    deepspeed.zero.Init(module=model, config_dict_or_path=config, data_parallel_group=groups[distributed.get_rank()])
    engine = deepspeed.initialize(model=model, config=config)[0]
    pieces = zero.local_shards(engine, list(model.named_parameters()))
    return [(piece.offset, len(piece.weights), model.get_parameter(piece.name).ds_numel) for piece in pieces]
