"""Where a grammar is tried before the core compiles it: a process whose death costs one request.

`GrammarCompiler` tries each new one here, from any thread, and the first starts it; `launch` closes
it. Workers (`grammar_trial`) have less stack than any thread of the core that runs
llguidance, little memory and little time, so what passes there can neither overflow nor exhaust the
core. The process ends with its owner, whose end of a socket it watches.
"""

import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from types import TracebackType

import msgspec

from nanovllm.core.grammar_source import cannot_be_used
from nanovllm.core.grammar_trial import Died, Trial, Verdict, receive_frame, send_frame
from nanovllm.sampling_params import StructuredOutputsParams

PROGRAM = ["-m", "nanovllm.core.grammar_trial"]
STACK_BYTES = 1 << 20  # llguidance's own threads have twice as much, those that compile 16 times
MEMORY_BYTES = 256 << 20  # what compiling may add
START_S = 30.0  # most that the process may take to start, on a busy machine
MAX_IDLE = 2  # workers kept for the next trials
CAUSES = {
    signal.SIGSEGV: f"it nests or refers too deeply to be compiled with {STACK_BYTES >> 20} MiB of "
    "stack: shorten its chains of references, rules and groups",
    signal.SIGABRT: f"it takes more than {MEMORY_BYTES >> 20} MiB of memory to compile: simplify "
    "it (fewer or smaller repetitions and alternatives)",
    signal.SIGPROF: "it was not compiled within grammar_timeout_s of processor time: simplify it, "
    "or raise grammar_timeout_s",
}


class GrammarSandbox:
    """timeout_s: of one trial, in processor time. Nothing is started before it is needed."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # of all below
        self._command: list[str] = []
        self._tokenizer_fd = -1  # a file in memory, kept for when the process has to start again
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._idle: list[socket.socket] = []

    def set_up(self, tokenizer_json: str, *, vocab_size: int, eos_token_ids: list[int]) -> None:
        """With what the process is to be started. Raises `OSError`."""
        command = [sys.executable, *PROGRAM, "--vocab-size", str(vocab_size)]
        for token_id in eos_token_ids:
            command += ["--eos-token-id", str(token_id)]
        command += ["--stack-bytes", str(_stack_bytes()), "--memory-bytes", str(MEMORY_BYTES)]
        with self._lock:
            self._release()
            self._command = command
            self._tokenizer_fd = os.memfd_create("tokenizer.json")
            with open(self._tokenizer_fd, "wb", closefd=False) as file:
                file.write(tokenizer_json.encode())

    def try_out(self, wanted: StructuredOutputsParams) -> None:
        """Raises `ValueError` naming the field if this grammar must not be compiled here."""
        for _ in range(2):  # once more if somebody killed the process, or a worker that was idle
            link = self._borrow()
            answer = _ask(link, Trial(wanted, self._timeout_s))
            if isinstance(answer, Verdict):
                self._give_back(link, spent=answer.spent)
                if answer.cause is not None:
                    raise ValueError(answer.cause)
                return
            link.close()
            if answer is not None and answer.signal_number in CAUSES:
                raise cannot_be_used(wanted, CAUSES[signal.Signals(answer.signal_number)])
        raise cannot_be_used(wanted, "the process that tries it was killed: it may need too much")

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._release()

    def __enter__(self) -> "GrammarSandbox":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _borrow(self) -> socket.socket:
        """The end of a worker, idle or new."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._spawn()
            while self._idle:
                link = self._idle.pop()
                if not has_news(link):
                    return link
                link.close()  # its worker has died: nothing was asked
            mine, others = socket.socketpair()
            mine.settimeout(self._timeout_s + START_S)
            with others:
                try:
                    self._hand_over(others)
                except ConnectionError:  # the process was killed, and has not been found dead above
                    self._spawn()
                    self._hand_over(others)
            return mine

    def _hand_over(self, link: socket.socket) -> None:
        """Have the process start a worker at this end."""
        assert self._control is not None
        socket.send_fds(self._control, [b"\0"], [link.fileno()])

    def _give_back(self, link: socket.socket, *, spent: bool) -> None:
        with self._lock:
            if not spent and len(self._idle) < MAX_IDLE:
                self._idle.append(link)
                return
        link.close()

    def _spawn(self) -> None:
        self._end_process()
        self._control, others = socket.socketpair()
        os.lseek(self._tokenizer_fd, 0, os.SEEK_SET)
        with others:
            self._process = subprocess.Popen(
                [*self._command, "--control-fd", str(others.fileno())],
                stdin=self._tokenizer_fd,
                pass_fds=[others.fileno()],
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )

    def _release(self) -> None:
        self._end_process()
        if self._tokenizer_fd >= 0:
            os.close(self._tokenizer_fd)
            self._tokenizer_fd = -1

    def _end_process(self) -> None:
        for link in self._idle:
            link.close()
        self._idle.clear()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()  # its workers die with it
            self._process.wait()
            self._process = None


def has_news(link: socket.socket) -> bool:
    """Whether there is something to read, be it the end."""
    poll = select.poll()
    poll.register(link, select.POLLIN)
    return bool(poll.poll(0))


def _ask(link: socket.socket, trial: Trial) -> Verdict | Died | None:
    """The worker's answer; None if the whole process has gone without a word."""
    try:
        send_frame(link, trial)
        frame = receive_frame(link)
    except OSError:
        return None
    return None if frame is None else msgspec.msgpack.decode(frame, type=Verdict | Died)


def _stack_bytes() -> int:
    """Half of what this process's own main thread has, if that is less than usual."""
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return STACK_BYTES if soft == resource.RLIM_INFINITY else min(STACK_BYTES, soft // 2)
