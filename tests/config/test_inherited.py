"""Every setting that SDFTConfig inherits: it works, it is refused, or it is warned about. None is silently without
effect."""

import dataclasses
import math
import os
from pathlib import Path

import pytest
import torch
from accelerate import ParallelismConfig
from datasets import Dataset, DatasetDict
from transformers import EarlyStoppingCallback, TrainingArguments

from sdft_ds import SDFTConfig, SDFTTrainer, SFTTrainer
from sdft_ds.cli import errors
from sdft_ds.config.inherited import COUNTS_OF_PROCESSES, REFUSED_ARGUMENTS, REFUSED_FIELDS
from sdft_ds.config.validate import warn_of_still_teacher
from sdft_ds.distributed import launch
from tests.distributed.scenarios import configurations
from tests.helpers import tiny
from tests.helpers.trainers import Recorder, make_trainer, train


def config(**settings):
    return SDFTConfig(**{"output_dir": "unused", "report_to": "none", **settings})


# ---- what is trained with: (value, what must hold of the trainer afterwards) ----------------------------------------


def group(trainer):
    return trainer.optimizer.param_groups[0]


class Inside(Recorder):
    """Also how layers are checkpointed, which they are while the trainer works only."""

    def on_step_end(self, *args, model=None, **kwargs):
        super().on_step_end(*args, **kwargs)
        if getattr(model, "is_activation_checkpointing", False):
            self.checkpointing = model.model.layers[0]._gradient_checkpointing_func


def rates(trainer):
    return [log["learning_rate"] for log in trainer.recorder.logs if "loss" in log]


def evaluations(trainer):
    return [log["step"] for log in trainer.state.log_history if "eval_loss" in log]


def checkpoints(trainer):
    return sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))


