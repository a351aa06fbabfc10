"""A whole engine but for the sockets: the real core, the real worker, one process."""

from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.executor.inline import inline_executor
from nanovllm.protocol.messages import AddRequest, CoreStatus
from nanovllm.sampling_params import SamplingParams

CLIENT = 0


class Engine:
    """Generates token ids from token ids; keeps its KV and prefix cache between calls."""

    def __init__(self, **settings: Any) -> None:
        config = EngineConfig.from_kwargs(**{"dtype": "float32", "device": "cpu", **settings})
        self._executor = inline_executor(config, lambda phase, progress: None)
        self.info = self._executor.start()
        self._executor.allocate(self.info.num_blocks)
        self._core = EngineCore(config, self._executor, self.info)
        self._next_number = 0

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams | list[SamplingParams],
        *,
        abort: frozenset[int] = frozenset(),
    ) -> list[list[int]]:
        """One list of output ids per prompt. Those in `abort` are aborted after some tokens."""
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        first = self._next_number
        for prompt, one in zip(prompts, params, strict=True):
            self._core.add(CLIENT, AddRequest(self._next_number, prompt, one))
            self._next_number += 1
        outputs: list[list[int]] = [[] for _ in prompts]
        while self._core.busy:
            step = self._core.step()
            if step is None:
                continue
            for sequence, token_id in zip(step.sequences, step.token_ids, strict=True):
                index = sequence.number - first
                outputs[index].append(token_id)
                if index in abort and len(outputs[index]) == 5:
                    self._core.abort(CLIENT, [sequence.number])
        status = self.status()
        assert status.num_free_blocks == status.num_blocks, "blocks leaked"
        return outputs

    def status(self) -> CoreStatus:
        return self._core.status(epoch="", num_clients=1)

    def close(self) -> None:
        self._executor.shutdown()
