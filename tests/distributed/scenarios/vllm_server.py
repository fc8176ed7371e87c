"""What the tests of vLLM's server run on every rank; the server runs elsewhere."""

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sdft_ds.distributed import ranks
from sdft_ds.distributed.shutdown import Preempted
from sdft_ds.rollouts.weight_files import LOCK
from tests.distributed.scenarios.export import merged, student
from tests.distributed.scenarios.vllm import GREEDY, as_the_engine_fuses, steps
from tests.helpers import tiny
from tests.helpers.trainers import make_trainer
from tests.helpers.vllm_server import forget


def error(stage: int | None = None, lora: bool | str = False, other_tokenizer=False, narrow=False, **settings) -> str:
    """The message that a first rollout ends with, in a current folder that must stay as it is.

    other_tokenizer, narrow: the run has another tokenizer or model than the server.
    """
    model = tiny.llama(hidden_size=32, num_attention_heads=1, num_key_value_heads=1) if narrow else student(lora)
    trainer = make_trainer(stage, model=model, **settings)
    if other_tokenizer:
        trainer.rollouts.tokenizer.add_special_tokens({"additional_special_tokens": ["<|other|>"]})
    folder, before = Path(tempfile.mkdtemp()), os.getcwd()
    (folder / "a file").touch()
    os.chdir(folder)
    try:
        trainer.rollouts.generate([[5, 6, 7]] * 2, ["a", "b"])
    except (ValueError, RuntimeError) as raised:
        return str(raised)
    finally:
        trainer.rollouts.close()
        os.chdir(before)
        assert (folder / "a file").exists()
    return ""


def steps_with_restarts(model: str, stage: int | None, lora: bool | str, **settings) -> dict[str, Any]:
    """Three steps, with a server that forgets the weights after each push, as one that is restarted."""
    from sdft_ds.rollouts.vllm_server import ServerRollouts

    publish = ServerRollouts.publish

    def and_restart(self: ServerRollouts) -> None:
        publish(self)
        ranks.from_rank_0(lambda: forget(self.clients[0].url, model))

    ServerRollouts.publish = and_restart
    try:
        return steps(stage, lora, **settings)
    finally:
        ServerRollouts.publish = publish


def folders_while_training(stage: int | None, lora: bool | str, **settings) -> list[list[str]]:
    """Names in the folder of weights after each push, and after the run."""
    trainer = make_trainer(stage, model=student(lora), **{**GREEDY, **settings})
    found, publish = [], trainer.rollouts.publish

    def look() -> None:
        publish()
        found.append(sorted({*os.listdir(trainer.rollouts.files.folder)} - {LOCK}) if ranks.rank() == 0 else [])

    trainer.rollouts.publish = look
    trainer.train()
    return [*found, sorted(os.listdir(settings["vllm_weight_folder"]))]


def pushes(stage: int | None, lora: bool | str, **settings) -> list[dict[str, float]]:
    """After each push of three steps: the largest difference of each of the server's tensors to what PEFT merges."""
    trainer = make_trainer(stage, model=student(lora), **{**GREEDY, **settings})
    found, publish = [], trainer.rollouts.publish

    def compare() -> None:
        publish()
        ours = as_the_engine_fuses(merged(trainer.model_wrapped, trainer.model, lora))
        if ranks.rank() == 0:
            file = Path(tempfile.mkdtemp()) / "weights.safetensors"
            trainer.rollouts.clients[0].call_workers("save_weights", path=str(file))
            theirs = load_file(file)
            assert ours.keys() - {"lm_head.weight"} == theirs.keys() - {"lm_head.weight"}
            same = ours.keys() & theirs.keys()
            found.append({name: (theirs[name][: len(ours[name])] - ours[name]).abs().max().item() for name in same})

    trainer.rollouts.publish = compare
    trainer.train()
    return found


def preempted_during_a_rollout(stage: int | None, output_dir: str, **settings) -> dict[str, Any]:
    """Rank 1 gets SIGTERM while the rollout of the second step is under way."""
    trainer = make_trainer(stage, model=student(False), output_dir=output_dir, **{**GREEDY, **settings})
    submit, calls = trainer.rollouts.submit, []

    def and_signal(*arguments: Any) -> Any:
        wait = submit(*arguments)
        calls.append(wait)
        if len(calls) == 2 and ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return wait

    trainer.rollouts.submit = and_signal
    try:
        trainer.train()
    except Preempted as error:
        return {"code": error.code, "step": trainer.state.global_step}
    return {"code": None, "step": trainer.state.global_step}


def training_error(stage: int | None, **settings) -> str:
    try:
        make_trainer(stage, model=student(False), **{**GREEDY, **settings}).train()
    except RuntimeError as raised:
        return str(raised)
    return ""
