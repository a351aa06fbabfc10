"""What both ends of a connection between frontend and core do alike with their ZeroMQ sockets.

`core/socket.py` binds one end, `frontend/link.py` connects the other.
"""

import zmq

# Flags of `zmq.EVENTS`, as plain integers: those of zmq are enums, whose `&` is slow.
READABLE, WRITABLE = int(zmq.POLLIN), int(zmq.POLLOUT)
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 2000, 10_000


def notice_lost_machines(socket: "zmq.Socket[bytes]", address: str) -> None:
    """Over tcp, ask the other side for signs of life: a machine that vanishes says nothing. A
    process of this machine that dies has its connections closed by the kernel."""
    if address.startswith("tcp:"):
        socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
