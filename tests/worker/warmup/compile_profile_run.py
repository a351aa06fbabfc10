"""Which kernels of a worker's profile run are not in Triton's cache yet.

`python tests/worker/warmup/compile_profile_run.py JOB` (a `precompile.Job` as JSON) goes through
it on CPU tensors, as `compile_launches.py` does. Prints a JSON object: kernel → whether it was
found there.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor
from triton import knobs

from nanovllm.worker.kernels.triton.launch import Gpu
from nanovllm.worker.warmup.dummy_steps import run_heaviest_step
from nanovllm.worker.warmup.precompile import Job
from nanovllm.worker.warmup.triton_precompile import leave_launches_out, runner_for


def make_zeros(make: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    return make(*args, **options).zero_()


def main() -> None:
    job = msgspec.json.decode(sys.argv[1], type=Job)
    leave_launches_out(Gpu(*job.gpu))
    # What kernels would have filled in is zeros: ids must at least exist.
    torch.empty = partial(make_zeros, torch.empty)
    torch.empty_like = partial(make_zeros, torch.empty_like)
    found: dict[str, bool] = {}

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        found[f"{src.name} {len(found)}"] = cache_hit

    knobs.compilation.listener = listen
    runner = runner_for(job, torch.device("cpu"))
    run_heaviest_step(runner, job.limits, max_model_len=job.spec.max_position_embeddings)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
