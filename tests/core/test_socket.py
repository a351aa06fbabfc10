"""Who can reach a core: directories, loopback, keys, and sizes of frames."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import zmq

from nanovllm import cli
from nanovllm.config import EngineConfig
from nanovllm.core.server import CoreServer
from nanovllm.core.socket import Endpoint, _check_address
from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.errors import EngineDeadError, NotAllowedError
from nanovllm.frontend.link import make_dealer
from nanovllm.keys import ClientKeys, CoreKeys, make_keys
from nanovllm.protocol.messages import (
    Call,
    CallResult,
    Hello,
    Operation,
    Outputs,
    ResetPrefixCache,
    SetPace,
    Welcome,
)
from nanovllm.protocol.watch import BlockContents, Observation, Observe, ShowBlock
from nanovllm.sampling_params import SamplingParams
from tests.core.fake_executor import FakeExecutor
from tests.core.serving import RawClient, add, collect, serving
from tests.e2e.processes import wait_until
from tests.waiting import WAIT_S


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeroMQ lets go of what the test before has closed when its thread has its turn."""
    monkeypatch.setattr("nanovllm.core.socket.AUTHENTICATOR_TIMEOUT_S", WAIT_S)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys", ["alice"])
    return tmp_path / "keys"


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ValueError, match="chmod 700"):
        CoreServer(EngineConfig(), f"ipc://{tmp_path}/core.sock")


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "example.org", "[::]", "127.0.0.1", "localhost"])
def test_other_machines_and_users_are_refused_without_keys(host: str) -> None:
    with pytest.raises(ValueError, match="keys new"):
        CoreServer(EngineConfig(), f"tcp://{host}:5555")