TRAINING = {
    "output_dir": (None, lambda t: Path(t.args.output_dir, "metrics.jsonl").exists()),
    "max_steps": (4, lambda t: t.state.global_step == 4),
    "per_device_train_batch_size": (4, lambda t: len(t.current_batch.scored[0].batch.rollouts) == 4),
    "gradient_accumulation_steps": (2, lambda t: len(t.current_batch.scored) == 2),
    "learning_rate": (1e-2, lambda t: max(rates(t)) == pytest.approx(1e-2)),
    "lr_scheduler_type": ("cosine_with_min_lr", lambda t: rates(t)[1] > rates(t)[2] > rates(t)[3]),
    "lr_scheduler_kwargs": ({"min_lr": 5e-3}, lambda t: min(rates(t)[1:]) >= 5e-3),
    "warmup_steps": (1, lambda t: rates(t)[0] == 0),
    "optim": ("adamw_torch", lambda t: not group(t)["fused"]),
    "weight_decay": (0.1, lambda t: group(t)["weight_decay"] == 0.1),
    "adam_beta1": (0.5, lambda t: group(t)["betas"][0] == 0.5),
    "adam_beta2": (0.9, lambda t: group(t)["betas"][1] == 0.9),
    "adam_epsilon": (1e-4, lambda t: group(t)["eps"] == 1e-4),
    "max_grad_norm": (
        1e-3,
        lambda t: max(state["exp_avg"].norm() for state in t.optimizer.state.values()) < 1e-3,
    ),
    "bf16": (True, lambda t: t.accelerator.mixed_precision == "bf16"),
    "tf32": (False, lambda t: True),
    "activation_checkpointing": (True, lambda t: t.recorder.checkpointing),
    "activation_checkpointing_kwargs": (
        {"use_reentrant": True},
        lambda t: t.recorder.checkpointing.keywords == {"use_reentrant": True},
    ),
    "torch_empty_cache_steps": (1, lambda t: True),
    "logging_strategy": ("steps", lambda t: True),
    "logging_steps": (1, lambda t: len(rates(t)) == 4),
    "include_num_input_tokens_seen": ("non_padding", lambda t: t.state.num_input_tokens_seen > 0),
    "log_on_each_node": (False, lambda t: t.args.should_log),
    "log_level": ("error", lambda t: t.args.get_process_log_level() == 40),
    "log_level_replica": ("error", lambda t: True),
    "disable_tqdm": (True, lambda t: True),
    "run_name": ("mine", lambda t: True),
    "skip_memory_metrics": (False, lambda t: "train_mem_cpu_alloc_delta" in t.state.log_history[-1]),
    "seed": (7, lambda t: True),
    "data_seed": (8, lambda t: t.get_train_dataloader().batch_sampler is not None),
    "dataloader_drop_last": (True, lambda t: True),
    "use_cpu": (True, lambda t: t.args.device.type == "cpu"),
    "debug": ("underflow_overflow", lambda t: True),
    "accelerator_config": ({"gradient_accumulation_kwargs": {"sync_each_batch": True}}, lambda t: True),
}
EVALUATION = {
    "num_train_epochs": (2, lambda t: t.state.epoch == 2.0),
    "eval_strategy": ("steps", lambda t: evaluations(t)),
    "eval_steps": (2, lambda t: evaluations(t) == [0, 4, 6]),
    "eval_delay": (3, lambda t: 2 not in evaluations(t)),
    "eval_on_start": (True, lambda t: evaluations(t)[0] == 0),
    "per_device_eval_batch_size": (6, lambda t: True),
    "save_strategy": ("steps", lambda t: checkpoints(t)),
    "save_steps": (2, lambda t: all(int(name.split("-")[1]) % 2 == 0 for name in checkpoints(t))),
    "save_total_limit": (1, lambda t: len(checkpoints(t)) <= 2),
    "save_only_model": (True, lambda t: not list(Path(t.args.output_dir).glob("*/optimizer.pt"))),
    "load_best_model_at_end": (True, lambda t: t.state.best_model_checkpoint),
    "metric_for_best_model": ("loss", lambda t: t.state.best_metric is not None),
    "greater_is_better": (False, lambda t: t.state.best_metric == min(
        log["eval_loss"] for log in t.state.log_history if "eval_loss" in log and log["step"] > 0)),
    "logging_first_step": (True, lambda t: True),
}  # fmt: skip
HERE = "tests/config/test_inherited.py::"
# What a test of its own trains with.
TESTED_ELSEWHERE = {
    "fp16": "tests/config/test_sdft_config.py::test_precision_and_checkpointing_can_be_said_in_old_and_new_names",
    "gradient_checkpointing": (
        "tests/config/test_sdft_config.py::test_precision_and_checkpointing_can_be_said_in_old_and_new_names"
    ),
    "gradient_checkpointing_kwargs": HERE + "test_the_older_names_of_activation_checkpointing",
    "optim_args": "tests/config/test_inherited.py::test_other_optimizers",
    "logging_nan_inf_filter": "tests/distributed/test_bad_numbers.py",
    "report_to": "tests/config/test_inherited.py::test_a_tracker_that_is_not_installed_or_unknown",
    "restore_callback_states_from_checkpoint": HERE + "test_the_states_of_callbacks_are_restored",
    "deepspeed": HERE + "test_deepspeeds_configuration_as_a_dict_without_what_the_arguments_say",
    "ddp_find_unused_parameters": "tests/config/test_inherited.py::test_settings_of_ddp",
    "ddp_bucket_cap_mb": "tests/config/test_inherited.py::test_settings_of_ddp",
    "ddp_broadcast_buffers": "tests/config/test_inherited.py::test_settings_of_ddp",
    "ddp_backend": "tests/config/test_inherited.py::test_settings_of_ddp",
    "ddp_timeout": "tests/distributed/test_watchdog.py",
    "push_to_hub": "tests/test_model_card.py::test_push_to_hub_sends_the_token_and_writes_it_nowhere",
    "hub_model_id": "tests/test_model_card.py::test_push_to_hub_sends_the_token_and_writes_it_nowhere",
    "hub_token": "tests/test_model_card.py::test_push_to_hub_sends_the_token_and_writes_it_nowhere",
    "hub_strategy": "tests/test_model_card.py::test_push_to_hub_sends_the_token_and_writes_it_nowhere",
    "resume_from_checkpoint": "tests/cli/test_arguments.py::test_what_yaml_says_in_its_own_way",
}
# Read by transformers where it speaks to the hub or a tracker, in code that is not replaced here.
SERVICES = {
    "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "hub_private_repo",
    "hub_always_push", "hub_revision",
}  # fmt: skip
# For scripts to read, says transformers; and the pinning of memory, which there is nothing to pin of.
FOR_OTHERS = {"do_train", "do_eval", "do_predict", "local_rank", "dataloader_pin_memory"}

