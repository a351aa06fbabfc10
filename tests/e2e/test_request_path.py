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
    model = str(tiny_checkpoint("llama"))
    generated, chatted = await both(model, byte_tokenizer(), dtype="float32", **SMALL)
    lines = lines_of(generated)
    assert {"frontend/link.py", "frontend/request.py"} <= lines.keys()
    assert {"core/scheduler.py", "worker/model_runner.py"} <= lines.keys(), "all rooms are seen"
    # What a wait or a stall brings on a busy machine is counted, too: some 30 lines.
    away = ("core_life", "supervisor", "suspects", "resume")  # what runs at a start or a death
    for path, rooms, most_files, most_lines in (
        (lines, ("frontend",), 7, 435),
        # Chats: events that differ in a text are encoded around it, whatever the text is.
        (lines_of(chatted), ("frontend", "frontend.server"), 16, 1190),
    ):
        mine = {file: some for file, some in path.items() if room_of(file) in rooms}
        assert not [file for file in mine if Path(file).stem in away], mine.keys()
        assert len(mine) <= most_files, mine.keys()
        assert sum(map(len, mine.values())) <= most_lines
    assert generated & chatted
