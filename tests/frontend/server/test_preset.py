"""What `nanovllm serve` is told by a preset, by --open, and what it says of itself."""

import webbrowser
from pathlib import Path

import httpx
import pytest

from nanovllm.config import EngineConfig
from nanovllm.frontend.server.command import open_page, with_preset
from nanovllm.frontend.server.settings import ServerSettings
from tests.frontend.server.served import served


def test_a_preset_is_of_config_fields_and_flags_count_more() -> None:
    settings = ServerSettings(preset="classroom")
    config = EngineConfig.from_kwargs(**with_preset(settings, {"max_num_seqs": 9}))
    assert config.scheduler.max_num_seqs == 9 and config.scheduler.allow_debug
    assert config.cache.num_gpu_blocks_override == 64
    assert config.scheduler.max_num_batched_tokens == 64
    assert with_preset(ServerSettings(), {"seed": 3}) == {"grammar_preload": True, "seed": 3}
    assert not with_preset(ServerSettings(), {"grammar_preload": False})["grammar_preload"]


def test_a_core_that_runs_already_has_no_preset() -> None:
    settings = ServerSettings(preset="classroom", connect="ipc:///nowhere")
    with pytest.raises(ValueError, match="--preset"):
        with_preset(settings, {})
    with pytest.raises(ValueError, match="--block-size"):
        with_preset(ServerSettings(connect="ipc:///nowhere"), {"block_size": 16})


def test_the_page_is_opened_or_its_address_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or len(opened) == 1)
    open_page("http://localhost:8000/")
    assert capsys.readouterr().err == ""
    open_page("http://localhost:8000/")
    assert "open http://localhost:8000/ yourself" in capsys.readouterr().err
    assert opened == ["http://localhost:8000/"] * 2


async def test_the_base_url_says_what_it_is(address: str) -> None:
    async with served(address, api_key=["secret"]) as server:
        about = (await server.client.get("/v1")).json()
        assert "OpenAI" in about["about"]
        for link in ("page", "docs", "openapi"):
            path = httpx.URL("http://localhost/v1").join(about[link]).path
            assert (await server.client.get(path)).status_code == 200, path


def test_pictures_are_small() -> None:
    """What README and the docs show is loaded by everybody who opens them."""
    pictures = list((Path(__file__).parents[3] / "docs").glob("*.png"))
    assert len(pictures) == 4 and sum(one.stat().st_size for one in pictures) < 400_000
