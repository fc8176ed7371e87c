"""What two-rank tests run on every rank; each function also runs alone, in one process without a launcher."""

import hashlib
import os
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import (
    BOFTConfig,
    DeloraConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    OSFConfig,
    PeftModel,
    RandLoraConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import BitsAndBytesConfig, TrainerCallback, TrainerState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sdft_ds import SDFTConfig, SDFTTrainer
from sdft_ds.cli.model_arguments import ModelArguments
from sdft_ds.data.batch import LossMask
from sdft_ds.distributed import engines, launch, zero
from sdft_ds.evaluation.task_evaluation import TaskEvaluation
from sdft_ds.evaluation.tasks import Task, TaskRow
from sdft_ds.model import loading
from sdft_ds.model.modes import evaluating
from sdft_ds.teacher.scoring import Scorer
from sdft_ds.trainer import TRAINERS
from tests.helpers import tiny

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

SETTINGS = {
    "max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "num_generations": 2,
    "max_completion_length": 8, "save_strategy": "no", "report_to": "none", "bf16": False, "learning_rate": 1e-2,
    "disable_tqdm": True, "activation_checkpointing": False, "lr_scheduler_type": "constant", "seed": 5,
    "adam_epsilon": 1e-3,  # so that Adam does not blow rounding in tiny gradients up to whole updates
}  # fmt: skip


ADAPTERS = {
    True: LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, lora_dropout=0.0),
    "on the head": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj", "lm_head"], r=4),
    "head saved": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, modules_to_save=["lm_head"]),
}
LLAMA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
# Each trains the tiny Llama; the first ones as their adapters are switched off, others from what they start with.
PEFT_METHODS = {
    "LoRA": lambda: LoraConfig(**LLAMA),
    "DoRA": lambda: LoraConfig(**LLAMA, use_dora=True),
    "LoRA on the embedding": lambda: LoraConfig(**{**LLAMA, "target_modules": ["embed_tokens"]}),
    "LoRA and tokens": lambda: LoraConfig(**LLAMA, trainable_token_indices=list(range(264))),
    "LoRA and biases": lambda: LoraConfig(**LLAMA, bias="all"),
    "LoRA, random": lambda: LoraConfig(**LLAMA, init_lora_weights=False),
    "PiSSA": lambda: LoraConfig(**LLAMA, init_lora_weights="pissa"),
    "fast PiSSA": lambda: LoraConfig(**LLAMA, init_lora_weights="pissa_niter_4"),
    "OLoRA": lambda: LoraConfig(**LLAMA, init_lora_weights="olora"),
    "tokens": lambda: TrainableTokensConfig(
        task_type="CAUSAL_LM", target_modules=["embed_tokens"], token_indices=list(range(264))
    ),
    "VeRA": lambda: VeraConfig(**{**LLAMA, "target_modules": ["q_proj"]}, r=8),
    "RandLoRA": lambda: RandLoraConfig(**{**LLAMA, "target_modules": ["q_proj"]}, r=4),
    "IA3": lambda: IA3Config(**LLAMA, feedforward_modules=["down_proj"]),
    "LoHa": lambda: LoHaConfig(**LLAMA),
    "LoKr": lambda: LoKrConfig(**LLAMA),
    "OFT": lambda: OFTConfig(**LLAMA, oft_block_size=8, r=0),
    "BOFT": lambda: BOFTConfig(**LLAMA, boft_block_size=8),
    "norms": lambda: LNTuningConfig(task_type="CAUSAL_LM"),
    "FourierFT": lambda: FourierFTConfig(**LLAMA, n_frequency=10),
    "DeLoRA": lambda: DeloraConfig(**LLAMA),
    "OSF": lambda: OSFConfig(**LLAMA),
}
SWITCHED_OFF = list(PEFT_METHODS)[:4]
PROBE = torch.arange(20).view(2, 10) * 7 % 250


class Recorder(TrainerCallback):
    """Losses and gradient norms of every step, and the completions of every generation batch."""

    def __init__(self):
        self.logs, self.completions, self.rollouts = [], [], []
        self.trainer = None  # set it to record rollouts as well

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer is not None:
            self.rollouts.append([scored.batch.rollouts for scored in self.trainer.current_batch.scored])

    def on_self_distillation_batch_prepared(self, args, state, control, completion_ids=None, **kwargs):
        self.completions.append(completion_ids.tolist())


