"""A core program whose device dies of a token: `python tests/e2e/poisoned_core.py --address …`.

The executor is the synthetic one, but a prompt that contains `POISON` ends the process at once, as
a kernel that faults takes its process with it; one with `SLOW_POISON` does when its row is longer
than `SLOW_LENGTH` tokens.
"""

import os
import signal
import sys

from nanovllm import launch
from nanovllm.config import EngineConfig
from nanovllm.executor.base import Executor
from nanovllm.executor.synthetic import SyntheticExecutor, SyntheticStep
from nanovllm.protocol.plan import ProgressCallback, StepPlan

POISON = 31_999
SLOW_POISON = 31_998
SLOW_LENGTH = 20


class PoisonedExecutor(SyntheticExecutor):
    """Dies of the first step of a row that contains `POISON`."""

    def __init__(self, config: EngineConfig, on_progress: ProgressCallback) -> None:
        super().__init__(config, on_progress)
        self._slow_rows: set[int] = set()

    def submit(self, plan: StepPlan) -> SyntheticStep:
        for new in plan.new_rows:
            self._slow_rows.discard(new.row)
            if SLOW_POISON in new.token_ids[: new.num_prompt_tokens]:
                self._slow_rows.add(new.row)
        ends = map(sum, zip(plan.num_computed, plan.num_scheduled, strict=True))
        is_long = {row for row, end in zip(plan.rows, ends, strict=True) if end > SLOW_LENGTH}
        prompts = (new.token_ids[: new.num_prompt_tokens] for new in plan.new_rows)
        if is_long & self._slow_rows or any(POISON in prompt for prompt in prompts):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().submit(plan)


def make_executor(config: EngineConfig, on_progress: ProgressCallback) -> Executor:
    return PoisonedExecutor(config, on_progress)


if __name__ == "__main__":
    launch.make_executor = make_executor
    sys.exit(launch.core_main())
