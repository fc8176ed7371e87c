"""What a rank sends, receives and holds, counted; and ranks that have nothing to send."""

from typing import Any

import torch
from transformers import TrainerCallback

from sdft_ds import SDFTTrainer
from sdft_ds.data.batch import LossMask
from sdft_ds.teacher.scoring import Scorer
from tests.helpers.trainers import Recorder, make_trainer


def gathers(stage, **settings) -> dict[str, int]:
    """All-gathers of the last optimizer step: those of the teacher's pass, and those of the student's step."""
    import deepspeed.comm as comm

    trainer = make_trainer(stage, **settings)
    names = ["all_gather_into_tensor", "all_gather", "allgather_fn", "all_gather_coalesced"]
    counts, phase = {"teacher": 0, "student": 0, "other": 0}, ["other"]

    def counted(name, call):
        def counting(*args, **kwargs):
            counts[phase[0]] += 1
            return call(*args, **kwargs)

        return counting

    plain = {name: getattr(comm.comm.cdb, name) for name in names if hasattr(comm.comm.cdb, name)}
    score, step = Scorer.score, SDFTTrainer.training_step

    def scoring(self, *args, **kwargs):
        phase[0], counts["teacher"] = "teacher", 0
        try:
            return score(self, *args, **kwargs)
        finally:
            phase[0], counts["student"] = "other", 0

    def training(self, *args, **kwargs):
        phase[0] = "student"
        try:
            return step(self, *args, **kwargs)
        finally:
            phase[0] = "other"

    Scorer.score, SDFTTrainer.training_step = scoring, training
    for name, call in plain.items():
        setattr(comm.comm.cdb, name, counted(name, call))
    try:
        trainer.train()
    finally:
        Scorer.score, SDFTTrainer.training_step = score, step
        for name, call in plain.items():
            setattr(comm.comm.cdb, name, call)
    offload = trainer.model_wrapped.optimizer.parameter_offload
    counts["trace is complete"] = offload.param_coordinator.is_complete_trace()
    counts["teacher's trace is complete"] = offload.sdft_scoring_coordinator.is_complete_trace()
    return counts


def received(stage, **settings) -> dict[str, float]:
    """Bytes that this rank receives through DeepSpeed's collectives in the last optimizer step, if they are rings."""
    import deepspeed.comm as comm

    moved = {}
    gathers = ("all_gather_into_tensor", "all_gather", "all_gather_coalesced")
    times = dict.fromkeys((*gathers, "reduce_scatter_tensor"), 1) | {"all_reduce": 2}

    class OfLastStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == args.max_steps - 1:
                moved.clear()

    def size(thing) -> int:
        if isinstance(thing, (list, tuple)):
            return sum(map(size, thing))
        return thing.nbytes if isinstance(thing, torch.Tensor) else 0

    def counted(name, call):
        def counting(*args, **kwargs):
            whole = max(map(size, (*args, *kwargs.values())))  # what is gathered into, or reduced
            purpose = "weights" if name in gathers else "gradients"
            moved[purpose] = moved.get(purpose, 0) + whole * times[name] * (ranks - 1) / ranks
            return call(*args, **kwargs)

        return counting

    trainer = make_trainer(stage, callbacks=[OfLastStep()], **settings)
    ranks = trainer.args.world_size
    plain = {name: getattr(comm.comm.cdb, name) for name in times}
    for name, call in plain.items():
        setattr(comm.comm.cdb, name, counted(name, call))
    try:
        trainer.train()
    finally:
        for name, call in plain.items():
            setattr(comm.comm.cdb, name, call)
    return moved


def held(stage, **settings) -> dict[str, int]:
    """Bytes that this rank holds after training: weights, what the optimizer keeps, the teacher's shadow."""
    trainer = make_trainer(stage, **settings)
    trainer.train()
    engine = trainer.model_wrapped
    weights = [getattr(param, "ds_tensor", param) for param in trainer.model.parameters()]
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    inner = getattr(inner, "optimizer", inner)  # accelerate's wrapper
    # ZeRO-3 shows its masters to the inner optimizer only during a step.
    masters = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    masters = masters or [param for group in inner.param_groups for param in group["params"]]
    known = {tensor.data_ptr() for tensor in weights}
    states = [value for state in inner.state.values() for value in state.values()]
    optimizer = [t for t in masters if t.data_ptr() not in known]
    optimizer += [t for t in states if torch.is_tensor(t) and t.numel() > 1]
    return {
        "weights": sum(t.nbytes for t in weights),
        "optimizer": sum(t.nbytes for t in optimizer),
        "teacher shadow": sum(t.nbytes for t in getattr(trainer.teacher, "values", {}).values()),
    }


def ranks_without_loss(stage, which) -> dict[str, Any]:
    """All tokens of these ranks' rows are skipped, those of the others are not."""
    trainer = make_trainer(stage, callbacks=[recorder := Recorder()], gradient_accumulation_steps=2)
    whole = LossMask.first_token

    def first_token(self, rollout):
        return len(rollout.completion.ids) if trainer.args.process_index in which else whole(self, rollout)

    LossMask.first_token = first_token
    try:
        trainer.train()
    finally:
        LossMask.first_token = whole
    tokens = sum(len(scored.batch.tokens_N) for scored in trainer.current_batch.scored)
    return {"losses": [log["loss"] for log in recorder.logs if "loss" in log], "tokens": tokens}