def test_too_large_a_frame_disconnects_its_sender_only(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/core.sock"
    with serving(address, max_frame_bytes=2**16):
        large, other = RawClient(address), RawClient(address)
        large.greet()
        other.greet()
        large.send_frames(b"x" * 2**20)
        other.send(add())
        assert collect(other, 0)[1][0].reason == "length"
        large.close()
        other.close()


def test_all_queues_are_finite(tmp_path: Path) -> None:
    """In messages, on both sides, and in bytes per message."""
    endpoint = Endpoint(f"ipc://{tmp_path}/core.sock", max_frame_bytes=2**20)
    assert 0 < endpoint.socket.get(zmq.SNDHWM) <= 1000
    assert 0 < endpoint.socket.get(zmq.RCVHWM) <= 1000
    assert endpoint.socket.get(zmq.MAXMSGSIZE) == 2**20
    endpoint.close()
    dealer = make_dealer("ipc://nowhere", None)
    assert 0 < dealer.get(zmq.SNDHWM) <= 1000 and 0 < dealer.get(zmq.RCVHWM) <= 1000
    dealer.close(0)


# ---- keys


def test_keys_are_for_their_owner_only(keys: Path) -> None:
    assert (keys / "core.json").stat().st_mode & 0o777 == 0o600
    assert (keys / "alice.json").stat().st_mode & 0o777 == 0o600
    assert keys.stat().st_mode & 0o777 == 0o700
    os.chmod(keys / "core.json", 0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        CoreKeys(keys)


def test_more_clients_can_be_added_but_none_twice(keys: Path) -> None:
    before = CoreKeys(keys)
    (bob,) = make_keys(keys, ["bob"])
    after = CoreKeys(keys)
    assert after.public == before.public == ClientKeys.load(bob).core
    assert len(after.client_keys()) == 2
    with pytest.raises(ValueError, match="bob"):
        make_keys(keys, ["bob"])
    for name in ("../evil", "core", ""):
        with pytest.raises(ValueError, match="name of letters"):
            make_keys(keys, [name])


def test_files_that_are_no_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keys new"):
        CoreKeys(tmp_path)
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "x.json").chmod(0o600)
    with pytest.raises(ValueError, match="keys new"):
        ClientKeys.load(tmp_path / "x.json")


def test_the_command_line_makes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys", "new", str(tmp_path / "k"), "--client", "a", "b"]) == 0
    assert capsys.readouterr().out.split() == [f"{tmp_path}/k/a.json", f"{tmp_path}/k/b.json"]
    assert cli.main(["keys", "new", str(tmp_path / "k"), "--client", "a"]) == 2
    assert cli.main(["keys", "new", str(tmp_path / "k"), "--client", "c", "--operator", "d"]) == 2
    assert cli.main(["keys", "new", str(tmp_path / "k"), "--client", "c", "--operator", "c"]) == 0
    key = ClientKeys.load(tmp_path / "k" / "c.json").public.encode()
    known = CoreKeys(tmp_path / "k")
    assert known.is_operator(key) and len(known.client_keys()) == 3
    other = ClientKeys.load(tmp_path / "k" / "a.json").public.encode()
    assert not known.is_operator(other)


@pytest.fixture
def guarded(keys: Path) -> Iterator[str]:
    """The address of a core that wants keys."""
    with serving("tcp://127.0.0.1:*", keys=CoreKeys(keys)) as server:
        yield server._endpoint.socket.get(zmq.LAST_ENDPOINT).decode()


def keyed(address: str, keys: ClientKeys) -> RawClient:
    client = RawClient("")
    client.socket.set(zmq.CURVE_PUBLICKEY, keys.public.encode())
    client.socket.set(zmq.CURVE_SECRETKEY, keys.secret.encode())
    client.socket.set(zmq.CURVE_SERVERKEY, keys.core.encode())
    client.socket.connect(address)
    return client


def test_a_core_waits_for_the_keys_of_the_one_before(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its authenticator's address is free only a moment after that core has closed."""
    held: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REP)
    held.bind("inproc://zeromq.zap.01")
    release = threading.Timer(0.3, held.close)
    release.start()
    endpoint = Endpoint("tcp://127.0.0.1:*", max_frame_bytes=1000, keys=CoreKeys(keys))
    release.join()
    monkeypatch.setattr("nanovllm.core.socket.AUTHENTICATOR_TIMEOUT_S", 0.05)
    with pytest.raises(ValueError, match="keys: another core"):
        Endpoint("tcp://127.0.0.1:*", max_frame_bytes=1000, keys=CoreKeys(keys))
    endpoint.close()


def test_a_known_client_is_served(guarded: str, keys: Path) -> None:
    client = keyed(guarded, ClientKeys.load(keys / "alice.json"))
    client.greet()
    client.send(add())
    assert collect(client, 0)[1][0].reason == "length"
    client.close()


def test_an_unknown_client_gets_nothing(guarded: str, keys: Path) -> None:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    unknown = keyed(guarded, ClientKeys(public, secret, CoreKeys(keys).public))
    plain = RawClient(guarded)
    for client in (unknown, plain):
        with suppress(zmq.Again):  # there is no connection any more, if it was refused already
            client.socket.send(msgspec.msgpack.encode(Hello()), zmq.NOBLOCK)
        with pytest.raises(TimeoutError):
            client.receive(Welcome, timeout_s=0.5)
        client.close()


def test_a_client_can_be_let_in_while_the_core_runs(guarded: str, keys: Path) -> None:
    (carol,) = make_keys(keys, ["carol"])
    client = keyed(guarded, ClientKeys.load(carol))
    client.greet()
    client.close()


# ---- what a key allows


def ask(client: RawClient, operation: Operation) -> CallResult:
    client.send(Call(7, operation))
    return client.receive(CallResult)


@pytest.fixture
def shown(keys: Path) -> Iterator[str]:
    """The address of a core that wants keys and can be looked at; its sequences run for long."""
    make_keys(keys, ["olga"], ["olga"])
    executor = FakeExecutor(EngineConfig.from_kwargs(), num_blocks=7000, max_model_len=100_000)
    with serving("tcp://127.0.0.1:*", executor, keys=CoreKeys(keys)) as server:
        yield server._endpoint.socket.get(zmq.LAST_ENDPOINT).decode()


def test_who_is_no_operator_sees_his_own_blocks_and_changes_nothing(shown: str, keys: Path) -> None:
    make_keys(keys, ["bob"])
    names = ("olga", "alice", "bob")
    olga, alice, bob = (keyed(shown, ClientKeys.load(keys / f"{name}.json")) for name in names)
    for client in (olga, alice, bob):
        client.greet()
    alice.send(msgspec.structs.replace(add(max_tokens=50_000), prompt_token_ids=[8] * 20))
    alice.receive(Outputs)
    seen = ask(olga, Observe(fresh=True)).result
    assert isinstance(seen, Observation)
    first = seen.sequences[0].block_ids[0]
    for client in (olga, alice):
        block = ask(client, ShowBlock(first)).result
        assert isinstance(block, BlockContents)
        assert (block.token_ids, block.ref_count) == ([8] * 16, 1)
        assert bool(block.key) == (client is olga), "hashes tell of others' prompts"
    block = ask(bob, ShowBlock(first)).result
    assert block == BlockContents(first, 0, "", "", None, [], [])
    for client in (alice, bob):
        for operation in (Observe(), ResetPrefixCache(), SetPace(num_steps=0)):
            refused = ask(client, operation)
            assert refused.is_refused and "operator" in str(refused.error)
            assert refused.result is None
    assert ask(olga, ResetPrefixCache()).result is False, "some blocks are in use"
    (keys / "clients" / "bob.pub").write_text(
        ClientKeys.load(keys / "bob.json").public + "\noperator"
    )
    assert ask(bob, ResetPrefixCache()).error is None, "rights are looked up when they are used"
    for client in (olga, alice, bob):
        client.close()


def test_where_only_one_user_can_connect_he_is_the_operator(tmp_path: Path) -> None:
    with serving(f"ipc://{tmp_path}/core.sock"):
        client = RawClient(f"ipc://{tmp_path}/core.sock")
        client.greet()
        assert isinstance(ask(client, Observe()).result, Observation)
        assert ask(client, ResetPrefixCache()).result is True
        client.close()


async def test_frontends_say_what_their_key_does_not_allow(guarded: str, keys: Path) -> None:
    async with await AsyncLLM.connect(
        guarded,
        skip_tokenizer_init=True,
        keys=keys / "alice.json",
        connect_timeout_s=WAIT_S,
    ) as llm:
        for ask_for in (llm.observe, llm.reset_prefix_cache):
            with pytest.raises(NotAllowedError, match="operator"):
                await ask_for()


async def test_frontends_take_the_file(guarded: str, keys: Path) -> None:
    with pytest.raises(EngineDeadError):
        await AsyncLLM.connect(guarded, skip_tokenizer_init=True, connect_timeout_s=0.5)
    async with await AsyncLLM.connect(
        guarded,
        skip_tokenizer_init=True,
        keys=keys / "alice.json",
        connect_timeout_s=WAIT_S,
    ) as llm:
        params = SamplingParams(max_tokens=3, detokenize=False, ignore_eos=True)
        outputs = [one async for one in llm.generate({"prompt_token_ids": [5]}, params)]
        assert len(outputs[-1].outputs[0].token_ids) == 3


def test_a_path_is_taken_only_where_it_is_free_and_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "core.sock"
    address = f"ipc://{path}"

    def check(address: str) -> None:
        _check_address(address, has_keys=False)

    with pytest.raises(ValueError, match="does not exist"):
        check(f"ipc://{tmp_path}/none/core.sock")
    for mode, refused in ((0o700, False), (0o710, True), (0o701, True), (0o500, False)):
        tmp_path.chmod(mode)
        if refused:
            with pytest.raises(ValueError, match="others can enter"):
                check(address)
        else:
            check(address)
    tmp_path.chmod(0o700)
    path.write_text("")
    with pytest.raises(ValueError, match="is not a socket"):
        check(address)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ValueError, match="in use by another process"):
            check(address)
    check(address)  # whoever was there has gone
    for other_scheme in ("http://x", "/tmp/x"):
        with pytest.raises(ValueError, match="must begin with ipc:// or tcp://"):
            check(other_scheme)


def test_what_is_sent_to_nobody_or_to_one_who_does_not_read(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/core.sock"
    endpoint = Endpoint(address, max_frame_bytes=2**20)
    assert endpoint.receive() is None and endpoint.is_operator(None)
    assert endpoint.send(b"nobody", b"x") == "gone"
    client = RawClient(address, receive_high_water_mark=1)
    client.send_frames(b"hi", b"there")
    wait_until(lambda: endpoint.socket.poll(0), timeout_s=WAIT_S, what="a message")
    received = endpoint.receive()
    assert received is not None and received.frames == [b"hi", b"there"] and received.key is None
    assert endpoint.send(received.identity, b"x") == "sent"
    deadline = time.monotonic() + WAIT_S
    while endpoint.send(received.identity, b"x" * 10_000) == "sent":
        assert time.monotonic() < deadline
    assert endpoint.send(received.identity, b"x") == "full"
    client.close()
    endpoint.close()
