"""The examples run as their first lines say."""

from pathlib import Path

import pytest
from torchrun import torchrun

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_both_examples_read_the_same_and_reach_a_verdict(world):
    """The same weights and batches, whether gradients are averaged by DDP or by FSDP2."""
    outputs = [torchrun(world, EXAMPLES / name, limit=120).splitlines() for name in ("ddp.py", "fsdp2.py")]
    steps = [[line for line in output if line.startswith("step")] for output in outputs]
    assert len(steps[0]) == 6
    assert steps[0] == steps[1]
    for output in outputs:
        assert "LR" in output[-1]
        assert "batch" in output[-1]