def grown_student(lora: bool | str, tied: bool = True):
    """The tiny Llama; its adapter is one that was trained, so that a teacher without it is another model.

    Made on the rank that uses it: a tensor that is sent to two processes is shared memory, trained by both.
    """
    model = tiny.llama(tie_word_embeddings=tied)
    if lora:
        torch.manual_seed(11)
        model = get_peft_model(model, ADAPTERS[lora])
        for name, param in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                torch.nn.init.normal_(param, std=0.1)
    return model


def make_trainer(
    stage: int | None = None,
    lora: bool | str = False,
    grown: bool = False,
    tied: bool = True,
    model: Any = None,
    callbacks=(),
    rows=6,
    stream=False,
    config=SDFTConfig,
    peft_config=None,
    anchors=None,
    **settings,
):
    """A trainer of the tiny Llama; stage None: without DeepSpeed. anchors: their rows."""
    if stage is not None:
        settings["deepspeed"] = str(DS_CONFIGS / f"zero{stage}.json")
    args = config(**{**SETTINGS, "output_dir": tempfile.mkdtemp(), **settings})
    dataset = Dataset.from_list(rows if isinstance(rows, list) else tiny.rows(rows))
    return TRAINERS[args.method](
        model=grown_student(lora, tied) if grown else model or tiny.llama(),
        args=args,
        train_dataset=dataset.to_iterable_dataset() if stream else dataset,
        eval_dataset=dataset,
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
        peft_config=ADAPTERS[lora] if lora and not grown else peft_config,
        anchor_dataset=None if anchors is None else Dataset.from_list(anchors),
    )