REFUSED = [
    ({"fsdp": "full_shard"}, "fsdp=True is not supported: .*ZeRO"),
    ({"parallelism_config": ParallelismConfig(tp_size=2)}, "parallelism_config=.* is not supported: .*ZeRO"),
    ({"torch_compile": True}, "torch_compile=True is not supported: .*cache_implementation='static'"),
    ({"torch_compile_backend": "inductor"}, "torch_compile=True is not supported"),
    ({"torch_compile_mode": "default"}, "torch_compile=True is not supported"),
    ({"use_liger_kernel": True}, "use_liger_kernel=True needs a GPU"),
    (
        {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}},
        "liger_kernel_config: fused_linear_cross_entropy would replace the model's forward",
    ),
    ({"use_liger_kernel": True, "liger_kernel_config": {"cross_entropy": True}}, "liger_kernel_config: cross_entropy"),
    ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
    ({"ddp_static_graph": True}, "ddp_static_graph=True is not supported"),
    ({"bf16_full_eval": True}, "bf16_full_eval=True"),
    ({"fp16_full_eval": True}, "fp16_full_eval=True"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size=True is not supported"),
    ({"optim_target_modules": "all-linear"}, "optim_target_modules=all-linear is not supported"),
    ({"optim": "galore_adamw", "optim_target_modules": "all-linear"}, "optim_target_modules"),
    ({"optim": "lomo"}, "optim=lomo is not supported"),
    ({"optim": "schedule_free_adamw"}, "optim=schedule_free_adamw is not supported"),
    ({"optim": "grokadamw"}, "optim=grokadamw cannot be used: .*pip install grokadamw"),
    ({"eval_use_gather_object": True}, "eval_use_gather_object=True is not supported"),
    ({"ignore_data_skip": True}, "ignore_data_skip=True is not supported"),
    ({"save_on_each_node": True}, "save_on_each_node=True is not supported"),
    ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint=True is not supported"),
    ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "set gradient_accumulation_steps"),
    ({"load_best_model_at_end": True, "save_strategy": "no"}, "load_best_model_at_end=True needs evaluations"),
    ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy=best needs evaluations"),
]
IGNORED = [
    {"remove_unused_columns": True},
    {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2},
    {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    {"dataloader_multiprocessing_context": "spawn"},
    {"dataloader_in_order": False},
    {"train_sampling_strategy": "group_by_length", "length_column_name": "n"},
    {"label_smoothing_factor": 0.1, "label_names": ["labels"]},
    {"average_tokens_across_devices": False},
    {"use_cache": True},
    {"prediction_loss_only": True},
    {"eval_do_concat_batches": False, "eval_accumulation_steps": 2},
    {"include_for_metrics": ["inputs"], "batch_eval_metrics": True},
    {"liger_kernel_config": {"rope": True}},
    {"fsdp_config": {"min_num_params": 1}},
]


def test_every_inherited_setting_has_its_place():
    places = [
        *TRAINING,
        *EVALUATION,
        *TESTED_ELSEWHERE,
        *SERVICES,
        *FOR_OTHERS,
        *{name for settings, words in REFUSED for name in settings if name in words and name not in TRAINING},
        *REFUSED_FIELDS,
        "full_determinism",
        *{name for settings in IGNORED for name in settings},
    ]
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert inherited - set(places) == set()
    assert set(places) - inherited == set()
    for test in TESTED_ELSEWHERE.values():
        file, _, name = test.partition("::")
        assert f"def {name or 'test_'}" in Path(__file__).parents[2].joinpath(file).read_text(), test


@pytest.mark.parametrize(
    "table, settings", [(TRAINING, {}), (EVALUATION, {"max_steps": -1, "rows": 3, "teacher_model_kind": "live"})]
)
def test_settings_that_work(table, settings):
    recorder = Inside()
    given = {name: value for name, (value, _) in table.items() if name != "output_dir"}
    trainer = make_trainer(callbacks=[recorder], generation_kwargs={"min_new_tokens": 2}, **{**settings, **given})
    trainer.recorder = recorder
    trainer.train()
    losses = [log["loss"] for log in recorder.logs if "loss" in log]
    assert losses and all(map(math.isfinite, losses))
    assert [name for name, (_, holds) in table.items() if not holds(trainer)] == []


@pytest.mark.parametrize(
    "optim, optim_args, holds",
    [
        ("adafactor", None, lambda group: group["decay_rate"] == -0.8),
        ("sgd", "momentum=0.5", lambda group: group["momentum"] == 0.5),
    ],
)
def test_other_optimizers(optim, optim_args, holds):
    trainer = make_trainer(max_steps=1, optim=optim, optim_args=optim_args)
    trainer.train()
    assert holds(group(trainer))


def test_the_older_names_of_activation_checkpointing():
    with pytest.warns(FutureWarning):
        made = config(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert made.activation_checkpointing and made.activation_checkpointing_kwargs == {"use_reentrant": False}


def test_the_states_of_callbacks_are_restored(tmp_path):
    settings = {"output_dir": str(tmp_path), "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1,
                "save_steps": 1, "metric_for_best_model": "loss", "per_device_eval_batch_size": 2,
                "rows": 2}  # fmt: skip
    make_trainer(callbacks=[EarlyStoppingCallback(7)], max_steps=1, **settings).train()
    early = EarlyStoppingCallback(1)
    trainer = make_trainer(callbacks=[early], max_steps=2, restore_callback_states_from_checkpoint=True, **settings)
    trainer.train(resume_from_checkpoint=True)
    restored = [each for each in trainer.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
    assert [each.early_stopping_patience for each in restored] == [7]


@pytest.mark.full
def test_settings_of_ddp(two_ranks):
    """Other buckets and buffers: the same losses."""
    others = {"ddp_bucket_cap_mb": 1, "ddp_broadcast_buffers": False, "ddp_backend": "gloo",
              "ddp_find_unused_parameters": False}  # fmt: skip
    plain, other = (two_ranks.run(train, gradient_accumulation_steps=2, **given)[0] for given in ({}, others))
    unused = two_ranks.run(train, gradient_accumulation_steps=2, ddp_find_unused_parameters=True)[0]
    assert plain["losses"] == pytest.approx(other["losses"], rel=1e-6)
    assert plain["losses"] == pytest.approx(unused["losses"], rel=1e-6)


# ---- what is refused, and what is warned about ---------------------------------------------------------------------


@pytest.mark.parametrize("settings, words", REFUSED)
def test_what_cannot_work_is_refused_with_the_remedy(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        config(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", IGNORED)
def test_what_changes_nothing_is_warned_about_by_name(settings):
    with pytest.warns(UserWarning, match="has no effect") as told:
        config(**settings)
    said = " ".join(str(warning.message) for warning in told)
    assert [name for name in settings if f"{name}=" not in said] == []


def test_settings_of_accelerates_loader_are_warned_about():
    with pytest.warns(UserWarning, match="accelerator_config: split_batches=True has no effect"):
        config(accelerator_config={"split_batches": True})


def test_full_determinism_is_refused_on_a_gpu_and_works_on_a_cpu(monkeypatch):
    try:
        make_trainer(full_determinism=True, max_steps=1).train()
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr("sdft_ds.distributed.launch.no_accelerator", lambda: False)
    with pytest.raises(ValueError, match="full_determinism=True is not supported on a GPU: .*Leave it False"):
        config(full_determinism=True, bf16=False)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("ACCELERATE_USE_FSDP", "true", "ACCELERATE_USE_FSDP=true, is not supported: .*ZeRO"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "ACCELERATE_USE_PARALLELISM_CONFIG=true, is not supported"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "ACCELERATE_DYNAMO_BACKEND, is not supported"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "ACCELERATE_MIXED_PRECISION=fp8, is not supported: .*bf16"),
    ],
)
def test_what_accelerates_launcher_asks_for_is_refused_as_well(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        config()


def test_a_tracker_that_is_not_installed_or_unknown():
    with pytest.raises(ValueError, match="report_to: clearml is not installed: pip install clearml"):
        config(report_to=["clearml"])
    with pytest.raises(ValueError, match="report_to: there is no 'wandbb'; there are .*wandb"):
        config(report_to="wandbb")


# ---- processes and GPUs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS_OF_PROCESSES)
def test_processes_that_each_believe_to_be_alone_are_refused(monkeypatch, name):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(name, "4")
    with pytest.raises(ValueError, match=f"4 processes were started \\({name}\\).*torchrun or deepspeed"):
        config()
    monkeypatch.setenv(name, "1")
    config()


def test_a_process_that_was_started_alone_takes_one_of_several_gpus(monkeypatch):
    plain = TrainingArguments.__post_init__

    def sees_four(self):
        plain(self)
        self._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", sees_four)
    with pytest.warns(UserWarning, match="first of 4 GPUs.*torchrun --nproc_per_node 4"):
        trainer = make_trainer(max_steps=1)
    trainer.train()
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)
    assert trainer.args.train_batch_size == trainer.args.per_device_train_batch_size == 2


def test_the_tests_see_no_gpu_and_neither_do_the_processes_that_they_start(request):
    if not request.config.getoption("--gpu"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def test_a_taken_port_is_named(monkeypatch):
    holder = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(holder.port))
    with pytest.raises(ValueError, match=f"MASTER_PORT={holder.port} is taken by another program.*--master_port"):
        with launch.naming_the_port():
            torch.distributed.TCPStore("127.0.0.1", holder.port, is_master=True, wait_for_workers=False)


# ---- what a trainer is given ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*REFUSED_ARGUMENTS, "colour"])
def test_arguments_of_other_trainers_are_refused_with_the_remedy(name):
    with pytest.raises(TypeError, match=f"The trainer does not take {name}: "):
        SDFTTrainer(model=tiny.llama(), **{name: None})


@pytest.mark.parametrize("trainer", [SDFTTrainer, SFTTrainer])
def test_training_arguments_in_place_of_a_configuration(trainer):
    with pytest.raises(TypeError, match="Config, which takes the settings of"):
        trainer(tiny.llama(), TrainingArguments(output_dir="unused", use_cpu=True))


@pytest.mark.parametrize(
    "rows, words",
    [
        (tiny.rows(2), r"train_dataset is a list.*train_dataset=datasets\.Dataset\.from_list\(rows\)"),
        (DatasetDict(fit=Dataset.from_list(tiny.rows(2))), "it has 'fit': give one, train_dataset=dataset\\['fit'\\]"),
        (iter(()), "give a datasets.Dataset"),
    ],
)
def test_data_that_is_no_data_set(rows, words):
    with pytest.raises(ValueError, match=words):
        SDFTTrainer(tiny.llama(), config(num_generations=1), rows, processing_class=tiny.tokenizer())


def test_a_dataset_dict_evaluates_as_named_sets():
    trainer = make_trainer()
    both = DatasetDict(one=trainer.eval_dataset, two=trainer.eval_dataset)
    made = SDFTTrainer(tiny.llama(), trainer.args, eval_dataset=both, processing_class=tiny.tokenizer())
    assert {"eval_one_loss", "eval_two_loss"} <= set(made.evaluate())
    with pytest.raises(ValueError, match="There is no evaluation set 'three'; there are one, two"):
        made.get_eval_dataloader("three")


def test_an_evaluation_needs_rows():
    trainer = make_trainer()
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="give an eval_dataset to it, or to the trainer"):
        trainer.evaluate()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dtype": "bfloat61"}, "there is no dtype 'bfloat61'; use bfloat16"),
        ({"attn_implementation": "flash_attention_2"}, "'flash_attention_2' needs a GPU, and its package.*'sdpa'"),
        ({"attn_implementation": "flex_attention"}, "'flex_attention' cannot train on a CPU: .*'sdpa'"),
    ],
)
def test_a_model_cannot_be_loaded_so(tmp_path, options, words):
    tiny.llama().save_pretrained(tmp_path)
    args = config(num_generations=1, model_init_kwargs=options, use_cpu=True)
    with pytest.raises(ValueError, match=words):
        SDFTTrainer(str(tmp_path), args, processing_class=tiny.tokenizer())


