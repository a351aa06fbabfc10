"""Clients come, go and vanish; requests end, are aborted, are preempted; nothing is left behind."""

import os
from pathlib import Path

from benchmarks.churn import PositionExecutor, check_at_rest, churn, resting_status
from tests.core.serving import serving


def test_nothing_is_lost_or_left(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/core.sock"
    with serving(address, PositionExecutor(), max_num_seqs=32, client_lease_s=2.0):
        churn(address, num_requests=100, seed=1)
        resting_status(address)
        num_fds = len(os.listdir("/proc/self/fd"))
        tally = churn(address, num_requests=800, seed=2)
        status = resting_status(address)
        assert len(os.listdir("/proc/self/fd")) <= num_fds + 8  # closing sockets linger a moment
    assert not tally.errors
    assert min(tally.num_finished, tally.num_aborted, tally.num_abandoned) > 0, tally
    check_at_rest(status)
