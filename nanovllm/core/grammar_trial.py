"""The program that tries grammars before the core compiles them: what they do, they do here first.

`GrammarSandbox` starts it, with the tokenizer.json on stdin, and sends it over a socket the ends of
others: for each it forks a worker, which takes `Trial`s and answers `Verdict`s there; a worker that
dies of one is reported by `Died`. This process itself never looks at a grammar, has one thread, and
ends when the socket of its owner closes; workers are killed with it.
"""

import argparse
import ctypes
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING

import msgspec

from nanovllm.core.grammar_source import cannot_be_used, make_matcher, make_tokenizer, read
from nanovllm.sampling_params import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLTokenizer

NUM_TOKENS = 8  # of a made-up output that a trial goes on for
MAX_STEP_CPU_S = 0.1  # of one mask and one token accepted; an ordinary step takes a thousandth
MAX_KEPT_BYTES = 64 << 20  # by which a worker may have grown and still take the next trial
LENGTH = struct.Struct("<I")
PR_SET_PDEATHSIG = 1


class Trial(msgspec.Struct, tag=True):
    """Compile this, and take some steps. timeout_s: of processor time, however busy the machine."""

    wanted: StructuredOutputsParams
    timeout_s: float


class Verdict(msgspec.Struct, tag=True):
    """cause: why the grammar is refused, if it is. spent: this worker takes no further trial."""

    cause: str | None
    spent: bool


class Died(msgspec.Struct, tag=True):
    """What the worker died of: the number of a signal, or 0 if it ended by itself."""

    signal_number: int


def send_frame(link: socket.socket, message: msgspec.Struct) -> None:
    """Raises `OSError` (`TimeoutError` among them) if the other side does not take it."""
    frame = msgspec.msgpack.encode(message)
    link.sendall(LENGTH.pack(len(frame)) + frame)


def receive_frame(link: socket.socket) -> bytes | None:
    """The next message's bytes; None if the other side has closed. Raises `OSError`."""
    head = _receive_exactly(link, LENGTH.size)
    return None if head is None else _receive_exactly(link, LENGTH.unpack(head)[0])


def _receive_exactly(link: socket.socket, num_bytes: int) -> bytes | None:
    received = bytearray()
    while len(received) < num_bytes:
        piece = link.recv(num_bytes - len(received))
        if not piece:
            return None
        received += piece
    return bytes(received)


def try_out(tokenizer: "LLTokenizer", wanted: StructuredOutputsParams) -> None:
    """Compile, then follow an output of random tokens for a few steps, as the core would.

    Raises `ValueError` if it cannot be compiled or its steps take too long. An output that comes to
    an end, or goes wrong, on the way is not the grammar's fault.
    """
    matcher, _ = make_matcher(tokenizer, read(wanted))
    rng = random.Random(0)
    start = time.process_time()
    for _ in range(NUM_TOKENS):
        if matcher.is_stopped():
            return
        matcher.consume_token(_pick(matcher.compute_bitmask(), rng))
        end = time.process_time()
        if end - start > MAX_STEP_CPU_S:
            raise cannot_be_used(
                wanted,
                f"a single token of its output takes {(end - start) * 1e3:.0f} ms of processor "
                "time to check: simplify it (fewer alternatives and optional properties)",
            )
        start = end


def _pick(mask: bytes, rng: random.Random) -> int:
    """An id that the mask allows, from a random place on."""
    first = rng.randrange(len(mask))
    rotated = mask[first:] + mask[:first]
    index = len(rotated) - len(rotated.lstrip(b"\0"))
    lowest_bit = (rotated[index] & -rotated[index]).bit_length() - 1
    return (first + index) % len(mask) * 8 + lowest_bit


def work(
    link: socket.socket, tokenizer: "LLTokenizer", *, stack_bytes: int, memory_bytes: int
) -> None:
    """Take trials until the other side closes, with bounds that the kernel enforces: by a signal
    for stack and time, by refused memory, of which Rust code aborts."""
    _limit(resource.RLIMIT_STACK, stack_bytes)
    _limit(resource.RLIMIT_AS, _address_space_bytes() + memory_bytes)
    _limit(resource.RLIMIT_CORE, 0)
    kept = _peak_bytes() + MAX_KEPT_BYTES
    decoder = msgspec.msgpack.Decoder(Trial)
    while (frame := receive_frame(link)) is not None:
        cause = None
        trial = decoder.decode(frame)
        signal.setitimer(signal.ITIMER_PROF, trial.timeout_s)
        try:
            try_out(tokenizer, trial.wanted)
        except ValueError as error:
            cause = str(error)
        except BaseException as error:  # MemoryError, RecursionError, a panic of Rust code
            cause = str(cannot_be_used(trial.wanted, f"{type(error).__name__}: {error}"))
        signal.setitimer(signal.ITIMER_PROF, 0)
        send_frame(link, Verdict(cause, spent=_peak_bytes() > kept))


def serve(
    control: socket.socket, tokenizer: "LLTokenizer", *, stack_bytes: int, memory_bytes: int
) -> None:
    """Fork a worker for each socket that arrives, and tell there how it died, until `control`
    closes."""
    workers: dict[int, tuple[int, socket.socket]] = {}  # pidfd → pid, socket
    poller = select.poll()
    poller.register(control, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd != control.fileno():
                poller.unregister(fd)
                os.close(fd)
                pid, link = workers.pop(fd)
                _report_end(pid, link)
                continue
            _, fds, _, _ = socket.recv_fds(control, 1, 1)
            if not fds:
                return
            link = socket.socket(fileno=fds[0])
            pid = os.fork()
            if pid == 0:
                control.close()
                for _, other in workers.values():
                    other.close()
                _become_worker()
                work(link, tokenizer, stack_bytes=stack_bytes, memory_bytes=memory_bytes)
                os._exit(0)
            pidfd = os.pidfd_open(pid)
            workers[pidfd] = pid, link
            poller.register(pidfd, select.POLLIN)


def _report_end(pid: int, link: socket.socket) -> None:
    _, status = os.waitpid(pid, 0)
    with link:
        try:
            send_frame(link, Died(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0))
        except OSError:
            return  # nobody waits for it


def _become_worker() -> None:
    """Die with the parent, and leave no words behind: Rust code writes why it aborts to stderr."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _limit(kind: int, value: int) -> None:
    resource.setrlimit(kind, (value, value))


def _address_space_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Read the tokenizer, then serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--eos-token-id", type=int, action="append", default=[])
    parser.add_argument("--stack-bytes", type=int, required=True)
    parser.add_argument("--memory-bytes", type=int, required=True)
    arguments = parser.parse_args()
    tokenizer = make_tokenizer(
        sys.stdin.read(), vocab_size=arguments.vocab_size, eos_token_ids=arguments.eos_token_id
    )
    with socket.socket(fileno=arguments.control_fd) as control:
        serve(
            control,
            tokenizer,
            stack_bytes=arguments.stack_bytes,
            memory_bytes=arguments.memory_bytes,
        )


if __name__ == "__main__":
    main()
