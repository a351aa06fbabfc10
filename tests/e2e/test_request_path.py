"""How much code a request passes in the frontend, counted by `benchmarks/request_path.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.request_path import both, lines_of, room_of
from tests.frontend.vocabulary import byte_tokenizer

SMALL: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 128}


async def test_a_request_passes_few_functions_of_the_frontend(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    path = str(tiny_checkpoint("llama"))
    generated, chatted = await both(path, byte_tokenizer(), dtype="float32", **SMALL)
    lines = lines_of(generated)
    assert {"frontend/link.py", "frontend/request.py"} <= lines.keys()
    assert {"core/scheduler.py", "worker/model_runner.py"} <= lines.keys(), "all rooms are seen"
    mine = {file: some for file, some in lines.items() if room_of(file) == "frontend"}
    away = ("core_life", "supervisor", "suspects", "resume")  # what runs at a start or a death
    assert not [file for file in mine if Path(file).stem in away], mine.keys()
    assert len(mine) <= 7 and sum(map(len, mine.values())) <= 490
    assert generated & chatted and len(lines_of(chatted)) > len(lines)
