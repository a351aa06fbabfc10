"""The script that takes the pictures of README and docs, with a model that computes nothing."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

from tests.frontend.server.browser import need_chromium
from tests.frontend.vocabulary import CHAT_TEMPLATE, SPECIAL_TOKENS, save
from tests.waiting import WAIT_S

ROOT = Path(__file__).parents[3]
SIZE = (1360, 900)


def test_the_pictures_are_taken_anew(tmp_path: Path) -> None:
    _, chromium = need_chromium()
    (tokenizer := tmp_path / "bytes").mkdir()
    save(tokenizer)
    settings = {"chat_template": CHAT_TEMPLATE, **SPECIAL_TOKENS}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    (pictures := tmp_path / "pictures").mkdir()
    command = [sys.executable, str(ROOT / "docs" / "screenshots.py"), "--chromium", chromium]
    command += ["--into", str(pictures), "--width", str(SIZE[0]), "--height", str(SIZE[1])]
    command += ["--load-format", "synthetic", "--tokenizer", str(tokenizer), "--step-ms", "1"]
    # Its tokens are bytes, of which texts have more.
    command += ["--num-gpu-blocks-override", "130", "--max-model-len", "1536"]
    command += ["--vocab-size", "258"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=6 * WAIT_S
    )
    assert done.returncode == 0, done.stderr
    taken = {path.name: path.read_bytes() for path in pictures.iterdir()}
    shown = {path.name for path in (ROOT / "docs").glob("*.png")}
    assert taken.keys() <= shown and len(taken) == 4, "those that the documents show"
    for content in taken.values():
        assert content.startswith(b"\x89PNG") and struct.unpack(">II", content[16:24]) == SIZE
    assert len(set(taken.values())) == 4