def train(stage: int | None = None, **settings) -> dict[str, Any]:
    """Train a few steps; (losses, gradient norms, the trained weights, completions) of this rank."""
    recorder = Recorder()
    trainer = make_trainer(stage, callbacks=[recorder], **settings)
    recorder.trainer = trainer
    trainer.train()
    steps = [log for log in recorder.logs if "loss" in log]
    names, params = zip(*((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad), strict=True)
    return {
        "losses": [log["loss"] for log in steps],
        "grad_norms": [log.get("grad_norm") for log in steps],
        "weights": dict(zip(names, (copy.float() for copy in zero.full_copies(list(params))), strict=True)),
        "completions": recorder.completions,
        "logs": steps,
        "rollouts": recorder.rollouts,
        "teacher_logits": teacher_logits(trainer),
        "shadow": shadow_pieces(trainer),
    }


def refusals(cases: list[tuple[Any, dict[str, Any]]]) -> list[str | None]:
    """What SDFTConfig says of each (DeepSpeed configuration, settings); None where it accepts them."""
    said = []
    for deepspeed, settings in cases:
        try:
            SDFTConfig(**{**SETTINGS, "output_dir": "unused", "deepspeed": deepspeed, **settings})
            said.append(None)
        except ValueError as error:
            said.append(str(error))
    return said


def by_accelerates_configuration(stage: int) -> dict[str, Any]:
    """A run whose DeepSpeed configuration is set by accelerate's launcher, in the environment."""
    launched = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    before, launch._LAUNCHED_WITH_DEEPSPEED = launch._LAUNCHED_WITH_DEEPSPEED, True
    os.environ |= launched
    try:
        half = SDFTConfig(**{**SETTINGS, "output_dir": "unused", "bf16": True})
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loading.warn_without_masters(tiny.llama(dtype=torch.bfloat16), half)
        try:
            quantized = ModelArguments(load_in_8bit=True, use_peft=True).init_kwargs(half)
        except ValueError as error:
            quantized = str(error)
        recorder = Recorder()
        trainer = TRAINERS["sdft"](
            model=tiny.llama(),
            args=SDFTConfig(**{**SETTINGS, "output_dir": tempfile.mkdtemp()}),
            train_dataset=Dataset.from_list(tiny.rows(6)),
            processing_class=tiny.tokenizer(),
            callbacks=[recorder],
        )
        trainer.train()
    finally:
        launch._LAUNCHED_WITH_DEEPSPEED = before
        for name in launched:
            os.environ.pop(name, None)
    return {
        "losses": [log["loss"] for log in recorder.logs if "loss" in log],
        "stage": engines.stage(trainer.model_wrapped),
        "told": " ".join(str(each.message) for each in told),
        "quantized": quantized,
        "dtype": str(half.hf_deepspeed_config.dtype()),
    }


def trainable(trainer: Any) -> list[torch.nn.Parameter]:
    return [param for param in trainer.model.parameters() if param.requires_grad]


@torch.no_grad()
def teacher_logits(trainer: SDFTTrainer) -> torch.Tensor:
    """The teacher's logits on fixed tokens, as the trainer's scoring pass would see them; without one the model's."""
    engine = trainer.model_wrapped
    weights = trainer.teacher.weights(engine) if hasattr(trainer, "teacher") else nullcontext()
    with zero.scoring_pass(engine), evaluating(engine), weights:
        return engine(input_ids=PROBE, attention_mask=torch.ones_like(PROBE), use_cache=False).logits.float()


def shadow_pieces(trainer: SDFTTrainer) -> list[tuple[str, int, torch.Tensor]]:
    """(name, offset, values) of what this rank holds of the teacher."""
    values = getattr(getattr(trainer, "teacher", None), "values", {})
    if not values:
        return []
    pieces = zero.local_shards(trainer.model_wrapped, trainer.teacher.trainable)
    return [(piece.name, piece.offset, values[piece.name].cpu()) for piece in pieces]


def train_in_four_bits(stage: int | None, folder: str, **settings) -> dict[str, Any]:
    """Losses of a QLoRA run on what bitsandbytes takes for a CPU with bf16 units, and the 4-bit weights after it."""
    import bitsandbytes

    plain = bitsandbytes.nn.modules.has_avx512bf16
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: True
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )
    torch.manual_seed(11)
    try:
        trainer = make_trainer(
            stage, model=folder, lora=True, callbacks=[recorder := Recorder()], eval_strategy="steps", eval_steps=1,
            max_steps=2, model_init_kwargs={"quantization_config": quantization}, **settings,
        )  # fmt: skip
        trainer.train()
    finally:
        bitsandbytes.nn.modules.has_avx512bf16 = plain
    weights = [m.weight for m in trainer.model.modules() if type(m) is bitsandbytes.nn.Linear4bit]
    losses = [log.get("loss", log.get("eval_loss")) for log in recorder.logs if "loss" in log or "eval_loss" in log]
    return {"losses": losses, "weights": digest(zero.full_copies(weights))}


def refusal(**settings) -> str:
    """What a trainer with these settings is refused with."""
    try:
        make_trainer(**settings)
    except ValueError as error:
        return str(error)
    return ""


def evaluate(stage: int | None = None, **settings) -> float:
    return make_trainer(stage, **settings).evaluate()["eval_loss"]