# ---- an EMA teacher that stays --------------------------------------------------------------------------------------


def test_an_ema_teacher_that_the_run_is_too_short_for_is_warned_about():
    with pytest.warns(UserWarning, match="will never be updated: .*teacher_sync_steps=512 steps, and the run has 1"):
        make_trainer(sync_ref_model=True, max_steps=1).train()


def test_an_ema_teacher_that_moves_is_not(recwarn):
    warn_of_still_teacher(config(teacher_model_kind="ema"), max_steps=1)
    warn_of_still_teacher(config(teacher_model_kind="live", num_generations=1), max_steps=0)
    assert not [warning for warning in recwarn if "never be updated" in str(warning.message)]


# ---- commands -------------------------------------------------------------------------------------------------------


def test_what_keeps_a_command_from_starting_is_one_line(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as exit:
        errors.leave(ImportError("no flash\nattention"))
    assert exit.value.code == "sdft_ds: ImportError: no flash attention (SDFT_TRACEBACK=1 shows the traceback)"
    with pytest.raises(SystemExit) as exit:
        errors.leave(ValueError("alpha"))
    assert exit.value.code == "sdft_ds: alpha"
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as exit:
        errors.leave(ValueError("alpha"))
    assert exit.value.code == 1
    with pytest.raises(SystemExit, match="sdft_ds: rank 3: RuntimeError: out of memory"):
        errors.leave(RuntimeError("out of memory"))
    monkeypatch.setenv("SDFT_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="out of memory"):
        errors.leave(RuntimeError("out of memory"))


# ---- DeepSpeed ------------------------------------------------------------------------------------------------------

OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
IN_DEEPSPEED = [
    ({"tensor_parallel": {"autotp_size": 2}}, {}, "tensor_parallel.autotp_size is not supported"),
    ({"sequence_parallel_size": 2}, {}, "sequence_parallel_size is not supported"),
    ({"compile": {"deepcompile": True}}, {}, "compile.deepcompile is not supported"),
    ({"torch_autocast": {"enabled": True}}, {}, "torch_autocast is not supported"),
    ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, {}, "zenflow is not supported"),
    (
        {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
        {"bf16": True},
        "grad_accum_dtype is not supported",
    ),
    (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        {"bf16": True},
        "bf16_master_weights_and_grads is not supported",
    ),
    (
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        {},
        "zero_quantized_weights is not supported",
    ),
    ({"zero_optimization": OFFLOAD}, {"optim": "adafactor"}, "Adam would run instead of optim=adafactor"),
    ({"zero_optimization": OFFLOAD}, {"optim": "sgd"}, "Adam would run instead of optim=sgd"),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}},
        {},
        'offload_param.device="nvme" is not supported',
    ),
    ({"train_micro_batch_size_per_gpu": 7}, {}, "contradicts the flags"),
    ("{broken", {}, "a file, or a dict, with DeepSpeed's configuration is needed"),
    ("zero9", {}, "configuration is needed, or one of zero0, zero1, zero2, "),
]
ACCEPTED_BY_DEEPSPEED = [
    ({"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}}, {"bf16": True}),
    (
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        {"ds3_gather_for_generation": False},
    ),
    ({"zero_optimization": OFFLOAD}, {"optim": "adamw_torch"}),
    ("zero2", {}),
]


def test_what_deepspeeds_configuration_asks_for_and_cannot_work_is_refused(one_rank):
    cases = [(given, settings) for given, settings, _ in IN_DEEPSPEED]
    (said,) = one_rank.run(configurations.refusals, cases + ACCEPTED_BY_DEEPSPEED)
    found = [(words, text) for (_, _, words), text in zip(IN_DEEPSPEED, said, strict=False)]
    assert [(words, text) for words, text in found if words not in (text or "")] == []
    assert said[len(IN_DEEPSPEED) :] == [None] * len(ACCEPTED_BY_DEEPSPEED)


def test_deepspeeds_configuration_as_a_dict_without_what_the_arguments_say(one_rank):
    """Batch sizes, clipping and precision are those of the arguments, as with a file that says auto everywhere."""
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 1e-2}
    (whole,) = one_rank.run(train, 2, **settings)
    (bare,) = one_rank.run(train, None, deepspeed={"zero_optimization": {"stage": 2}}, **settings)
    assert bare["losses"] == whole["losses"] and bare["grad_norms"] == whole["grad_norms"]


def test_what_a_configuration_leaves_out_is_taken_from_the_arguments():
    complete = launch.complete_configuration({"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupDecayLR"}})
    assert complete["optimizer"]["params"] == dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    assert complete["scheduler"]["params"]["total_num_steps"] == "auto"
    assert complete["zero_optimization"] == {"stage": 0} and complete["bf16"] == {"enabled": "auto"}
    assert complete["gradient_clipping"] == complete["train_batch_size"] == "auto"
    given = {"train_batch_size": 4, "gradient_clipping": 0.5, "optimizer": {"type": "Muon"}}
    complete = launch.complete_configuration(given)
    assert complete["train_batch_size"] == 4 and complete["optimizer"] == {"type": "Muon"}
    assert "zero_optimization" not in given and launch.complete_configuration("") is None


@pytest.mark.full
def test_checks_ask_for_the_configuration_that_accelerates_launcher_has_set(two_ranks):
    """Stage 3 without a word of --deepspeed: the same losses, no word of missing masters, no 8-bit weights."""
    found = two_ranks.run(configurations.by_accelerates_configuration, 3)
    expected = two_ranks.run(train, 3)
    for rank, plain in zip(found, expected, strict=True):
        assert rank["losses"] == pytest.approx(plain["losses"], rel=1e-6) and rank["stage"] == 3
        assert "no fp32 master" not in rank["told"]
        assert "8-bit weights cannot be sharded by ZeRO-3" in rank["quantized"]
        assert rank["dtype"] == "torch.bfloat16"
    assert two_ranks.run(train, None)[0]["losses"]  # nothing of it stays
