"""Which rank sits where if they are on several hosts, and what of the environment each is given.

Launchers for several hosts call this, on the core's side and on each host. It starts nothing.
"""

import fcntl
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nanovllm.executor.rank_process import LOOPBACK, Seat

SIOCGIFADDR = 0x8915  # of Linux' ioctl: the address of a network interface
# What ranks get of the core's environment. Nothing else: it holds secrets, and paths of its host.
PASSED = (
    *("CUBLAS_", "CUDA_", "GLOO_", "MKL_", "NANOVLLM_CACHE", "NANOVLLM_CPU_ISA", "NCCL_"),
    *("OMP_", "TORCH_", "TORCHINDUCTOR_", "TRITON_", "UCX_"),
)
# What is each host's or each rank's own.
NOT_PASSED = ("CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES")


class Place(NamedTuple):
    """Where an actor has come to be. gpus: as CUDA_VISIBLE_DEVICES would name them."""

    node_id: str
    host: str
    gpus: list[str]


def seat_by_node(places: Sequence[Place], own_node: str) -> list[tuple[int, Seat]]:
    """Which place gets which seat, in the order of ranks: those of one node follow each other,
    and the first ones are near the core, if any are."""

    def node_of(index: int) -> tuple[bool, str, str]:
        place = places[index]
        return place.node_id != own_node, place.host, place.node_id

    seated: list[tuple[int, Seat]] = []
    for rank, index in enumerate(sorted(range(len(places)), key=node_of)):
        near = [seat for other, seat in seated if places[other].node_id == places[index].node_id]
        local_size = sum(place.node_id == places[index].node_id for place in places)
        seated.append((index, Seat(rank, len(near), local_size)))
    return seated


def passed_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What ranks get of the core's."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(PASSED) and name not in NOT_PASSED
    }


def interface_of(address: str) -> str | None:
    """The network interface of this host that has that IPv4 address; None if none has."""
    if address.startswith("127."):
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None
