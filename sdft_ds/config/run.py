"""Settings of logging, uploads, non-finite gradients and preemption; some are transformers', with another default."""

from dataclasses import dataclass

from sdft_ds.config.fields import (
    FREE,
    OF_ONE_PRECISION,
    OF_THE_TRAINER,
    WITH_TEACHER,
    at_least,
    positive,
    setting,
    within,
)


@dataclass
class RunSettings:
    logging_steps: float = setting(
        10, "Log every N optimizer steps; below 1, a share of all steps.", resume=OF_THE_TRAINER
    )
    bf16: bool | None = setting(
        None,
        "Train in bf16: autocast over weights in fp32 (frozen under LoRA: bf16), or DeepSpeed's bf16 engine. Unset: "
        "on, unless fp16 is.",
        resume=OF_ONE_PRECISION,
        card=True,
    )
    remove_unused_columns: bool = setting(False, "Drop dataset columns that are not used.", resume=FREE)
    report_to: list[str] | None = setting(
        None,
        "Trackers to log to, beside metrics.jsonl: tensorboard, wandb, trackio, mlflow, ...; all: those installed.",
        resume=FREE,
    )
    hub_upload_run_files: bool = setting(
        False,
        "Upload the run's page, logs and completions as well: they hold prompts and privileged contexts.",
        resume=FREE,
    )
    log_completions: int = setting(
        50,
        "Write completions with each token's divergence, at the first step and every N steps; 0: never.",
        valid=at_least(0),
        resume=FREE,
    )
    log_completions_rows: int = setting(
        4, "Number of completions written each time.", valid=at_least(1), only_with=("log_completions",), resume=FREE
    )
    print_completions: bool = setting(
        False, "Print them in the terminal as well.", only_with=("log_completions",), resume=FREE
    )
    inspect_tokens: int = setting(
        16,
        "Tokens sampled from each micro-batch to measure entropies, agreement and top-k mass; 0: none.",
        valid=at_least(0),
        resume=FREE,
    )
    logging_nan_inf_filter: bool = setting(False, "Hide losses that are not finite from the log.", resume=FREE)
    max_nonfinite_steps: int = setting(
        5,
        "Consecutive optimizer steps with a non-finite gradient, each skipped, after which the run ends.",
        valid=at_least(1),
        resume=FREE,
    )
    stop_on_collapse: bool = setting(
        False,
        "Save a checkpoint and end the run where completions repeat themselves, end at once, grow without end, or are "
        "all alike, or where the retention set is forgotten. False: a warning only.",
        resume=FREE,
        read_by=WITH_TEACHER,
    )
    preemption_exit_code: int = setting(
        99,
        "Exit code after a SIGTERM or SIGUSR1: a checkpoint was saved, and the file PREEMPTED in output_dir marks it.",
        valid=within(1, 255),
        resume=FREE,
    )
    preemption_deadline_seconds: float = setting(
        300.0,
        "Seconds after such a signal until the process ends, whether or not it has saved.",
        valid=positive(),
        resume=FREE,
    )
