"""What passes between the stages of a pipeline: the residual stream of each step's tokens.

A stage's `Decoder` has one. `ModelRunner` receives before a step and sends behind it, outside of
what CUDA graphs hold, so that stages need not run a step in the same shape. Steps pass in the
order of plans, from each rank to the one that has its place in the next stage.
"""

from typing import Protocol

from torch import Tensor, distributed

from nanovllm.worker.parallel import TensorParallel


class StageLink(Protocol):
    """received: where the stage before leaves what it has made of a step's tokens, [most tokens of
    a step, hidden_size]: memory that stays, for graphs, and that steps only read. None in the first
    stage, to which nothing is sent; is_last: of the stage that sends nothing."""

    @property
    def received(self) -> Tensor | None: ...

    @property
    def is_last(self) -> bool: ...

    def receive(self, num_tokens: int) -> None:
        """Fill the first lines of `received`, in stream order; on a CPU, wait for it."""

    def send(self, hidden: Tensor) -> None:
        """hidden: [num_tokens, hidden_size], kept as it is until it has gone, in stream order."""


class RankLink:
    """A `StageLink` by torch.distributed, in whose default group all stages are."""

    def __init__(self, received: Tensor | None, parallel: TensorParallel) -> None:
        self.received = received
        self.is_last = parallel.stage == parallel.num_stages - 1
        self._rank = parallel.number
        self._stride = parallel.size
        # The last one sent, and its memory: on a CPU it may still be on its way.
        self._sending: tuple[distributed.Work, Tensor] | None = None

    def receive(self, num_tokens: int) -> None:
        assert self.received is not None
        distributed.recv(self.received[:num_tokens], self._rank - self._stride)

    def send(self, hidden: Tensor) -> None:
        self._await_sent()
        work = distributed.isend(hidden, self._rank + self._stride)
        assert work is not None
        self._sending = work, hidden
        if hidden.is_cuda:  # the stream waits, and not the host: the next step may write there
            self._await_sent()

    def _await_sent(self) -> None:
        """On a CPU, until the next stage has taken what was sent last."""
        if self._sending is not None:
            self._sending[0].wait()
            self._sending = None
