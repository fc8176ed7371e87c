import pytest
from torch.distributed import TCPStore

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
