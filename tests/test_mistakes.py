"""What users get wrong on the command line: one line names what and the remedy; exit code 2."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm import cli, launch

# command line → what its one line of error says
MISTAKES = {
    # words and flags that nobody knows
    "": "required: COMMAND",
    "genrate hi": "invalid choice: 'genrate'",
    "bench": "required: WHAT",
    "bench thruput": "invalid choice: 'thruput'",
    "generate": "required: PROMPT",
    "generate hi --temprature 0.5": "no flag --temprature: did you mean --temperature?",
    "generate hi --temprature=0.5": "no flag --temprature: did you mean --temperature?",
    "generate hi --max-new-tokens 5": "no flag --max-new-tokens: did you mean --max-",
    "generate hi --max_tokens 5": "no flag --max_tokens: did you mean --max-tokens?",
    "generate hi --stream": "no flag --stream",
    "chat a b": "'b' is one word too many",
    "serve a b": "'b' is one word too many",
    "serve --ports 80": "no flag --ports: did you mean --port?",
    "serve a --model b": "model: it is named twice: give MODEL or --model",
    "serve --max-model-length 80": "no flag --max-model-length: did you mean --max-model-len?",
    "serve --gpu-memory-utilisation 0.9": "did you mean --gpu-memory-utilization?",
    "plan m --gpus H200": "no flag --gpus: did you mean --gpu?",
    "fetch": "required: alias",
    "fetch llama": "invalid choice: 'llama'",
    "route": "required: ADDRESS",
    "route tcp://a:1 --connect tcp://b:1": "is told the addresses as words: omit --connect",
    "route tcp://a:1 --dtype float32": "has settings of its own: omit it",
    "keys old d": "invalid choice: 'old'",
    "replay": "required: file",
    "top --url": "--url: expected one argument",
    # values that are none
    "generate hi --temperature hot": "--temperature: invalid float value: 'hot'",
    "generate hi --top-k 1.5": "--top-k: invalid int value: '1.5'",
    "generate hi --max-tokens": "--max-tokens: expected one argument",
    "generate hi --dtype fp16": "--dtype: invalid choice: 'fp16'",
    "generate hi --device gpu": "--device: invalid choice: 'gpu'",
    "generate hi --quantization awq4": "--quantization: invalid choice: 'awq4'",
    "generate hi --attention-backend fast": "--attention-backend: invalid choice: 'fast'",
    "generate hi --load-format magic": "--load-format: invalid choice: 'magic'",
    "generate hi --threads two": "--threads: invalid int value: 'two'",
    "generate hi --kv-cache-memory-bytes 4Q": "'4Q' is no size: say 4G, 512M or a number of bytes",
    "serve --port http": "--port: invalid int value: 'http'",
    "serve --page some": "--page: invalid choice: 'some'",
    "serve --tool-call-parser magic": "--tool-call-parser: invalid choice: 'magic'",
    "plan m --gpu-memory much": "--gpu-memory: invalid float value: 'much'",
    "bench throughput --num-prompts 0": "--num-prompts: must be at least 1, not 0",
    "bench throughput --input-len -4": "--input-len: must be at least 1, not -4",
    "bench latency --num-iters none": "--num-iters: invalid number value: 'none'",
    "bench latency --batch-size 0": "--batch-size: must be at least 1, not 0",
    "replay x --show first": "--show: invalid int value: 'first'",
    # values out of range, and those that contradict each other: nothing is loaded
    "generate hi --temperature -1": "temperature must be",
    "generate hi --top-p 0": "top_p must be in (0, 1], not 0.0",
    "generate hi --top-p 2": "top_p must be in (0, 1], not 2.0",
    "generate hi --top-k -7": "top_k must be",
    "generate hi --min-p 3": "min_p must be",
    "generate hi --repetition-penalty 0": "repetition_penalty must be",
    "generate hi --max-tokens 0": "max_tokens must be",
    "generate hi --max-model-len 1": "max_model_len: Expected `int` >= 2",
    "generate hi --block-size 0": "block_size: Expected `int` >= 1",
    "generate hi --gpu-memory-utilization 90": "gpu_memory_utilization: Expected `float` <= 1",
    "generate hi --max-num-seqs 0": "max_num_seqs: Expected `int` >= 1",
    "generate hi --threads 0": "threads: Expected `int` >= 1",
    "generate hi --max-inflight-steps 99": "max_inflight_steps: Expected `int` <= 8",
    "generate hi --model no/such/dir/": "no/such/dir",
    "generate hi --address ipc://x --block-size 8": "--block-size: the core at --address has",
    "bench clients --rate 0": "rate: Expected `float` > 0",
    "serve --connect ipc://x --block-size 8": "--block-size: the core at --connect has settings",
    "plan no/such/dir/": "no/such/dir",
    "plan smollm2 --gpu H9000": "H9000",
    "serve --block-size 0": "block_size: Expected `int` >= 1",
    "serve --api-key ''": "--api-key: an empty key would let everybody in",
    "serve --frontends 0": "--frontends: Expected `int` >= 1",
    "serve --host 192.0.2.1": "port: cannot listen on 192.0.2.1:8000",
    # what is found out when the port is bound
    "serve --port 0 --connect ftp://x": "address 'ftp://x' cannot be connected to",
    "serve --port 0 --model nowhere/at-all": "nowhere/at-all",
    # files
    "generate hi --config nowhere.yaml": "--config nowhere.yaml: cannot be read",
    "generate hi --config list.yaml": "--config list.yaml: it must hold lines of `flag: value`",
    "generate hi --config broken.yaml": "--config broken.yaml: cannot be read",
    "generate hi --config typo.yaml": "'max_modle_len': did you mean 'max_model_len'?",
    "generate hi --config wrong.yaml": "--max-model-len: invalid int value: 'long'",
}
FILES = {
    "list.yaml": "- 1\n- 2\n",
    "broken.yaml": "a: [1\n",
    "typo.yaml": "max-modle-len: 512\n",
    "wrong.yaml": "max-model-len: long\n",
}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)


def refusal(run: object, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line it says, refusing."""
    try:
        code = run(words)  # type: ignore[operator]
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert "Traceback" not in err and "usage:" not in err
    line: str = err.splitlines()[-1]
    assert line.startswith("nanovllm")
    return line


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """A command that is run in this process leaves those of its event loop, which has ended."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert MISTAKES[command] in refusal(cli.main, shlex.split(command), capsys)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("", "required: --address"),
        ("--address ipc://x --max-seqs 3", "no flag --max-seqs: did you mean --max-num-seqs?"),
        ("--address ipc://x --max-num-seqs 0", "max_num_seqs: Expected `int` >= 1"),
        ("m n --address ipc://x", "'n' is one word too many"),
    ],
)
def test_a_mistake_with_a_core(command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refusal(launch.core_main, shlex.split(command), capsys)


def test_whoever_stops_reading_gets_no_traceback() -> None:
    program = "from nanovllm import cli; cli.run_fetch = lambda _: print('x' * 10**6) or 0; "
    program += "import sys; sys.exit(cli.main(['fetch', 'smollm2']))"
    command = f"{sys.executable} -c {shlex.quote(program)} | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk_is_one_line() -> None:
    program = "from nanovllm import cli; cli.run_fetch = lambda _: print('x') or 0; "
    program += "import sys; sys.exit(cli.main(['fetch', 'smollm2']))"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr.splitlines()[0] == "nanovllm: No space left on device"
    assert "Traceback" not in done.stderr


def test_a_place_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys", "new", "wrong.yaml/keys"]) == 1
    assert capsys.readouterr().err == "nanovllm: wrong.yaml/keys/clients: Not a directory\n"
