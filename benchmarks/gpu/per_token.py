"""What a rollout costs per token: milliseconds, host synchronisations, and on a GPU kernels.

Each figure is the difference of a long and a short rollout, so that the prompts are not in it.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.gpu import timing
from sdft_ds.data.batch import pad_left
from sdft_ds.rollouts.engine import Sampling
from sdft_ds.rollouts.local import LocalRollouts

Rollout = Callable[[list[list[int]], int], Any]  # (prompts, tokens of each completion)
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal"}  # operators whose result the host waits for


def way(name: str, model: PreTrainedModel) -> Rollout:
    """No completion ends before its last token: the end token is outside of the vocabulary."""
    end = model.config.vocab_size
    if name == "transformers":
        return partial(_transformers, model, end)
    sampling = Sampling({"do_sample": True, "temperature": 1.0, "max_new_tokens": 1}, [end], 0, seed=0)
    backend = "generate" if name == "sdft_ds" else "continuous"
    return partial(ours, LocalRollouts(sampling, model, lambda: model, backend=backend, batch_tokens=1 << 30))


def ours(rollouts: LocalRollouts, prompts: list[list[int]], tokens: int, **options: Any) -> list[list[int]]:
    keys = [f"row/{i}" for i in range(len(prompts))]
    return [made.ids for made in rollouts.generate(prompts, keys, max_new_tokens=tokens, **options)]


@torch.no_grad()
def _transformers(model: PreTrainedModel, end: int, prompts: list[list[int]], tokens: int) -> torch.Tensor:
    ids, mask = pad_left(prompts, 0, model.device)
    config = GenerationConfig(do_sample=True, max_new_tokens=tokens, eos_token_id=[end], pad_token_id=0)
    return model.generate(ids, attention_mask=mask, generation_config=config)


def prompts_of(rows: int, length: int, padded: bool) -> list[list[int]]:
    """Token ids; in larger batches 8 rows share a prompt. padded: the prompts differ in length."""
    numbers = [row if rows <= 16 else row // 8 for row in range(rows)]
    return [[1 + (7 * number + k) % 250 for k in range(length - (number % 4 if padded else 0))] for number in numbers]


class _Waits(TorchDispatchMode):
    """Counts operators that make the host wait for a device; for a CPU, where nothing else counts them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in WAITS
        return func(*args, **(kwargs or {}))


def host_waits(run: Callable[[], Any]) -> int:
    if not torch.cuda.is_available():
        with _Waits() as waits:
            run()
        return waits.count
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in said)


def on_device(run: Callable[[], Any], trace: str | None = None) -> tuple[int, float]:
    """(Kernels and copies, seconds that the GPU computes). trace: a file for the profiler's trace."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run()
        torch.cuda.synchronize()
    if trace:
        profiler.export_chrome_trace(trace)
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return len(events), sum(event.time_range.elapsed_us() for event in events) / 1e6


def per_token(rollout: Rollout, prompts: list[list[int]], tokens: tuple[int, int], trace: str | None = None) -> dict:
    """tokens: of the short and of the long completions."""
    short, long = tokens
    rollout(prompts, short)
    seconds = [timing.seconds(partial(rollout, prompts, count)) for count in tokens]
    waits = [host_waits(partial(rollout, prompts, count)) for count in (4, 12)]
    milliseconds = 1e3 * (seconds[1] - seconds[0]) / (long - short)
    found = {"ms/token": milliseconds, "tokens/s": 1e3 * len(prompts) / milliseconds}
    found["host waits/token"] = (waits[1] - waits[0]) / 8
    if torch.cuda.is_available():
        kernels, busy = zip(on_device(partial(rollout, prompts, 4)), on_device(partial(rollout, prompts, 12), trace),
                            strict=True)  # fmt: skip
        found |= {"kernels/token": (kernels[1] - kernels[0]) / 8, "GPU ms/token": 1e3 * (busy[1] - busy[0]) / 8}
    return found
