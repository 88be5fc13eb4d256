"""What the watchdog says of others' words; that it ends real jobs is in tests/faults."""

import pytest

from mser_dist.ranks.distributed import World
from mser_dist.ranks.watchdog import Watchdog, _is_of_a_collective, _named


def test_one_process_needs_none() -> None:
    dog = Watchdog(World(), silence=1.0, stall=1.0)
    with pytest.raises(RuntimeError, match="its own"), dog.watch():
        dog.tick("step 1")
        raise RuntimeError("its own")


def test_ranks_are_named_with_their_host_and_place() -> None:
    seen = {rank: (f"3 7 node{rank} step 12, data", 0.0) for rank in range(6)}
    assert _named([1], seen) == "rank 1 on node1 (at: step 12, data)"
    assert _named([0, 1, 2, 3, 4, 5], seen).endswith("rank 3 on node3 (at: step 12, data) and 2 more")


@pytest.mark.parametrize(
    ("said", "waits"),
    [
        ("[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:26002", True),
        ("NCCL communicator was aborted on rank 1", True),
        ("mat1 and mat2 shapes cannot be multiplied (4x3 and 2x5)", False),
        ("CUDA out of memory", False),
    ],
)
def test_only_a_broken_collective_waits_for_the_name_of_the_peer(said: str, waits: bool) -> None:
    assert _is_of_a_collective(RuntimeError(said)) is waits
