"""The parts of the run, in their order: first what answers most."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A module of this package with `run(setup, findings)`. seconds: its limit. alone: it measures time or memory, so
    nothing runs beside it."""

    name: str
    seconds: int
    alone: bool
    purpose: str


PARTS = {
    part.name: part
    for part in (
        Part("facts", 60, True, "versions, what sdft_ds.doctor says, the speed of this machine"),
        Part("attention", 60, True, "milliseconds of attention at each new shape"),
        Part("matrix", 120, False, "losses in every kind of setup, beside those of this CPU"),
        Part("swaps", 90, False, "the student after a teacher's pass, bit by bit, and the memory of a swap"),
        Part("decode", 150, True, "milliseconds and host synchronisations per token of every way to generate"),
        Part("loss", 75, True, "the loss in chunks of every size, against fp64"),
        Part("steps", 120, True, "whole steps, and their memory beside what sdft_ds.plan predicts"),
        Part("draws", 40, False, "sampled tokens, beside those of this CPU"),
        Part("resume", 60, False, "a run that is interrupted inside a generation batch and resumed"),
        Part("leaving", 60, False, "SIGTERM in a rollout, and a weight that is not a number"),
        Part("commands", 90, False, "the demo, preview --score and evaluate, as a user types them"),
        Part("memory", 45, True, "an evaluation of more rows than fit into memory at once"),
        Part("vllm", 120, True, "rollouts by vLLM in the training process"),
    )
}
