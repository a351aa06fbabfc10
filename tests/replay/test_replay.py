"""A recording reproduces every plan, from the start or from the middle of a busy life."""

import threading
from pathlib import Path

import pytest

from nanovllm import cli
from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.grammar import Grammar, GrammarCompiler
from nanovllm.core.scheduler import Scheduler
from nanovllm.core.sequence import ScheduledStep
from nanovllm.protocol.messages import AddRequest
from nanovllm.protocol.plan import WorkerInfo
from nanovllm.replay.recorder import Masked, Recorder
from nanovllm.replay.replay import DivergedError, Replay, _events
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams
from tests.core import test_property
from tests.core.fake_executor import FakeExecutor
from tests.core.serving import RawClient, add, collect, serving
from tests.core.vocabulary import make_compiler
from tests.waiting import WAIT_S


def simulate(
    seed: int, path: Path, monkeypatch: pytest.MonkeyPatch, *, max_bytes: int = 2**20
) -> int:
    """A random life as in the property test, recorded; returns how often the file began anew."""
    simulation = test_property.Simulation(seed, share_failing=0.04)
    recorder = Recorder(
        simulation.core, simulation.config, simulation.info, path=path, max_bytes=max_bytes
    )
    turns, begin_anew = 0, recorder.begin_anew

    def count() -> None:
        nonlocal turns
        turns += 1
        begin_anew()

    monkeypatch.setattr(recorder, "begin_anew", count)
    simulation.core.listen(recorder)
    simulation.run()
    recorder.close()
    return turns


@pytest.mark.parametrize("first", range(4))
def test_whole_lives_are_reproduced(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_masked = 0
    for seed in range(first, 60, 4):
        simulate(seed, tmp_path / "record", monkeypatch)
        plans = list(Replay(tmp_path / "record"))
        assert len(plans) > 5 and [plan.step for plan in plans] == list(range(len(plans)))
        num_masked += sum(isinstance(event, Masked) for event in _events(tmp_path / "record"))
    assert num_masked > 50, "constrained outputs are recorded as well"


def test_so_are_lives_recorded_from_their_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = 0
    for seed in range(80):
        turns += simulate(seed, tmp_path / "record", monkeypatch, max_bytes=6000)
        for path in tmp_path.iterdir():
            replay = Replay(path)
            list(replay)
        assert (tmp_path / "record").stat().st_size < 200_000
        if path.name == "record":
            status = replay.core.status(epoch="", num_clients=0)
            assert status.num_free_blocks == status.num_blocks
    assert turns > 100


def test_another_scheduler_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(3, tmp_path / "record", monkeypatch)
    schedule_running = Scheduler._schedule_running

    def timid(self: Scheduler, step: ScheduledStep) -> None:
        schedule_running(self, step)
        step.num_tokens = max(step.num_tokens, step.budget - 1)  # one is left for those that wait

    monkeypatch.setattr(Scheduler, "_schedule_running", timid)
    with pytest.raises(DivergedError, match="differs"):
        list(Replay(tmp_path / "record"))


def test_a_cut_off_file_is_replayed_as_far_as_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(5, tmp_path / "record", monkeypatch)
    whole = (tmp_path / "record").read_bytes()
    num_plans = len(list(Replay(tmp_path / "record")))
    for cut in range(len(whole) // 2, len(whole), 97):
        (tmp_path / "cut").write_bytes(whole[:cut])
        assert len(list(Replay(tmp_path / "cut"))) <= num_plans


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"nonsense", b"\x05\x00\x00\x00abcde"):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match=r"record|replayed"):
            Replay(tmp_path / "x")


def test_a_served_core_can_be_replayed_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"ipc://{tmp_path}/core.sock"
    recorders: list[Recorder] = []

    def make_recorder(core: EngineCore, info: WorkerInfo) -> Recorder:
        recorders.append(Recorder(core, EngineConfig(), info, path=tmp_path / "record"))
        return recorders[0]

    with serving(address, listeners=[make_recorder]):
        client = RawClient(address)
        client.greet()
        client.send(add(0, max_tokens=10))
        collect(client, 0)
        client.close()
    recorders[0].close()
    assert cli.main(["replay", str(tmp_path / "record"), "--show", "3"]) == 0
    out = capsys.readouterr().out
    assert "StepPlan(step=3" in out and "10 steps planned as they were then" in out


def test_a_recording_begun_anew_knows_who_waits_for_a_grammar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig.from_kwargs(grammar_timeout_s=WAIT_S)
    executor = FakeExecutor(config, num_blocks=50, max_model_len=64)
    core = EngineCore(config, executor, executor.start(), make_compiler())
    recorder = Recorder(core, config, executor.start(), path=tmp_path / "record")
    core.listen(recorder)
    params = SamplingParams(
        max_tokens=9, structured_outputs=StructuredOutputsParams(choice=["yes", "no"])
    )
    gate = threading.Event()
    compile_ = GrammarCompiler.compile

    def late(self: GrammarCompiler, wanted: StructuredOutputsParams) -> Grammar:
        assert gate.wait(WAIT_S)
        return compile_(self, wanted)

    monkeypatch.setattr(GrammarCompiler, "compile", late)
    core.add(0, AddRequest(0, [5], params))
    core.add(0, AddRequest(1, [5, 6], params))
    recorder.begin_anew()
    assert core.abort(0, [1])
    gate.set()
    while core.num_unfinished:
        core.step()
    core.add(0, AddRequest(2, [5], params))  # known by now
    while core.num_unfinished:
        core.step()
    recorder.close()
    replay = Replay(tmp_path / "record")
    plans = list(replay)
    assert len(plans) >= 2
    masked = [event for event in _events(tmp_path / "record") if isinstance(event, Masked)]
    assert len(masked) == len(plans)
    assert replay.core.num_unfinished == 0


def test_recording_costs_the_outputs_nothing(tmp_path: Path) -> None:
    config = EngineConfig()
    for is_recorded in (False, True):
        executor = FakeExecutor(config, num_blocks=50, max_model_len=64)
        core = EngineCore(config, executor, executor.start())
        if is_recorded:
            recorder = Recorder(core, config, executor.start(), path=tmp_path / "r")
            core.listen(recorder)
        core.add(0, AddRequest(0, [5], SamplingParams(max_tokens=8, ignore_eos=True)))
        tokens = []
        while core.busy:
            outputs = core.step()
            tokens += outputs.token_ids if outputs is not None else []
        assert len(tokens) == 8
    recorder.close()
