"""Rollout engine vllm_mode=server: vLLM's own OpenAI servers, which rank 0 alone talks to.

A server answers from the weights of one version, which has a name: it is asked for its version before it is asked for
completions and after all of them came, and answers in between of a server that was restarted are dropped. What a
server has to know is in launch/vllm_server.sh.
"""

import importlib.util
import math
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.distributed import ranks, zero
from sdft_ds.model import export
from sdft_ds.model.completion_forward import causal_lm_of
from sdft_ds.rollouts import weight_sums
from sdft_ds.rollouts.engine import SampledTokens, Sampling
from sdft_ds.rollouts.vllm_client import Client, Refused, Served, Unreachable, in_background, is_here
from sdft_ds.rollouts.vllm_engine import VllmRollouts, check_version
from sdft_ds.rollouts.vllm_nccl import Group, Nccl
from sdft_ds.rollouts.weight_files import SHARED_MEMORY, WeightFiles, remove_abandoned
from sdft_ds.rollouts.weight_sums import Sums

OURS = "sdft-"  # first letters of the versions that runs push
PROBE = "A 12,345.6 naïve\n\tdef f(x): 漢字 🙂 "
T = TypeVar("T")
Row = tuple[list[int], dict[str, Any]]  # prompt, sampling parameters


class ServerRollouts(VllmRollouts):
    """engine: returns the current training wrapper of the model. The attributes of rank 0 alone: clients, files."""

    def __init__(
        self,
        sampling: Sampling,
        args: SDFTConfig,
        model: nn.Module,
        engine: Callable[[], nn.Module],
        tokenizer: PreTrainedTokenizerBase,
    ):
        super().__init__(sampling, model, args.device)
        self.args, self.engine, self.tokenizer = args, engine, tokenizer
        self.sync = args.vllm_weight_sync
        self.run = uuid.uuid4().hex[:8]
        self.clients = [Client(url) for url in args.vllm_server_urls]
        self.served: list[Served] = []
        self.dtype = args.compute_dtype
        self.files: WeightFiles | None = None
        self.nccl: Nccl | None = None

    @property
    def version(self) -> str:
        """The name of the weights that were pushed last."""
        return self._version(self.pushes)

    def _version(self, push: int) -> str:
        return f"{OURS}{self.run}-{push}-{self.sync}"

    # ---- the start --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.served = ranks.from_rank_0(lambda: [self._reached(client) for client in self.clients])
        self.longest = min(each.longest for each in self.served)
        self.dtype = getattr(torch, self.served[0].dtype)
        if len({(each.dtype, each.untied) for each in self.served}) > 1:
            raise ValueError("The vLLM servers differ in --dtype or --hf-overrides: start all of them by one command.")
        self.serves_tied_head = export.is_tied(self.model) and not self.served[0].untied
        self.sync = self._weight_sync()
        ranks.from_rank_0(self._make_files)
        if self.sync == "nccl":
            self.nccl = Nccl(self.clients, self.args.vllm_group_port)

    def _reached(self, client: Client) -> Served:
        remedy = "start one by launch/vllm_server.sh MODEL, or set vllm_server_base_url to where it runs"
        return self._patiently(client, lambda: self._checked(client), remedy)

    def _checked(self, client: Client) -> Served:
        """What the server says about itself. Raises ValueError if rollouts cannot be had from it."""
        client.get("/health")
        try:
            check_version(client.get("/version")["version"], f"The server at {client.url}")
            client.weight_version()
        except Refused:
            raise ValueError(
                f"The server at {client.url} has no endpoints for weights: start vLLM with VLLM_SERVER_DEV_MODE=1, as "
                "launch/vllm_server.sh does."
            ) from None
        served = client.describe()
        if served.log_probs_mode != self.log_probs_mode:
            raise ValueError(
                f"The server at {client.url} returns {served.log_probs_mode}, and at the run's temperature "
                f"{self.log_probs_mode} are needed: start it with --logprobs-mode {self.log_probs_mode}."
            )
        probe = PROBE + "".join(self.tokenizer.all_special_tokens[:16])
        ours = self.tokenizer(probe, add_special_tokens=False)["input_ids"]
        if served.has_tokenizer and client.post("/tokenize", prompt=probe, add_special_tokens=False)["tokens"] != ours:
            raise ValueError(
                f"The server at {client.url} has another tokenizer than the run: serve the model that is trained "
                "(model_name_or_path), or give the server the run's by --tokenizer."
            )
        return served

    def _weight_sync(self) -> str:
        """The setting in effect. Raises ValueError if the servers or the model do not allow it."""
        asked = self.args.vllm_weight_sync
        if asked != "auto":
            if (reason := self._obstacle(asked)) is not None:
                raise ValueError(f"vllm_weight_sync={asked!r} is not possible: {reason}.")
            return asked
        if self._obstacle("adapter") is None:
            return "adapter"
        if (reason := self._obstacle("path")) is not None:
            raise ValueError(f"The weights cannot be pushed to the vLLM server: {reason}.")
        return "path"

    def _obstacle(self, sync: str) -> str | None:
        """Why the weights cannot be brought to the servers this way."""
        if sync == "adapter":
            return export.adapter_obstacle(self.model) or self._adapter_obstacle()
        tied = causal_lm_of(self.model).config.get_text_config(decoder=True).tie_word_embeddings
        if tied and not export.is_tied(self.model) and not all(each.untied for each in self.served):
            return (
                "the adapter changes the head or the embedding alone, which are one tensor in the served model: leave "
                "lm_head and embed_tokens out of target_modules and modules_to_save, or set vllm_mode=colocate"
            )
        if sync == "path":
            if self.serves_tied_head and any(each.on_cpu and not each.extended for each in self.served):
                return (
                    "on a CPU vLLM needs help to renew a tied head: start it with --worker-extension-cls "
                    "sdft_ds.rollouts.weight_sums.WeightSums, as launch/vllm_server.sh does"
                )
            return None
        if not all(each.has_nccl for each in self.served):
            return 'not every server was started with --weight-transfer-config \'{"backend": "nccl"}\''
        if self.device.type != "cuda":
            return "nccl is for GPUs"
        if importlib.util.find_spec("vllm") is None:
            return "the run needs vLLM too, to send: see launch/vllm_environment.sh"
        return None

    def _adapter_obstacle(self) -> str | None:
        rank = self.model.peft_config[self.model.active_adapters[0]].r
        for each in self.served:
            if each.version.startswith(OURS) and not each.version.endswith("-adapter"):
                return "the server's base weights were replaced by those of a run: start it again"
            if each.max_lora_rank is None:
                return f"the server serves no adapters: start it with --lora-rank {rank} (launch/vllm_server.sh)"
            if rank > each.max_lora_rank:
                return f"the server's --max-lora-rank {each.max_lora_rank} is below the adapter's rank {rank}"
            if not each.swaps_adapters:
                return "the server was started without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        return None

    def _make_files(self) -> None:
        self.files = WeightFiles(Path(self.args.vllm_weight_folder or self._default_folder()), self.args.output_dir)

    def _default_folder(self) -> str | Path:
        """Shared memory, if the servers see it and two generations of weights fit."""
        output_dir = self.args.output_dir
        if not all(is_here(client.url) for client in self.clients) or not SHARED_MEMORY.is_dir():
            return output_dir
        remove_abandoned(SHARED_MEMORY)  # or what a dead run has left there would leave no room
        size = sum(zero.full_shape(param).numel() for param in self.model.parameters()) * self.dtype.itemsize
        fits = self.sync == "adapter" or 2 * size < shutil.disk_usage(SHARED_MEMORY).free
        return SHARED_MEMORY if fits else output_dir

    # ---- weights ----------------------------------------------------------------------------------------------------

    def publish(self) -> None:
        self.pushes += 1
        ours: Sums | None = {} if self.pushes == 1 and all(each.extended for each in self.served) else None
        {"path": self._publish_files, "adapter": self._publish_adapter, "nccl": self._publish_nccl}[self.sync](ours)

    def _groups(self, sums: Sums | None) -> Iterator[Group]:
        """The weights, a decoder layer at a time; adds them to the sums, if any, on rank 0."""
        for group in export.whole_weights(self.engine(), self.model, self.dtype, not self.serves_tied_head):
            if sums is not None and ranks.rank() == 0:
                weight_sums.add(sums, group)
            yield group

    def _publish_files(self, sums: Sums | None) -> None:
        groups = self._groups(sums)

        def write_and_load() -> None:
            with self.files.written(self.pushes) as part:
                for i, group in enumerate(groups):
                    save_file({name: each.cpu().contiguous() for name, each in group}, part / f"{i:05d}.safetensors")
            self._load_everywhere(sums)

        ranks.from_rank_0(write_and_load, meanwhile=groups)

    def _publish_adapter(self, sums: Sums | None) -> None:
        weights = export.adapter_weights(self.engine(), self.model)
        config = self.model.peft_config[self.model.active_adapters[0]]

        def write_and_load() -> None:
            with self.files.written(self.pushes) as part:
                save_file({name: each.cpu().contiguous() for name, each in weights.items()},
                          part / "adapter_model.safetensors")  # fmt: skip
                config.save_pretrained(str(part))
            self._load_everywhere(None)

        ranks.from_rank_0(write_and_load)
        if sums is not None:
            self._compare_base(sums)

    def _compare_base(self, sums: Sums) -> None:
        """Raises RuntimeError if the servers' weights are not those that the adapter is trained on."""
        with self.model.disable_adapter():
            groups = self._groups(sums)

            def compare() -> None:
                deque(groups, maxlen=0)
                self._compare(sums)

            ranks.from_rank_0(compare, meanwhile=groups)

    def _publish_nccl(self, sums: Sums | None) -> None:
        """Not run: see vllm_nccl.py."""
        if not self.nccl.metadata:
            self.nccl.metadata = [
                (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
                for group in self._groups(None)
                for name, tensor in group
            ]
        groups = self._groups(sums)

        def send() -> None:
            for client in self.clients:
                if self._patiently(client, client.weight_version) != self._version(self.pushes - 1):
                    self.nccl.restart()
            self.nccl.send(groups, self.version)
            for client in self.clients:
                self._patiently(client, lambda client=client: _reset_prefix_cache(client))
            if sums is not None:
                self._compare(sums)

        ranks.from_rank_0(send, meanwhile=groups)

    def _load_everywhere(self, sums: Sums | None) -> None:
        def renew(client: Client) -> None:
            if self.pushes > 1 and client.weight_version() != self._version(self.pushes - 1):
                self._checked(client)  # it was restarted
            self._load(client)

        for each in in_background(lambda client: self._patiently(client, lambda: renew(client)), self.clients):
            each.result()
        if sums is not None:
            self._compare(sums)

    def _load(self, client: Client) -> None:
        """Have the server load the newest files."""
        folder = str(self.files.path(self.pushes))
        try:
            if self.sync == "adapter":
                self._unload_adapters(client)
                client.post("/v1/load_lora_adapter", lora_name=self.version, lora_path=folder)
            else:
                client.call_workers("reload_weights", weights_path=folder)
                if self.serves_tied_head and self.served[self.clients.index(client)].on_cpu:
                    client.call_workers("repack_tied_head")
        except Refused as error:
            raise RuntimeError(
                f"The vLLM server at {client.url} could not load the weights in {folder}: start it again with the "
                f"model that is trained, and let it read that folder by the same name (vllm_weight_folder). {error}"
            ) from None
        _reset_prefix_cache(client)
        client.post("/update_weight_version", new_version=self.version)

    def _unload_adapters(self, client: Client) -> None:
        for model in client.get("/v1/models")["data"]:
            if model["parent"] is not None and model["id"].startswith(OURS):
                client.post("/v1/unload_lora_adapter", lora_name=model["id"])

    def _compare(self, ours: Sums) -> None:
        for client in self.clients:
            for theirs in client.call_workers("weight_sums"):
                self.check_sums(ours, theirs)

    # ---- completions ------------------------------------------------------------------------------------------------

    def submit(self, prompts: list[list[int]], parameters: list[dict[str, Any]]) -> Callable[[], list[SampledTokens]]:
        of_ranks = ranks.all_gather_objects(list(zip(prompts, parameters, strict=True)))
        rows = [row for of_rank in of_ranks for row in of_rank]
        first = sum(map(len, of_ranks[: ranks.rank()]))

        def begin() -> Future | None:
            return in_background(self._rolled_out, [rows])[0] if ranks.rank() == 0 else None

        begun = begin()

        def answered() -> list[tuple[list[int], list[float]]] | None:
            return begun.result()

        def wait() -> list[SampledTokens]:
            nonlocal begun
            while (answers := ranks.from_rank_0(answered)) is None:
                self.publish()
                begun = begin()
            return [self.sampled(*answer) for answer in answers[first : first + len(prompts)]]

        return wait

    def _rolled_out(self, rows: list[Row]) -> list[tuple[list[int], list[float]]] | None:
        """Token ids and log-probabilities of each row, all from the newest weights; None if a server has others and
        needs all ranks to get them. Rows are spread over the servers in turn; those of a server that ended meanwhile
        are asked again. Runs in a thread of rank 0."""
        answers: dict[int, tuple[list[int], list[float]]] = {}
        adapter = self.version if self.sync == "adapter" else None
        failing: dict[Client, float] = {}  # since when

        def ask(row: int) -> tuple[list[int], list[float]] | None:
            return self._answer(self.clients[row % len(self.clients)], rows[row], adapter)

        while missing := [row for row in range(len(rows)) if row not in answers]:
            asked = {self.clients[row % len(self.clients)] for row in missing}
            if not all([self._is_refreshed(client, failing.get(client)) for client in asked]):
                return None
            found = {row: each.result() for row, each in zip(missing, in_background(ask, missing), strict=True)}
            kept = {client for client in asked if self._is_current(client)}
            for row, answer in found.items():
                client = self.clients[row % len(self.clients)]
                if answer is not None and client in kept:
                    answers[row] = answer
                else:
                    failing.setdefault(client, time.monotonic())
        return [answers[row] for row in range(len(rows))]

    def _answer(self, client: Client, row: Row, adapter: str | None) -> tuple[list[int], list[float]] | None:
        """None if the server ended, or has another adapter."""
        try:
            return client.complete(*row, adapter)
        except Unreachable:
            return None
        except Refused as error:
            if adapter is not None and error.status == 404:
                return None
            if "not JSON compliant" in str(error):
                return [], [math.nan]
            raise RuntimeError(f"The vLLM server at {client.url} refused a rollout: {error}") from None

    def _is_current(self, client: Client) -> bool:
        try:
            return client.weight_version() == self.version
        except Unreachable:
            return False

    def _is_refreshed(self, client: Client, failing_since: float | None = None) -> bool:
        """Wait for the server and, if it was restarted, give it the newest weights. False if that takes all ranks."""

        def refresh() -> bool:
            version = client.weight_version()
            if version == self.version:
                return True
            if version.startswith(OURS) and not version.startswith(f"{OURS}{self.run}-"):
                raise RuntimeError(
                    f"Another run pushes its weights to the vLLM server at {client.url}: give each run servers of its "
                    "own (vllm_server_base_url)."
                )
            ranks.tell(f"The vLLM server at {client.url} was restarted: it gets the newest weights.")
            self._checked(client)
            if self.sync == "nccl":
                self.nccl.restart()
                return False
            self._load(client)
            return True

        return self._patiently(client, refresh, since=failing_since)

    def _patiently(
        self,
        client: Client,
        work: Callable[[], T],
        remedy: str = "start it again and resume the run from its newest checkpoint",
        since: float | None = None,
    ) -> T:
        """Repeat the work, less and less often, while the server does not answer. Raises RuntimeError when it has not
        answered for vllm_server_timeout seconds. since: when it failed for the first time."""
        limit, pause = self.args.vllm_server_timeout, 0.25
        while True:
            try:
                return work()
            except Unreachable as error:
                if since is None:
                    ranks.tell(f"The vLLM server at {client.url} does not answer ({error}): waiting for it.")
                since = since or time.monotonic()
                if time.monotonic() - since > limit:
                    raise RuntimeError(
                        f"No vLLM server has answered at {client.url} for vllm_server_timeout={limit:.0f} seconds: "
                        f"{remedy}."
                    ) from None
            time.sleep(pause)
            pause = min(2 * pause, 8.0)

    # ---- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        if self.files is not None:  # on rank 0, once the servers were accepted
            for client in self.clients if self.sync == "adapter" else ():
                with suppress(Unreachable):
                    self._unload_adapters(client)
        self.abandon()
        self.longest, self.is_stale, self.nccl = None, True, None

    def abandon(self) -> None:
        if self.files is not None:
            self.files.remove()
        self.files = None


def _reset_prefix_cache(client: Client) -> None:
    if not client.post("/reset_prefix_cache")["success"]:
        raise Unreachable("its prefix cache is in use")
