"""Finding a model by name, and what every form of checkpoint says about itself."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from nanovllm.checkpoint.gguf import GGUFFile
from nanovllm.checkpoint.locate import Checkpoint, locate, locate_tokenizer
from nanovllm.checkpoint.weight_files import weight_files
from nanovllm.config import EngineConfig
from tests.checkpoint.gguf_writing import QuantizationType, values, write_gguf


def write_json(path: Path, **content: object) -> None:
    path.write_text(json.dumps(content))


def test_a_directory_with_config_json(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", architectures=["LlamaForCausalLM"], eos_token_id=7)
    checkpoint = locate(str(tmp_path))
    assert checkpoint == Checkpoint(tmp_path, "safetensors")
    assert checkpoint.config()["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.eos_token_ids() == [7]


@pytest.mark.parametrize(("eos", "expected"), [(5, [5]), ([5, 9], [5, 9]), (0, [0])])
def test_generation_config_knows_best_what_ends_an_output(
    tmp_path: Path, eos: object, expected: list[int]
) -> None:
    write_json(tmp_path / "config.json", eos_token_id=7)
    write_json(tmp_path / "generation_config.json", eos_token_id=eos)
    assert locate(str(tmp_path)).eos_token_ids() == expected


def test_without_any_eos_nothing_ends_an_output(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", eos_token_id=None)
    write_json(tmp_path / "generation_config.json", temperature=0.6)
    assert locate(str(tmp_path)).eos_token_ids() == []


def test_a_gguf_file_by_name_or_by_its_directory(tmp_path: Path) -> None:
    facts = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}
    path = write_gguf(tmp_path / "tiny.gguf", facts=facts)
    for name in (path, tmp_path):
        checkpoint = locate(str(name))
        assert checkpoint == Checkpoint(path, "gguf")
        assert checkpoint.config()["model_type"] == "llama"
        assert checkpoint.eos_token_ids() == [2, 5]


def test_a_directory_with_a_config_and_one_gguf_is_that_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    write_json(tmp_path / "config.json", model_type="llama")
    (tmp_path / "mmproj-tiny.gguf").touch()  # what looks at images
    assert locate(str(tmp_path)) == Checkpoint(path, "gguf")


def test_safetensors_go_before_a_gguf_beside_them(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    write_json(tmp_path / "config.json", model_type="llama")
    (tmp_path / "model.safetensors").touch()
    assert locate(str(tmp_path)).format == "safetensors"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_json(tmp_path / "config.json")
    assert locate("~").path == tmp_path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("smolm2", "did you mean 'smollm2'"),
        ("./nothing", "no such file or directory: ./nothing"),
        ("/no/such/model", "no such file or directory: /no/such/model"),
        ("missing.gguf", "no such file or directory: missing.gguf"),
        ("a/b/c", "no such file or directory: a/b/c"),
    ],
)
def test_unknown_names_are_answered(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        locate(name)
    assert "model" in str(caught.value)


def test_directories_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither config\.json nor a \.gguf file"):
        locate(str(tmp_path))
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name)
    with pytest.raises(ValueError, match=r"2 \.gguf files: name one"):
        locate(str(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"not a \.gguf file"):
        locate(str(tmp_path / "notes.txt"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        locate(str(tmp_path)).config()


# ---- what ends an output


def with_tokenizer(directory: Path, **config: object) -> Path:
    directory.mkdir(exist_ok=True)
    write_json(directory / "tokenizer_config.json", **config)
    return directory


def test_the_tokenizers_eos_ends_an_output_as_well(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", eos_token_id=7)
    decoder = {"9": {"content": "<|im_end|>"}, "5": {"content": "<|endoftext|>"}}
    with_tokenizer(tmp_path, eos_token="<|im_end|>", added_tokens_decoder=decoder)
    assert locate(str(tmp_path)).eos_token_ids() == [7, 9]
    write_json(tmp_path / "generation_config.json", eos_token_id=[3, 4])
    assert locate(str(tmp_path)).eos_token_ids() == [3, 4, 9]
    other = with_tokenizer(
        tmp_path / "o", eos_token="a", added_tokens_decoder={"1": {"content": "a"}}
    )
    assert locate(str(tmp_path)).eos_token_ids(other) == [1, 3, 4]


@pytest.mark.parametrize(
    "content",
    [
        {"added_tokens": [{"id": 11, "content": "</s>", "special": True}]},
        {"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "</s>": 11}}},
        {
            "model": {
                "type": "Unigram",
                "vocab": [[str(i), 0.0] for i in range(11)] + [["</s>", -1]],
            }
        },
    ],
)
def test_the_id_of_eos_is_looked_up_in_tokenizer_json(
    tmp_path: Path, content: dict[str, object]
) -> None:
    write_json(tmp_path / "config.json")
    write_json(tmp_path / "special_tokens_map.json", eos_token={"content": "</s>"})
    write_json(tmp_path / "tokenizer.json", **content)
    assert locate(str(tmp_path)).eos_token_ids() == [11]


def test_files_that_are_no_json_are_named(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds no JSON object"):
        locate(str(tmp_path)).eos_token_ids()
    write_json(tmp_path / "tokenizer_config.json", eos_token="</s>")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        locate(str(tmp_path)).eos_token_ids()
    write_json(tmp_path / "generation_config.json", eos_token_id="</s>")
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be an int"):
        locate(str(tmp_path)).eos_token_ids()


def gguf_with(path: Path, tokens: dict[str, int], **facts: object) -> Checkpoint:
    """tokens: text → kind."""
    given = {"model": "gpt2", "tokens": list(tokens), "token_type": list(tokens.values()), **facts}
    keys = {f"tokenizer.ggml.{key}": value for key, value in given.items()}
    return Checkpoint(write_gguf(path, facts=keys), "gguf")


CONTROL, USER_DEFINED, NORMAL = 3, 4, 1


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        ({"a": NORMAL, "<|eot_id|>": CONTROL, "<|im_end|>": CONTROL, "<x>": CONTROL}, [1, 2]),
        ({"<|end|>": USER_DEFINED, "<end_of_turn>": CONTROL}, [0, 1]),
        ({"<|im_end|>": NORMAL, "<|im": NORMAL}, [0]),  # mistaken for text by a converter
        ({"</s>": NORMAL, "</": NORMAL, "s>": NORMAL}, []),  # a piece of HTML
        ({"<|end|>": CONTROL, "<|return|>": CONTROL, "<|call|>": CONTROL}, [1, 2]),
        ({"</s>": CONTROL, "<|tool_response>": CONTROL}, [1]),
    ],
)
def test_gguf_tokens_end_an_output_by_their_name(
    tmp_path: Path, tokens: dict[str, int], ends: list[int]
) -> None:
    facts = {"merges": ["</ s>"], "eos_token_id": None}
    assert gguf_with(tmp_path / "t.gguf", tokens, **facts).eos_token_ids() == ends


def test_gguf_ids_that_no_token_has_end_nothing(tmp_path: Path) -> None:
    facts = {"merges": [], "eos_token_id": 99, "eot_token_id": 1}
    assert gguf_with(tmp_path / "t.gguf", {"a": 1, "b": 1}, **facts).eos_token_ids() == [1]


# ---- split GGUF files


def write_parts(directory: Path, count: int = 3, **facts: object) -> list[Path]:
    """A model of `count` tensors, one a part; the first part alone knows about the model."""
    paths = []
    for number in range(count):
        name = "token_embd.weight" if number == 0 else f"blk.{number}.attn_q.weight"
        split = {"split.no": number, "split.count": count, "split.tensors.count": count}
        known = {} if number == 0 else dict.fromkeys(("tokenizer.ggml.tokens",), None)
        path = directory / f"m-{number + 1:05}-of-{count:05}.gguf"
        content = {name: (values(40, 64, seed=number), QuantizationType.F32)}
        paths.append(write_gguf(path, facts={**split, **known, **facts}, tensors=content))
    return paths


def test_a_split_gguf_by_any_of_its_parts(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    for name in (*paths, tmp_path):
        checkpoint = locate(str(name))
        assert checkpoint == Checkpoint(paths[0], "gguf")
        assert len(checkpoint.gguf.tensors) == 3 and checkpoint.config()["vocab_size"] == 40
    later = GGUFFile(paths[2])
    assert later.metadata["split.no"] == 0 and "tokenizer.ggml.tokens" in later.metadata
    for number, tensor in enumerate(later.tensors.values()):
        assert (tensor.dequantize() == values(40, 64, seed=number)).all()


def test_parts_that_do_not_make_a_whole_are_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    wrong = paths[0].rename(tmp_path / "first.gguf")
    with pytest.raises(ValueError, match=r"must end in -00001-of-00003\.gguf"):
        GGUFFile(wrong)
    wrong.rename(paths[0])
    paths[1].unlink()
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf is missing: fetch all 3 parts"):
        locate(str(paths[2])).gguf.tensors  # noqa: B018 - reading it is what fails
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(ValueError, match=r"both hold blk\.2\.attn_q\.weight"):
        GGUFFile(paths[0])
    write_parts(tmp_path, **{"split.tensors.count": 5})
    with pytest.raises(ValueError, match=r"hold 3 tensors, where the first tells of 5"):
        GGUFFile(paths[0])


# ---- tokenizers


def test_a_tokenizer_is_found_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    assert locate_tokenizer(str(tmp_path)) == tmp_path
    assert locate_tokenizer(str(tmp_path / "tokenizer.json")) == tmp_path
    (tmp_path / "m").mkdir()
    path = write_gguf(tmp_path / "m" / "tiny.gguf")
    assert locate_tokenizer(str(path)) == locate_tokenizer(str(tmp_path / "m")) == path


# ---- the hub, played by a function


class Hub:
    """Stands in for `snapshot_download`: `local` and `remote` are directories or errors."""

    def __init__(self, local: Path | Exception, remote: Path | Exception) -> None:
        self.local, self.remote = local, remote
        self.num_downloads = 0

    def __call__(
        self,
        model: str,
        *,
        revision: str | None,
        allow_patterns: list[str],
        local_files_only: bool,
    ) -> str:
        self.num_downloads += not local_files_only
        found = self.local if local_files_only else self.remote
        if isinstance(found, Exception):
            raise found
        return str(found)


def snapshot(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text("{}")
    return path


def with_hub(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Hub:
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    return hub


def test_a_cached_snapshot_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = snapshot(tmp_path / "s", "config.json", "model.safetensors")
    hub = with_hub(monkeypatch, Hub(whole, OSError("no network")))
    assert locate("org/name").path == whole
    assert hub.num_downloads == 0


def test_a_snapshot_without_weights_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = snapshot(tmp_path / "partial", "config.json", "tokenizer.json")
    whole = snapshot(tmp_path / "whole", "config.json", "model.safetensors")
    hub = with_hub(monkeypatch, Hub(partial, whole))
    assert locate("org/name").path == whole
    assert hub.num_downloads == 1


def test_a_hub_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with_hub(monkeypatch, Hub(FileNotFoundError("not cached"), ConnectionError("no route")))
    with pytest.raises(ValueError, match=r"'org/name'.*no route.*local directory"):
        locate("org/name")


class Repository:
    """Stands in for the hub: a repository with files, of which a cache holds what was fetched."""

    def __init__(self, cache: Path, files: dict[str, str]) -> None:
        self.cache, self.files = cache, files
        self.is_online = True
        self.num_requests = 0
        self.revisions: set[str | None] = set()

    def snapshot(
        self,
        model: str,
        *,
        revision: str | None,
        allow_patterns: list[str],
        local_files_only: bool,
    ) -> str:
        assert model == "org/name"
        self.revisions.add(revision)
        if local_files_only and not self.cache.exists():
            raise FileNotFoundError("not cached")
        if not local_files_only:
            self.num_requests += 1
            if not self.is_online:
                raise ConnectionError("no route")
            for name, content in self.files.items():
                if any(fnmatchcase(name, pattern) for pattern in allow_patterns):
                    path = self.cache / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(content)
        return str(self.cache)

    def names(self, model: str, *, revision: str | None) -> list[str]:
        self.revisions.add(revision)
        if not self.is_online:
            raise ConnectionError("no route")
        return list(self.files)

    def fetched(self) -> set[str]:
        return {str(p.relative_to(self.cache)) for p in self.cache.rglob("*") if p.is_file()}


@pytest.fixture
def publish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, str]], Repository]:
    def make(files: dict[str, str]) -> Repository:
        repository = Repository(tmp_path / "cache", files)
        monkeypatch.setattr("huggingface_hub.snapshot_download", repository.snapshot)
        monkeypatch.setattr("huggingface_hub.list_repo_files", repository.names)
        return repository

    return make


Publish = Callable[[dict[str, str]], Repository]
TOKENIZER = {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "x"}
OTHERS = dict.fromkeys(
    ("consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors",
     "onnx/model.onnx", "original/params.json", "pytorch_model.bin", "training_args.bin"),
    "",
)  # fmt: skip


def test_of_a_repository_only_the_model_is_fetched(publish: Publish) -> None:
    model = {"config.json": "{}", "generation_config.json": "{}", "model.safetensors": ""}
    repository = publish({**model, **TOKENIZER, **OTHERS})
    assert locate("org/name").path == repository.cache
    assert repository.fetched() == {*model, *TOKENIZER}
    repository.is_online = False
    assert locate("org/name").format == "safetensors"


@pytest.mark.parametrize("names", [["model-00001-of-00002.safetensors"], ["a.safetensors"]])
def test_the_index_says_which_shards_there_are(publish: Publish, names: list[str]) -> None:
    names = [*names, "model-00002-of-00002.safetensors"]
    index = json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}})
    files = {"config.json": "{}", "model.safetensors.index.json": index}
    repository = publish({**files, **dict.fromkeys(names, ""), **OTHERS})
    assert locate("org/name").path == repository.cache
    assert repository.fetched() == {*files, *names}
    (repository.cache / names[0]).unlink()  # a download that was cut off
    assert locate("org/name").path == repository.cache and repository.fetched() == {*files, *names}


def test_a_tokenizer_brings_no_weights_and_needs_no_config(publish: Publish) -> None:
    repository = publish({**TOKENIZER, "model.safetensors": "", **OTHERS})
    assert locate_tokenizer("org/name") == repository.cache
    assert repository.fetched() == set(TOKENIZER)
    repository.is_online = False
    assert locate_tokenizer("org/name") == repository.cache


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", "0123abc"])
@pytest.mark.parametrize("choice", ["", ":Q4_K_M", "/M-Q4_K_S.gguf"])
def test_all_that_is_asked_of_the_hub_is_of_one_revision(
    publish: Publish, revision: str, choice: str
) -> None:
    for files in (GGUFS, {"config.json": "{}", "model.safetensors": ""}, {"a.gguf": ""}):
        repository = publish(files)
        with suppress(ValueError):  # not every choice is in every repository
            locate(f"org/name{choice}@{revision}")
        with suppress(ValueError):
            locate_tokenizer(f"org/name{choice}@{revision}")
        assert repository.revisions == {revision}


def test_what_lies_here_has_no_revision(tmp_path: Path) -> None:
    for name in (str(tmp_path), "smollm2"):
        with pytest.raises(ValueError, match=r"revision: .* has none"):
            locate(f"{name}@main")


def test_names_with_their_revisions() -> None:
    model = EngineConfig.from_kwargs(model="o/n:Q8_0", revision="r").model
    assert model.source == model.tokenizer_source == "o/n:Q8_0@r"
    model = EngineConfig.from_kwargs(model="o/n", tokenizer="o/t", revision="r").model
    assert (model.source, model.tokenizer_source) == ("o/n@r", "o/t")
    model = EngineConfig.from_kwargs(tokenizer="o/t", tokenizer_revision="s").model
    assert (model.source, model.tokenizer_source) == ("smollm2", "o/t@s")
    with pytest.raises(ValueError, match=r"^tokenizer_revision: .*set revision"):
        EngineConfig.from_kwargs(model="o/n", tokenizer_revision="s")
    with pytest.raises(ValueError, match="revision"):
        EngineConfig.from_kwargs(model="o/n", revision="a b")


def test_a_plan_brings_no_weights(publish: Publish) -> None:
    index = json.dumps({"weight_map": {"t": "model-00001-of-00001.safetensors"}})
    small = {"config.json": "{}", "model.safetensors.index.json": index}
    repository = publish({**small, "model-00001-of-00001.safetensors": ""})
    checkpoint = locate("org/name", weights=False)
    assert checkpoint.format == "safetensors" and repository.fetched() == set(small)
    assert weight_files(checkpoint.path) == []


GGUFS = {
    "M-Q4_K_M.gguf": "", "M-Q4_K_S.gguf": "", "M-IQ4_XS.gguf": "", "mmproj-M-F16.gguf": "",
    "BF16/M-BF16-00001-of-00002.gguf": "", "BF16/M-BF16-00002-of-00002.gguf": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (":Q4_K_M", ["M-Q4_K_M.gguf"]),
        (":q4_k_m", ["M-Q4_K_M.gguf"]),
        (":M-Q4_K_S.gguf", ["M-Q4_K_S.gguf"]),
        ("/M-Q4_K_S.gguf", ["M-Q4_K_S.gguf"]),
        (":BF16", list(GGUFS)[-2:]),
        ("/BF16/M-BF16-00002-of-00002.gguf", list(GGUFS)[-2:]),
    ],
)
def test_a_gguf_of_the_hub(publish: Publish, choice: str, expected: list[str]) -> None:
    repository = publish({**GGUFS, "config.json": "{}", "README.md": ""})
    for _ in ("online", "offline"):
        checkpoint = locate(f"org/name{choice}")
        assert checkpoint == Checkpoint(repository.cache / expected[0], "gguf")
        assert locate_tokenizer(f"org/name{choice}") == checkpoint.path
        assert repository.fetched() == set(expected)
        repository.is_online = False


@pytest.mark.parametrize("name", ["org/name", "org/name:Q8_0", "org/name/other.gguf"])
def test_a_gguf_that_is_not_named_well_is_offered(publish: Publish, name: str) -> None:
    repository = publish({**GGUFS, "README.md": ""})
    for find in (locate, locate_tokenizer):
        with pytest.raises(ValueError, match=r"4 GGUF files as org/name:QUANT.*M-Q4_K_M\.gguf"):
            find(name)
    assert not repository.cache.exists(), "nothing is fetched on a guess"


def test_the_only_gguf_of_a_repository_needs_no_name(publish: Publish) -> None:
    publish({"tiny.Q4_0.gguf": "", "mmproj.gguf": ""})
    assert locate("org/name").path.name == "tiny.Q4_0.gguf"
    assert locate_tokenizer("org/name").name == "tiny.Q4_0.gguf"


def test_a_repository_without_a_model_is_said(publish: Publish) -> None:
    publish({"config.json": "{}", "pytorch_model.bin": ""})
    with pytest.raises(ValueError, match=r"'org/name' has no model\.safetensors.*local directory"):
        locate("org/name")


def test_finding_a_local_model_loads_neither_the_hub_nor_torch(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    program = (
        "import sys; from nanovllm.checkpoint.locate import locate; locate(sys.argv[1]).config(); "
        "print({'huggingface_hub', 'torch', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, str(path)]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "set()\n"