def digest(tensors) -> str:
    """A fingerprint of values, bit by bit."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def swap_leaves_the_student_alone(stage, extra_pass: bool, **settings) -> str:
    """Train, with or without one more swap before every step; the trained weights, bit by bit."""
    trainer = make_trainer(stage, teacher_model_kind="ema", teacher_sync_steps=1, max_steps=3, **settings)
    if extra_pass:
        plain = trainer.get_batch_samples

        def get_batch_samples(*args):
            inputs = plain(*args)
            before = state_of(trainer.model)
            teacher_logits(trainer)
            assert state_of(trainer.model) == before
            return inputs

        trainer.get_batch_samples = get_batch_samples
    trainer.train()
    return digest(zero.full_copies(trainable(trainer)))


def state_of(model) -> list:
    """What a teacher pass must leave as it was."""
    return [
        [(name, module.training, getattr(module, "p", None)) for name, module in model.named_modules()],
        [(name, param.requires_grad, param.grad is None) for name, param in model.named_parameters()],
        getattr(model, "active_adapters", None),
    ]


def average(stage, rate: float, **settings) -> dict[str, Any]:
    """An EMA teacher's pieces after some steps, beside an average of the student's masters made independently."""
    trainer = make_trainer(stage, teacher_model_kind="ema", teacher_update_rate=rate, teacher_sync_steps=1, **settings)
    expected, start = {}, {}

    class Follow(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            for piece in zero.local_shards(trainer.model_wrapped, trainer.teacher.trainable):
                start[piece.name] = expected[piece.name] = piece.values.float().clone().double()

        def on_step_end(self, *args, **kwargs):
            for piece in zero.local_shards(trainer.model_wrapped, trainer.teacher.trainable):
                expected[piece.name] = (1 - rate) * expected[piece.name] + rate * piece.values.double()

    recorder = Recorder()
    recorder.trainer = trainer
    trainer.add_callback(Follow())
    trainer.add_callback(recorder)
    trainer.train()
    off = moved = 0.0
    for name, values in trainer.teacher.values.items():
        off += (values.double() - expected[name]).square().sum().item()
        moved += (expected[name] - start[name]).square().sum().item()
    drift = [log["teacher/distance"] for log in recorder.logs if "teacher/distance" in log]
    return {"off": off**0.5, "moved": moved**0.5, "drift": drift}


def generate(stage, gather: bool, uneven: bool = False, warm: bool = False, **settings) -> list:
    """Completions from an engine that was never used (cold), or that has trained a step (warm)."""
    trainer = make_trainer(stage, ds3_gather_for_generation=gather, max_steps=1, **settings)
    completions = []
    rank = trainer.args.process_index
    prompts = [[1, 2, 3], [4] * 9, [5, 6]]
    if uneven:  # one rank has shorter prompts, and with them other lengths
        prompts = prompts[rank:] + prompts[:rank]

    def take() -> None:
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


def questions(n: int = 5) -> list[Task]:
    """A task and a retention set; what a random model says is right now and then."""
    prompts = [f"{i} " + "what is it? " * (3 * i % 5) for i in range(n)]
    rows = [TaskRow([{"role": "user", "content": text}], "[a-m]", "regex") for text in prompts]
    return [Task("vowels", rows), Task("retention", [*rows[:2], TaskRow("Tell a story.", None, "exact"), *rows[2:]])]


def examined(stage, folder: str, every: int | None = 2, tasks: bool = True, **settings) -> dict[str, Any]:
    """Train four steps, asked questions or not; what training came to, and what was logged."""
    recorder = Recorder()
    trainer = make_trainer(
        stage, callbacks=[recorder], max_steps=4, output_dir=folder, per_device_eval_batch_size=2, **settings
    )
    recorder.trainer = trainer
    before = state_of(trainer.model)
    if tasks:
        trainer.add_callback(TaskEvaluation(trainer, questions(), every))
    trainer.train()
    assert [part[:2] for part in state_of(trainer.model)[0]] == [part[:2] for part in before[0]]
    return {
        "losses": [log["loss"] for log in recorder.logs if "loss" in log],
        "logged": [log for log in recorder.logs if "tasks/vowels/accuracy" in log],
        "completions": recorder.completions,
        "weights": digest(zero.full_copies(trainable(trainer))),
        "random": torch.random.get_rng_state().tolist(),
    }


def resume(stage, folder: str, **settings) -> dict[str, Any]:
    """Six steps in one go, and three, a new trainer, three more; what both end with."""
    warmup = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 6}  # another rate at every step
    settings = {"teacher_update_rate": 0.3, "teacher_sync_steps": 1, **warmup, **settings}
    ends = []
    for steps, again in ((6, None), (3, None), (6, f"{folder}/parts/checkpoint-3")):
        recorder = Recorder()
        part = "whole" if len(ends) == 0 else "parts"
        trainer = make_trainer(
            stage, callbacks=[recorder], max_steps=steps, output_dir=f"{folder}/{part}", save_strategy="steps",
            save_steps=3, **settings,
        )  # fmt: skip
        recorder.trainer = trainer
        trainer.train(resume_from_checkpoint=again)
        ends.append(
            {
                "losses": [log["loss"] for log in recorder.logs if "loss" in log],
                "rates": [log["learning_rate"] for log in recorder.logs if "loss" in log],
                "completions": recorder.completions,
                "weights": digest(zero.full_copies(trainable(trainer))),
                "teacher": digest(tensor for _, _, tensor in shadow_pieces(trainer)),
            }
        )
    return {"whole": ends[0], "resumed": ends[2], "first": ends[1]}


def exports(stage, folder: str, **settings) -> dict[str, Any]:
    """A saved teacher, loaded, beside the teacher itself; DeepSpeed's fp32 weights of the checkpoint, and ours."""
    settings = {"teacher_model_kind": "ema", "teacher_sync_steps": 1, "teacher_update_rate": 0.3, **settings}
    trainer = make_trainer(stage, output_dir=folder, save_strategy="steps", save_steps=3, **settings)
    trainer.train()
    ours = teacher_logits(trainer)
    trainable = {name: param for name, param in trainer.model.named_parameters() if param.requires_grad}
    copies = dict(zip(trainable, zero.full_copies(list(trainable.values())), strict=True))
    trainer.save_teacher(f"{folder}/teacher")
    trainer.accelerator.wait_for_everyone()
    unset_hf_deepspeed_config()  # or the loaded model is sharded as well
    base = tiny.llama() if settings.get("lora") else None
    loaded = PeftModel.from_pretrained(base, f"{folder}/teacher") if base else type(tiny.llama()).from_pretrained(
        f"{folder}/teacher", dtype=torch.float32
    )  # fmt: skip
    with torch.no_grad():
        saved = loaded.eval()(PROBE).logits
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    fp32 = get_fp32_state_dict_from_zero_checkpoint(f"{folder}/checkpoint-3")
    worst = max((fp32[name] - copies[name]).abs().max().item() for name in trainable)
    return {"teacher": (saved - ours).abs().max().item(), "fp32": worst}


