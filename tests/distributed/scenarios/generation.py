"""Rollouts of an engine."""

import gc
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch.autograd import Function
from transformers import TrainerCallback

from sdft_ds.distributed import ranks, zero
from sdft_ds.rollouts import decode, sampler
from tests.distributed.scenarios.exceptions import hooks_of
from tests.helpers.trainers import PROBE, Recorder, make_trainer


def generate(stage, gather: bool, uneven: bool = False, warm: bool = False, look_every: int = 1, **settings) -> list:
    """Completions from an engine that was never used (cold), or that has trained a step (warm). look_every: tokens
    from one look for finished rows to the next."""
    trainer = make_trainer(stage, ds3_gather_for_generation=gather, max_steps=1, **settings)
    completions = []
    rank = trainer.args.process_index
    prompts = [[1, 2, 3], [4] * 9, [5, 6]]
    if uneven:  # one rank has shorter prompts, and with them other lengths
        prompts = prompts[rank:] + prompts[:rank]

    def take() -> None:
        with mock.patch.object(decode, "LOOK_EVERY_CPU", look_every):
            made = trainer.rollouts.generate(prompts, ["a", "b", "c"], max_new_tokens=4 + 4 * rank * uneven)
        completions.append([completion.ids for completion in made])

    class Cold(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            take()

    if not warm:
        trainer.add_callback(Cold())
    trainer.train()
    if warm:
        take()
    return completions


PROMPTS = [[1, 2, 3], [4] * 30, [5, 6], [4] * 29, [7, 8, 9], [1, 2, 3]]


def in_calls_that_fit(stage, gather: bool, tokens: int | None = None) -> tuple[list, list[int]]:
    """Completions of all PROMPTS, of which the first rank has one and the second the others; rows of each call."""
    trainer = make_trainer(stage, ds3_gather_for_generation=gather, max_steps=1, rollout_batch_tokens=tokens)
    mine = (
        range(len(PROMPTS)) if ranks.world_size() == 1 else range(1) if ranks.rank() == 0 else range(1, len(PROMPTS))
    )
    calls, found = [], []
    plain: Callable = trainer.rollouts.sampler.backend

    def counted(model, prompts, *args):
        calls.append(len(prompts))
        return plain(model, prompts, *args)

    class Take(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            trainer.rollouts.sampler.backend = sampler.generate = counted
            try:
                made = trainer.rollouts.generate([PROMPTS[i] for i in mine], [f"a/{i}" for i in mine])
            finally:
                trainer.rollouts.sampler.backend = sampler.generate = plain
            found.extend(zip(mine, (completion.ids for completion in made), strict=True))

    trainer.add_callback(Take())
    trainer.train()
    return found, calls


def train_evaluate_train(stage, gather: bool) -> list[float]:
    """Losses of a run that evaluates after every step."""
    recorder = Recorder()
    trainer = make_trainer(
        stage, ds3_gather_for_generation=gather, callbacks=[recorder], eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    recorder.trainer = trainer
    trainer.train()
    return [log.get("loss", log.get("eval_loss")) for log in recorder.logs if "loss" in log or "eval_loss" in log]


def exception_inside_generation(stage, gather: bool) -> list[float]:
    """Generation raises on every rank before training; the run goes on as if nothing had been."""
    recorder = Recorder()
    trainer = make_trainer(stage, ds3_gather_for_generation=gather, callbacks=[recorder])
    recorder.trainer = trainer

    class Stumble(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            def broken(*args, **kwargs):
                raise KeyError("on purpose")

            inner = trainer.model.model.layers[0]
            whole, inner.forward = inner.forward, broken
            try:
                trainer.rollouts.generate([[1, 2]], ["a"])
            except KeyError:
                pass
            else:
                raise AssertionError("nothing was raised")
            finally:
                inner.forward = whole

    trainer.add_callback(Stumble())
    trainer.train()
    return [log["loss"] for log in recorder.logs if "loss" in log]


def calls_per_token(stage, gather: bool, **settings) -> dict[str, float]:
    """Calls of DeepSpeed's functions, and of autograd functions, for each decoded token."""
    trainer = make_trainer(stage, ds3_gather_for_generation=gather, max_steps=1, **settings)
    trainer.train()

    def calls(tokens: int) -> dict[str, int]:
        counts = {"deepspeed": 0, "autograd functions": 0}

        def count(frame: Any, event: str, argument: Any) -> None:
            if event == "call":
                counts["deepspeed"] += "/deepspeed/" in frame.f_code.co_filename
                counts["autograd functions"] += frame.f_code is Function.apply.__code__

        sys.setprofile(count)
        try:
            trainer.rollouts.generate([[1, 2, 3], [4] * 9], ["a", "b"], max_new_tokens=tokens, min_new_tokens=tokens)
        finally:
            sys.setprofile(None)
        return counts

    calls(2)
    gc.collect()  # or destructors of earlier engines would be counted
    gc.disable()
    try:
        few, many = calls(2), calls(6)
    finally:
        gc.enable()
    return {what: (many[what] - few[what]) / 4 for what in few}


def hooks_while_gathered(nested: int) -> None:
    """Hooks of others run inside, between DeepSpeed's they keep their places, and what is added or removed inside is
    so afterwards. nested: how many such contexts within."""
    trainer = make_trainer(3, max_steps=1)
    trainer.train()
    engine, layer, ran = trainer.model_wrapped, trainer.model.model.layers[0], []

    def note(name: str) -> Any:
        return layer.register_forward_pre_hook(lambda *_: ran.append(name))

    def order() -> list[list[list[tuple[int, Any]]]]:
        return [hooks_of(module) for module in trainer.model.modules()]

    note("between")
    layer._forward_pre_hooks.move_to_end(next(iter(layer._forward_pre_hooks)))
    before, removed = order(), note("removed inside")
    with torch.no_grad(), zero.generation_weights(engine, gather=True):
        with ExitStack() as stack:
            for _ in range(nested):
                stack.enter_context(zero.generation_weights(engine, gather=True))
            removed.remove()
        added = note("added inside")
        trainer.model(PROBE)
    assert ran == ["between", "added inside"], ran
    assert list(layer._forward_pre_hooks)[-1] == added.id
    added.remove()
    assert order() == before
