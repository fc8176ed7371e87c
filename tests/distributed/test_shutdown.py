import pytest
from torch import distributed
from torch.distributed import HashStore, TCPStore

from sdft_ds.distributed import shutdown
from sdft_ds.distributed.launch import free_port


def test_a_store_that_is_gone_means_a_rank_that_failed():
    """Rank 0's process serves the store: where it has failed, the store is gone before it could be read."""
    port = free_port()
    server = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", port, is_master=False)
    client.add(shutdown.DONE, 1)
    assert shutdown.ranks.world_size() == 1 and not shutdown._waits_for_others(client)
    del server
    with pytest.raises(RuntimeError, match="Another rank has failed"):
        shutdown._waits_for_others(client)


@pytest.mark.parametrize("error", [None, ValueError("on purpose"), KeyboardInterrupt(), shutdown.Preempted(99)])
def test_one_rank_closes_its_process_group_however_it_ends(error):
    """NCCL warns of one that is left open, below the error that matters."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)

    def command():
        with shutdown.together():
            if error is not None:
                raise error

    if error is None:
        command()
    else:
        raised = SystemExit if isinstance(error, KeyboardInterrupt) else type(error)
        with pytest.raises(raised):
            command()
    assert not distributed.is_initialized()