def one_bad_step(stage, poisoned: list[int], **settings) -> dict[str, Any]:
    """Weights and teacher after each step; at the given ones rank 0's loss is not a number."""
    settings = {"teacher_model_kind": "ema", "teacher_sync_steps": 1, "max_steps": 4, "weight_decay": 0.1, **settings}
    recorder = Recorder()
    trainer = make_trainer(stage, callbacks=[recorder], **settings)
    after, plain = [], trainer.compute_loss

    def compute_loss(*args, **kwargs):
        loss = plain(*args, **kwargs)
        bad = trainer.state.global_step + 1 in poisoned and trainer.args.process_index == 0
        return loss * float("nan") if bad else loss

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            weights = digest(zero.full_copies(trainable(trainer)))
            after.append((weights, digest(tensor for _, _, tensor in shadow_pieces(trainer))))

    trainer.compute_loss = compute_loss
    trainer.add_callback(Look())
    trainer.train()
    logs = [log for log in recorder.logs if "loss" in log]
    return {"after": after, "losses": [log["loss"] for log in logs], "bad": [log["steps/nonfinite"] for log in logs]}


def whole_at_on_save(stage, folder: str) -> bool:
    """Whether this rank finds the last file of a checkpoint at on_save, though rank 0 is slow in writing it."""
    found, write = [], TrainerState.save_to_json

    def slowly(self, path):
        time.sleep(1)
        write(self, path)

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            found.append(os.path.exists(f"{folder}/checkpoint-1/trainer_state.json"))

    TrainerState.save_to_json = slowly
    try:
        make_trainer(stage, callbacks=[Look()], max_steps=1, output_dir=folder, save_strategy="steps").train()
    finally:
        TrainerState.save_to_json = write
    return found == [True]


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


def in_turn(stage, actions: list[str], again: bool = False, **settings) -> list[float]:
    """What one trainer, or with `again` as many as actions on one model, has for losses: of each step of a `train`, of
    an `evaluate`."""
    settings = {"per_device_eval_batch_size": 2, "teacher_sync_steps": 1, "teacher_update_rate": 0.3, "max_steps": 2,
                **settings}  # fmt: skip
    recorder = Recorder()
    trainer = make_trainer(stage, callbacks=[recorder], **settings)
    for i, action in enumerate(actions):
        if again and i:
            trainer = make_trainer(stage, callbacks=[recorder], **{**settings, "model": trainer.model, "lora": False})
        getattr(trainer, action)()
    logs = [log for log in recorder.logs if "loss" in log or "eval_loss" in log]
    assert all(log.get("eval_completions/loss_tokens", 1) > 0 for log in logs)  # metrics are in the right line
    return [log.get("loss", log.get("eval_loss")) for log in logs]


