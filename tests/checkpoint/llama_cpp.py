"""llama.cpp's own tokenizer, through the library inside the package `xllamacpp` (ctypes)."""

import ctypes
from pathlib import Path
from typing import Any

PARAMETER_BYTES = 256  # more than llama_model_params takes
BOOLEANS_FROM = 72  # where its first flag lies, `vocab_only`, behind pointers and enums


class _Parameters(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * PARAMETER_BYTES),)


class LlamaCppVocabulary:
    """The vocabulary of a GGUF file. Needs `xllamacpp`, of late 2026: see `BOOLEANS_FROM`."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        (library,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
        self._library: Any = ctypes.CDLL(str(library))
        silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._log = silent(lambda level, text, data: None)
        self._library.llama_log_set(self._log, None)
        self._library.llama_model_default_params.restype = _Parameters
        parameters = self._library.llama_model_default_params()
        parameters.bytes[BOOLEANS_FROM] = 1
        load = self._library.llama_model_load_from_file
        load.restype, load.argtypes = ctypes.c_void_p, [ctypes.c_char_p, _Parameters]
        model = load(str(path).encode(), parameters)
        assert model, f"llama.cpp does not load {path}"
        find = self._library.llama_model_get_vocab
        find.restype, find.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        self._vocabulary = ctypes.c_void_p(find(model))
        self._library.llama_vocab_is_eog.restype = ctypes.c_bool

    def encode(self, text: str) -> list[int]:
        """With what goes around a prompt, and special tokens found in the text."""
        content = text.encode()
        ids = (ctypes.c_int32 * (len(content) + 16))()
        flag = ctypes.c_bool(True)
        count = self._library.llama_tokenize(
            self._vocabulary, content, len(content), ids, len(ids), flag, flag
        )
        assert count >= 0
        return list(ids[:count])

    def end_ids(self) -> list[int]:
        count = self._library.llama_vocab_n_tokens(self._vocabulary)
        return [
            token_id
            for token_id in range(count)
            if self._library.llama_vocab_is_eog(self._vocabulary, token_id)
        ]
