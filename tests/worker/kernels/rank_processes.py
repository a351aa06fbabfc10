"""Ranks as processes that run kernels in the interpreter over memory they share."""

from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from nanovllm.worker.kernels.triton.exchange import MAX_PROGRAMS

WAIT_S = 600.0  # only a fault takes that long: interpreters import torch, and go through loops


def found_by_ranks(
    run_rank: Callable[..., Any], size: int, *, num_bytes: int, epoch: int
) -> list[list[Tensor]]:
    """What each rank's run_rank(rank, memories, epoch, answer) sends, a list of arrays.

    num_bytes: of each rank's memory, whose flags begin at `epoch`. The environment must name the
    interpreter already.
    """
    memories = [torch.zeros(num_bytes, dtype=torch.uint8).share_memory_() for _ in range(size)]
    for memory in memories:
        memory[: MAX_PROGRAMS * size * 4].view(torch.int32).fill_(epoch)
    context = get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        context.Process(target=run_rank, args=(rank, memories, epoch, answer), daemon=True)
        for rank, (_, answer) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    try:
        for _, answer in pipes:
            answer.close()
        answers = []
        for mine, _ in pipes:
            assert mine.poll(WAIT_S)
            answers.append([torch.from_numpy(array) for array in mine.recv()])
        return answers
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
