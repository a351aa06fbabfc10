"""What `quality.py` and `quality_files.py` ask of llama.cpp, in an interpreter that has it.

    PYTHON benchmarks/llama_part.py < JSON

PYTHON has llama-cpp-python. The JSON is `{"quantize": [[source, target, type], …]}` or
`{"score": [file, …], "texts": [[token id, …], …]}`; the last line printed is
`{"version": …, "perplexities": [one per file]}`. Token ids go in as they are, each text at once and
by itself; nothing is put before them.
"""

import ctypes
import json
import math
import sys

import llama_cpp as lib
import numpy as np


def quantize(source: str, target: str, name: str) -> None:
    """name: of a file type, as llama.cpp's header has it after LLAMA_FTYPE_MOSTLY_."""
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{name}")
    if lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not make {target}")


def perplexity(file: str, texts: list[list[int]]) -> float:
    """Over the tokens of all texts but the first of each."""
    model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp could not load {file}")
    vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(map(len, texts))
    params.n_threads = params.n_threads_batch = 1  # more of them spin while others compute
    context = lib.llama_init_from_model(model, params)
    losses: list[float] = []
    for token_ids in texts:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch = lib.llama_batch_init(len(token_ids), 0, 1)
        batch.n_tokens = len(token_ids)
        for place, token_id in enumerate(token_ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token_id, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if lib.llama_decode(context, batch):
            raise SystemExit(f"llama.cpp could not run {file}")
        for place, next_id in enumerate(token_ids[1:]):
            row = lib.llama_get_logits_ith(context, place)
            logits = np.ctypeslib.as_array(row, (vocab_size,)).astype(np.float64)
            peak = logits.max()
            losses.append(peak + np.log(np.exp(logits - peak).sum()) - logits[next_id])
        lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    asked = json.load(sys.stdin)
    lib.llama_backend_init()
    for source, target, name in asked.get("quantize", ()):
        quantize(source, target, name)
    found = [perplexity(file, asked["texts"]) for file in asked.get("score", ())]
    print(json.dumps({"version": lib.__version__, "perplexities": found}))


if __name__ == "__main__":
    main()
