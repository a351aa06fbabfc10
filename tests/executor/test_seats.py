"""Where ranks of several hosts sit, and what they are given."""

import socket

from nanovllm.executor.rank_process import LOOPBACK, Seat
from nanovllm.executor.seats import Place, interface_of, passed_environment, seat_by_node


def test_ranks_of_a_node_follow_each_other_and_those_near_the_core_come_first() -> None:
    places = [
        Place("b", "10.0.0.2", ["1"]),
        Place("c", "10.0.0.1", ["0"]),
        Place("a", "10.0.0.3", []),
        Place("b", "10.0.0.2", ["0"]),
        Place("d", "10.0.0.1", ["0"]),  # another node of the same host
    ]
    assert seat_by_node(places, "a") == [
        (2, Seat(0, 0, 1)),
        (1, Seat(1, 0, 1)),
        (4, Seat(2, 0, 1)),
        (0, Seat(3, 0, 2)),
        (3, Seat(4, 1, 2)),
    ]
    assert [index for index, _ in seat_by_node(places, "elsewhere")] == [1, 4, 0, 3, 2]


def test_ranks_get_no_secrets_and_nothing_that_is_their_own() -> None:
    environment = {
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "2",
        "CUDA_LAUNCH_BLOCKING": "1",
        "CUDA_VISIBLE_DEVICES": "5",
        "CUDA_HOME": "/opt/cuda",
        "NANOVLLM_API_KEY": "secret",
        "HF_TOKEN": "secret",
        "PATH": "/bin",
    }
    passed = passed_environment(environment)
    assert sorted(passed) == ["CUDA_LAUNCH_BLOCKING", "NCCL_DEBUG", "OMP_NUM_THREADS"]


def test_an_address_belongs_to_an_interface() -> None:
    assert interface_of("127.0.0.1") == LOOPBACK == interface_of("127.0.0.2")
    assert LOOPBACK in [name for _, name in socket.if_nameindex()]
    assert interface_of("192.0.2.255") is None  # of a network for documentation
