"""Sends weights to vLLM's servers from GPU to GPU. Imports vllm.

Not run on the machines of the project's tests, which have no GPU for it: written after the sources of vLLM 0.30.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sdft_ds.rollouts.vllm_client import Client, address_towards, in_background

Group = list[tuple[str, Tensor]]


class Nccl:
    """Sends weights from this GPU to those of all servers, by vLLM's own packing. metadata: (name, dtype, shape) of
    each tensor in the order of sending."""

    def __init__(self, clients: list[Client], port: int):
        self.clients, self.port = clients, port
        self.metadata: list[tuple[str, str, list[int]]] = []
        self.group: Any = None

    def restart(self) -> None:
        """A group that has lost a member is of no use."""
        self.group = None

    def send(self, groups: Iterator[Group], version: str) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        if self.group is None:
            self.group = self._meet()
        names, dtypes, shapes = map(list, zip(*self.metadata, strict=True))
        about = {"names": names, "dtype_names": dtypes, "shapes": shapes}
        for client in self.clients:
            client.post("/start_weight_update")
        # The servers receive while this rank sends.
        receiving = in_background(lambda client: client.post("/update_weights", update_info=about), self.clients)
        packed_nccl_broadcast_producer(
            iterator=_in_order(groups), group=self.group, src=0, post_iter_func=lambda item: item[1]
        )
        for each in receiving:
            each.result()
        for client in self.clients:
            client.post("/finish_weight_update", weight_version=version)

    def _meet(self) -> Any:
        """The communicator of this rank (0) and the workers of all servers."""
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        sizes = [client.get("/get_world_size")["world_size"] for client in self.clients]
        meeting = {
            "master_address": address_towards(self.clients[0].url),
            "master_port": self.port,
            "world_size": 1 + sum(sizes),
        }
        offsets = [1 + sum(sizes[:i]) for i in range(len(sizes))]
        joining = in_background(
            lambda i: self.clients[i].post(
                "/init_weight_transfer_engine", init_info={**meeting, "rank_offset": offsets[i], "packed": True}
            ),
            range(len(sizes)),
        )
        group = trainer_init(meeting)
        for each in joining:
            each.result()
        return group


def _in_order(groups: Iterator[Group]) -> Iterator[tuple[str, Tensor]]:
    """Pairs, gathered on the default stream and there before they are given: vLLM packs them on streams of its own."""
    while True:
        with torch.cuda.stream(torch.cuda.default_stream()):
            group = next(groups, None)
        torch.cuda.synchronize()
        if group is None:
            return
        yield from group
