"""A rank that dies or hangs: the other ends with an error within the process group's timeout, and tells no reading."""

import json
import multiprocessing

import pytest
from distributed import failing_rank
from one_process import micro_batches

from grgauge import AdamW

CASES = [("DDP", "exit", "train"), ("DDP", "kill", "ask"), ("DDP", "hang", "train"), ("FSDP2", "hang", "ask")]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """(exit status, lines written) of rank 0, of all cases at once."""
    folder = tmp_path_factory.mktemp("survivors")
    context = multiprocessing.get_context("forkserver")  # one import of torch for all
    context.set_forkserver_preload(["torch.distributed.fsdp", "grgauge.gauge.ranks"])
    pairs = {}
    main = failing_rank.main
    for i, case in enumerate(CASES):
        arguments = str(folder / f"{i}"), str(folder / f"{i}.jsonl"), *case
        pairs[case] = [context.Process(target=main, args=(rank, *arguments), daemon=True) for rank in range(2)]
        for process in pairs[case]:
            process.start()
    results = {}
    try:
        for i, (case, (first, _)) in enumerate(pairs.items()):
            first.join(timeout=120)
            lines = (folder / f"{i}.jsonl").read_text("utf-8").splitlines()
            results[case] = first.exitcode, [json.loads(line) for line in lines]
    finally:
        for process in (p for pair in pairs.values() for p in pair):
            process.kill()
            process.join()
    return results


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_the_other_rank_ends_with_an_error(ended, case):
    status, (*readings, end) = ended[case]
    assert status == 1
    assert end["raised"]
    assert end["in"] == failing_rank.FATAL + (case[2] == "train")
    assert end["after"] < failing_rank.TIMEOUT + 3.0
    if case[1] == "hang":
        assert end["after"] > failing_rank.TIMEOUT - 1.0
    # Of step 8 one rank's share is missing, so nothing is told of it; what was told before is right.
    assert [reading["step"] for reading in readings] == [2, 4, 6]


def test_what_was_told_before_is_right(ended):
    expected = micro_batches(lambda params: AdamW(params, lr=1e-3), 2, steps=6, every=2)[2].reading()
    for _, (*_, last, _) in ended.values():
        assert last["step"] == 6
        assert last["gr_t"] == pytest.approx(expected.gr_t, rel=1e-5)
        assert last["gr_s"] == pytest.approx(expected.gr_s, rel=1e-5)
