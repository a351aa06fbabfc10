"""Bodies of any JSON, and real ones with a field of any JSON: an answer or a 4xx, never a 500."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm.frontend.server.bodies import ChatBody, CompletionBody
from tests.frontend.fake_core import echo
from tests.frontend.server.served import error_of, roomy, served
from tests.waiting import WAIT_S

NUM_BATCHES, BATCH = 12, 20
# The same bodies at every run: what a test finds, it finds for whoever brought it in.
SETTINGS = settings(
    deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
)
ODD: tuple[Any, ...] = (None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, -0.0, "", "\x00", "é😀")
VALUES = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
WHOLE: dict[str, tuple[type[msgspec.Struct], dict[str, Any]]] = {
    "/v1/completions": (CompletionBody, {"prompt": "hi", "max_tokens": 3}),
    "/v1/chat/completions": (ChatBody, {"messages": [{"role": "user", "content": "hi"}]}),
}


def bodies(path: str) -> st.SearchStrategy[Any]:
    """Three of four are real but for one or two fields."""
    kind, whole = WHOLE[path]
    changes = st.dictionaries(
        st.sampled_from(kind.__struct_fields__), VALUES, min_size=1, max_size=2
    )
    return st.one_of(*[changes.map(lambda changed: {**whole, **changed})] * 3, VALUES)


@pytest.mark.parametrize("path", WHOLE)
def test_no_body_is_a_fault_of_the_server(
    path: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @given(st.lists(bodies(path), min_size=BATCH, max_size=BATCH))
    @settings(SETTINGS, max_examples=NUM_BATCHES)
    def run(some: list[Any]) -> None:
        asyncio.run(send(tmp_path_factory.mktemp("core"), some))

    async def send(directory: Path, some: list[Any]) -> None:
        async with served(f"ipc://{directory}/core.sock", roomy(echo)) as server:
            for body in some:
                content = msgspec.json.encode(body)
                async with asyncio.timeout(WAIT_S):
                    response = await server.client.post(path, content=content)
                assert response.status_code in (200, 400, 404, 413), (body, response.text)
                if response.status_code != 200:
                    assert error_of(response)["message"], body
            assert (await server.client.get("/health")).status_code == 200

    run()
