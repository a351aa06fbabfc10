"""Whatever bytes arrive, the core answers whoever sends it sense."""

from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz_core import CleanClient, fuzz, streaming
from tests.core.fake_executor import reference
from tests.core.serving import RawClient, add, collect, serving

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("core")
    directory.chmod(0o700)
    with serving(f"ipc://{directory}/core.sock", client_lease_s=60.0):
        yield f"ipc://{directory}/core.sock"


@pytest.fixture(scope="module")
def clients(address: str) -> Iterator[tuple[RawClient, RawClient]]:
    """One that sends whatever it is told to, and one that expects to be served."""
    odd, clean = RawClient(address), RawClient(address)
    odd.greet()
    clean.greet()
    yield odd, clean
    odd.close()
    clean.close()


def test_thousands_of_frames_while_others_stream(address: str) -> None:
    clean = CleanClient(address)
    with streaming(address) as spans:
        for count in fuzz(address, num_frames=4000, seed=1):
            if count % 1000 == 0:
                assert clean.request(max_tokens=20) == reference(PROMPT, 1, 20, frozenset())
    assert len(spans) >= 1
    clean.close()


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 9), inner),
    max_leaves=8,
)
names = st.sampled_from(["Hello", "AddRequest", "Abort", "Call", "Heartbeat", "Goodbye", "Outputs"])
fields = st.sampled_from(
    ["number", "prompt_token_ids", "params", "numbers", "call_id", "operation", "deadline_ms"]
)
tagged = st.builds(
    lambda name, values: {"type": name, **values}, names, st.dictionaries(fields, values)
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(
    frames=st.lists(
        st.binary(max_size=64) | (values | tagged).map(msgspec.msgpack.encode),
        min_size=1,
        max_size=4,
    )
)
def test_no_frames_keep_others_from_being_served(
    clients: tuple[RawClient, RawClient], frames: list[bytes]
) -> None:
    odd, clean = clients
    odd.send_frames(*frames)
    for frame in frames:
        odd.send_frames(frame)
    clean.send(add(0, max_tokens=3))
    assert collect(clean, 0)[0][0] == reference(PROMPT, 1, 3, frozenset())
    while odd.socket.poll(0):
        odd.socket.recv()