def side_by_side(stages, **settings) -> list[float]:
    """Losses of trainers that were all built, on one model, before the last of them trained, and then those before."""
    model, trainers = tiny.llama(), []
    for stage in stages:
        recorder = Recorder()
        trainers.append((make_trainer(stage, model=model, callbacks=[recorder], max_steps=2, **settings), recorder))
    found = []
    for stage, (trainer, recorder) in reversed(list(zip(stages, trainers, strict=True))):
        trainer.train()
        assert engines.stage(trainer.model_wrapped) == (stage or 0)
        found += [log["loss"] for log in recorder.logs if "loss" in log]
    return found


def one_config(stage) -> list[str]:
    """What trainers make of a model, one after the other, that share their settings; these stay as they were."""
    args = make_trainer(stage).args
    args = SDFTConfig(**SETTINGS, output_dir=args.output_dir, deepspeed=args.deepspeed)
    before, found = args.to_dict(), []
    for lora, width in ((True, 32), (None, 64), (True, 32)):
        trainer = SDFTTrainer(tiny.llama(hidden_size=width), args, Dataset.from_list(tiny.rows()),
                              processing_class=tiny.tokenizer(), peft_config=ADAPTERS.get(lora))  # fmt: skip
        trainer.train()
        found.append(f"{trainer.args.teacher_model_kind} {digest(zero.full_copies(list(trainer.model.parameters())))}")
    assert args.to_dict() == before
    return found


def taken_over(stage) -> list[str]:
    """What is said to those who come too late: a trainer that evaluates when another has trained its model since, and
    one without ZeRO for a model that ZeRO-3 has sharded."""
    first = make_trainer(stage)
    first.train()
    make_trainer(stage, model=first.model).train()
    said = []
    for attempt in (first.evaluate, lambda: make_trainer(None, model=first.model)):
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said


def stopped(stage, **settings) -> list[float]:
    """A run that ends by an exception after its first step, and then a whole one of another trainer."""

    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyError("on purpose")

    trainer = make_trainer(stage, callbacks=[Stop()], **settings)
    try:
        trainer.train()
    except KeyError:
        pass
    trainer = make_trainer(stage, callbacks=[recorder := Recorder()], model=trainer.model, **settings)
    trainer.train()
    return [log["loss"] for log in recorder.logs if "loss" in log]


def starts(stage, methods: list[str], model: str | None = None) -> dict[str, tuple[str, float, float, float]]:
    """For each PEFT method the class of its base teacher; how far that one's logits are from the model's at the start,
    before and after two steps; and how far the student's are after them."""
    found = {}
    for name in methods:
        base = model or tiny.llama(tie_word_embeddings="token" not in name, attention_bias=True)
        trainer = make_trainer(stage, model=base, peft_config=PEFT_METHODS[name](), max_steps=2)
        begin = []

        class Look(TrainerCallback):
            def on_train_begin(self, *args, **kwargs):
                begin.extend((student_logits(trainer), teacher_logits(trainer)))  # noqa: B023

        trainer.add_callback(Look())
        trainer.train()
        apart = [logits - begin[0] for logits in (begin[1], teacher_logits(trainer), student_logits(trainer))]
        found[name] = (type(trainer.teacher).__name__, *(each.abs().max().item() for each in apart))
    return found


@torch.no_grad()
def student_logits(trainer: SDFTTrainer) -> torch.Tensor:
    engine = trainer.model_wrapped
    with zero.scoring_pass(engine), evaluating(engine):
        return engine(input_ids=PROBE, attention_mask=torch.ones_like(PROBE), use_cache=False).logits.float()


def save_headless(folder) -> None:
    """A model whose head is not among the weights that are saved: loading it draws one."""
    model = tiny.llama(tie_word_embeddings=False)
    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=weights)


def run_twice(stage, **settings) -> list[tuple[list[float], str]]:
    """Losses and weights of two runs with one seed, whatever the process has drawn before."""
    found = []
    for drawn in (1, 2):
        torch.manual_seed(drawn)
        result = train(stage, **settings)
        found.append((result["losses"], digest(result["weights"].values())))
    return found
