"""Configuration: flat keywords, nearest names, bounds, and the JSON that crosses to the core."""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, Unpack, get_type_hints

import msgspec
import pytest

from nanovllm import LLM, AsyncLLM, config, keywords
from nanovllm.config import SECTIONS, EngineConfig, ModelConfig, field_names
from nanovllm.flags import add_config_flags, config_values
from nanovllm.keywords import EngineKeywords, SupervisionKeywords


def test_keywords_find_their_section() -> None:
    config = EngineConfig.from_kwargs(model="m", block_size=32, max_num_seqs=7)
    assert (config.model.model, config.cache.block_size, config.scheduler.max_num_seqs) == (
        "m",
        32,
        7,
    )
    assert EngineConfig.from_kwargs() == EngineConfig()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"blok_size": 16}, "'blok_size': did you mean 'block_size'"),
        ({"max_seqs": 4}, "did you mean 'max_num_seqs'"),
        ({"zzzzzz": 1}, "known: .*block_size"),
        ({"block_size": "16"}, "block_size: Expected `int`, got `str`"),
        ({"block_size": 0}, "block_size: Expected `int` >= 1"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization: Expected `float` <= 1"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization"),
        ({"dtype": "int4"}, "dtype: Invalid enum value 'int4'"),
        ({"max_inflight_steps": 0}, "max_inflight_steps: Expected `int` >= 1"),
        ({"max_model_len": 1}, "max_model_len"),
    ],
)
def test_mistakes_name_the_field_and_the_remedy(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig.from_kwargs(**keywords)


def test_configuration_is_frozen_and_survives_json() -> None:
    config = EngineConfig.from_kwargs(model="m", max_model_len=100, gpu_memory_utilization=0.5)
    with pytest.raises(AttributeError):
        config.cache.block_size = 3  # type: ignore[misc]
    assert msgspec.json.decode(msgspec.json.encode(config), type=EngineConfig) == config
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(b'{"cache": {"blok_size": 1}}', type=EngineConfig)


def test_field_names_are_unique_across_sections() -> None:
    assert len(field_names()) == len(set(field_names()))


def test_every_field_is_described_and_has_a_flag() -> None:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    helped = {action.dest: action.help for action in parser._actions}
    for name in field_names():
        assert helped[name] and not helped[name].startswith(" (default"), name


def test_flags_become_keywords_only_when_given() -> None:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    arguments = parser.parse_args(
        ["--max-model-len", "128", "--no-enable-prefix-caching", "--dtype", "float32"]
    )
    assert config_values(arguments) == {
        "max_model_len": 128,
        "enable_prefix_caching": False,
        "dtype": "float32",
    }
    assert config_values(parser.parse_args([])) == {}
    with pytest.raises(SystemExit):
        parser.parse_args(["--dtype", "int3"])


def test_a_model_may_have_several_names() -> None:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    arguments = parser.parse_args(["--served-model-name", "a", "b", "a", "--block-size", "32"])
    config = EngineConfig.from_kwargs(model="m", **config_values(arguments))
    assert config.model.served_names == ["a", "b"] and config.cache.block_size == 32
    assert EngineConfig.from_kwargs(model="m").model.served_names == ["m"]
    assert EngineConfig.from_kwargs(served_model_name="x").model.served_names == ["x"]
    for names in ("", [], ["a", ""]):
        with pytest.raises(ValueError, match="served_model_name"):
            EngineConfig.from_kwargs(served_model_name=names)


def test_sections_cover_the_engine_config() -> None:
    assert tuple(SECTIONS) == EngineConfig.__struct_fields__


def test_the_length_is_the_models_or_less_or_insisted_on() -> None:
    assert ModelConfig().choose_max_model_len(64) == 64
    assert ModelConfig(max_model_len=10).choose_max_model_len(64) == 10
    with pytest.raises(ValueError, match=r"max_model_len: 65 .*at most 64, or allow_long_max"):
        ModelConfig(max_model_len=65).choose_max_model_len(64)
    insisted = ModelConfig(max_model_len=65, allow_long_max_model_len=True)
    assert insisted.choose_max_model_len(64) == 65


def test_typed_keywords_are_the_fields() -> None:
    """`LLM(...)` and `AsyncLLM.connect(...)`, as type checkers know them."""
    of_sections = {name: get_type_hints(section) for name, section in SECTIONS.items()}
    every = {name: kind for fields in of_sections.values() for name, kind in fields.items()}
    del every["model"]
    assert get_type_hints(EngineKeywords) == every
    assert get_type_hints(SupervisionKeywords) == of_sections["supervision"]


def keywords_of(function: Callable[..., Any]) -> Any:
    """What its `**keywords` may be, as type checkers read it."""
    (kind,) = (
        one for one in signature(function).parameters.values() if one.kind is one.VAR_KEYWORD
    )
    return kind.annotation


def test_a_type_checker_finds_wrong_keywords(tmp_path: Path) -> None:
    assert keywords_of(LLM.__init__) == keywords_of(AsyncLLM.__init__) == Unpack[EngineKeywords]
    assert keywords_of(AsyncLLM.connect) == Unpack[SupervisionKeywords]
    program = tmp_path / "program.py"
    program.write_text(  # with less than the engine, which a type checker reads for a minute
        "from typing import Unpack\n"
        "from nanovllm.keywords import EngineKeywords, SupervisionKeywords\n"
        "def start(model: str = '', **fields: Unpack[EngineKeywords]) -> None: ...\n"
        "def connect(address: str, **fields: Unpack[SupervisionKeywords]) -> None: ...\n"
        "start('m', block_size=32, kv_cache_dtype='fp8', max_model_len=None)\n"
        "start('m', blok_size=32)\n"
        "start(block_size='32')\n"
        "start(device='gpu')\n"
        "connect('ipc:///x', on_core_death='fail')\n"
        "connect('ipc:///x', block_size=32)\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=skip"]
    command += ["--cache-dir", str(tmp_path / "cache"), "--config-file", os.devnull]
    command += [str(program), str(config.__file__), str(keywords.__file__)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    found = dict(re.findall(r"program\.py:(\d+): error: .*\[([\w-]+)\]", done.stdout))
    wanted = {"6": "call-arg", "7": "arg-type", "8": "arg-type", "10": "call-arg"}
    assert found == wanted, done.stdout
