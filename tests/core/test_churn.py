"""Clients come, go and vanish; requests end, are aborted, are preempted; nothing is left behind."""

import os
from pathlib import Path

from benchmarks.churn import PositionExecutor, check_at_rest, churn, resting_status
from tests.core.serving import serving
from tests.e2e.processes import wait_until
from tests.waiting import WAIT_S


def num_open() -> int:
    """File descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_lost_or_left(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/core.sock"
    with serving(address, PositionExecutor(), max_num_seqs=32):
        churn(address, num_requests=100, seed=1)
        resting_status(address)
        num_fds = num_open()
        tally = churn(address, num_requests=800, seed=2)
        status = resting_status(address)
        # ZeroMQ closes sockets in a thread of its own.
        wait_until(lambda: num_open() <= num_fds + 8, timeout_s=WAIT_S, what="sockets closed")
    assert not tally.errors
    assert min(tally.num_finished, tally.num_aborted, tally.num_abandoned) > 0, tally
    check_at_rest(status)
