"""Ranks that read a data set at the same time."""

import io
import json
from contextlib import redirect_stdout

import datasets

from sdft_ds import read_dataset
from sdft_ds.distributed import launch, ranks


def read(file, cache):
    datasets.config.HF_DATASETS_CACHE = cache
    launch.start_process_group("zero2", use_cpu=True, timeout_seconds=60)
    ranks.barrier()
    with redirect_stdout(io.StringIO()) as said:
        rows = read_dataset(file)
    return ranks.rank(), said.getvalue(), rows[:]


def test_all_ranks_recognise_the_same_format_and_the_first_one_says_so(two_ranks, tmp_path):
    """Both write the rows within the object to the same file, which is read then."""
    rows = [{"instruction": f"Q{i}", "output": f"A{i}"} for i in range(1000)]
    (tmp_path / "rows.json").write_text(json.dumps({"data": rows}))
    (first, said, got), (second, silent, same) = two_ranks.run(read, tmp_path / "rows.json", tmp_path / "cache")
    assert (first, second) == (0, 1) and "Data set format alpaca" in said and silent == ""
    assert got == same and got["golden_response"] == [row["output"] for row in rows]
    assert len(list((tmp_path / "cache" / "sdft_ds").iterdir())) == 1
