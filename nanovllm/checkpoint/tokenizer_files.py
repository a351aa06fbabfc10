"""Makes a `Tokenizer`'s parts from a model's files: a directory, or a GGUF file.

Called by `Tokenizer.from_path`. Whatever the files are, the outcome is one Rust tokenizer, the
texts of the special tokens, and chat templates by name ("default" is the one without a name).
"""

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as FastTokenizer

from nanovllm.checkpoint import gguf_tokenizer, sentencepiece_bpe
from nanovllm.checkpoint.damage import blaming
from nanovllm.checkpoint.gguf import GGUFFile
from nanovllm.checkpoint.json_file import read_json_if_there
from nanovllm.checkpoint.special_tokens import gguf_special_tokens, special_tokens

# What transformers may make a tokenizer of, if there is no tokenizer.json.
OTHER_FORMS = ("tokenizer_config.json", "vocab.json", "spiece.model")
DEFAULT_TEMPLATE = "default"


class TokenizerParts(NamedTuple):
    """What `Tokenizer` is made of."""

    fast: FastTokenizer
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]


def from_gguf(path: Path) -> TokenizerParts:
    """Of a GGUF file's metadata. Raises `ValueError` if it holds no tokenizer that is known."""
    with blaming(path):
        return _from_metadata(path, GGUFFile(path).metadata)


def _from_metadata(path: Path, metadata: dict[str, Any]) -> TokenizerParts:
    fast = gguf_tokenizer.build(path, metadata)
    named = gguf_special_tokens(metadata)
    bos, eos = gguf_tokenizer.adds_bos(metadata), gguf_tokenizer.adds_eos(metadata)
    _add_around_prompts(
        fast,
        [named["bos_token"]] if bos and "bos_token" in named else [],
        [named["eos_token"]] if eos and "eos_token" in named else [],
    )
    prefix = "tokenizer.chat_template"
    templates = {
        key.removeprefix(prefix).removeprefix(".") or DEFAULT_TEMPLATE: text
        for key, text in metadata.items()
        if (key == prefix or key.startswith(f"{prefix}.")) and isinstance(text, str)
    }
    return TokenizerParts(fast, named, templates)


def from_directory(path: Path) -> TokenizerParts:
    """Of tokenizer.json, tokenizer.model or what transformers can read, and what lies beside it."""
    with blaming(path):
        return _from_files(path)


def _from_files(path: Path) -> TokenizerParts:
    config = read_json_if_there(path / "tokenizer_config.json")
    fast, named = _fast_tokenizer(path)
    fast.no_truncation()
    fast.no_padding()
    named |= special_tokens(path)
    before, after = _added_around_prompts(fast)
    if "bos_token" not in config and "bos_token" not in named and len(before) == 1:
        named["bos_token"] = before[0]
    # In the vocabulary, but not known there as special: they are found in prompts all the same.
    known = {token.content for token in fast.get_added_tokens_decoder().values()}
    missing = [text for text in dict.fromkeys(named.values()) if text not in known]
    fast.add_special_tokens(
        [AddedToken(text) for text in missing if fast.token_to_id(text) is not None]
    )
    # They overrule tokenizer.json; where one of them says nothing, that stays as it was.
    wanted = {"bos": config.get("add_bos_token"), "eos": config.get("add_eos_token")}
    if any(isinstance(value, bool) for value in wanted.values()):
        bos, eos = named.get("bos_token"), named.get("eos_token")
        if isinstance(wanted["bos"], bool):
            before = [bos] if wanted["bos"] and bos is not None else []
        if isinstance(wanted["eos"], bool):
            after = [eos] if wanted["eos"] and eos is not None else []
        _add_around_prompts(fast, before, after)
    return TokenizerParts(fast, named, _chat_templates(path, config))


def _fast_tokenizer(path: Path) -> tuple[FastTokenizer, dict[str, str]]:
    """And the special tokens that it names itself."""
    source = path / "tokenizer.json"
    if source.is_file():
        try:
            return FastTokenizer.from_file(str(source)), {}
        except Exception as error:  # the Rust library raises nothing more specific
            raise ValueError(f"{source} cannot be read: {error}") from None
    model = path / "tokenizer.model"
    if model.is_file() and (found := sentencepiece_bpe.from_model_file(model)) is not None:
        return found
    if model.is_file() or any((path / name).is_file() for name in OTHER_FORMS):
        return _through_transformers(path), {}
    raise ValueError(f"{path} holds no tokenizer: name one with tokenizer=<directory or id>")


def _through_transformers(path: Path) -> FastTokenizer:
    import transformers  # takes seconds, and few models need it

    try:
        slow = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        fast: FastTokenizer = slow.backend_tokenizer
    except Exception as error:
        raise ValueError(
            f"{path} holds no tokenizer.json, and transformers cannot make one ({error}): "
            "name another with tokenizer=<directory or id>"
        ) from error
    return fast


def _added_around_prompts(fast: FastTokenizer) -> tuple[list[str], list[str]]:
    """The tokens that encoding puts before and after a text."""
    bare = fast.encode("a", add_special_tokens=False).tokens
    whole = fast.encode("a", add_special_tokens=True).tokens
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _add_around_prompts(fast: FastTokenizer, before: list[str], after: list[str]) -> None:
    """Make `encode` put these tokens before and after a text."""
    added = [(token, fast.token_to_id(token)) for token in dict.fromkeys(before + after)]
    if missing := [token for token, token_id in added if token_id is None]:
        raise ValueError(
            f"tokenizer: prompts are to have {missing[0]!r} added, which is not in the vocabulary: "
            "fetch its files again, or name another with tokenizer=<directory or id>"
        )
    fast.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=added
    )


def _chat_templates(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Files of their own come before the entries of tokenizer_config.json, as in transformers."""
    default = path / "chat_template.jinja"
    others = sorted((path / "additional_chat_templates").glob("*.jinja"))
    files = {DEFAULT_TEMPLATE: default} if default.is_file() else {}
    files |= {file.stem: file for file in others}
    if files:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    template = config.get("chat_template")
    if template is None:
        template = read_json_if_there(path / "chat_template.json").get("chat_template")
    if isinstance(template, str):
        return {DEFAULT_TEMPLATE: template}
    entries = template if isinstance(template, list) else []
    return {entry["name"]: entry["template"] for entry in entries}
