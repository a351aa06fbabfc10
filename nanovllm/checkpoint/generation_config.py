"""What a checkpoint's generation_config.json says of how it wants to be sampled.

The worker reads it at its start; frontends find it in `WorkerInfo.sampling_defaults`, as defaults
of requests that leave a field out. Which ids end an output, `locate.Checkpoint` finds.
"""

from nanovllm.checkpoint.json_file import read_json_if_there
from nanovllm.checkpoint.locate import Checkpoint
from nanovllm.sampling_params import SamplingParams

# In generation_config.json → field of `SamplingParams`. As in vLLM, nothing else is heeded.
FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def sampling_defaults(checkpoint: Checkpoint) -> dict[str, int | float]:
    """Fields of `SamplingParams`; none for GGUF files, which have no such file beside them.

    Raises `ValueError` naming the file, if what it says cannot be honoured.
    """
    if checkpoint.format != "safetensors":
        return {}
    path = checkpoint.path / "generation_config.json"
    content = read_json_if_there(path)
    found = {
        field: content[name] for name, field in FIELDS.items() if content.get(name) is not None
    }
    try:
        SamplingParams(**found)
    except ValueError as error:
        raise ValueError(
            f"model: {path}: {error}: mend it, or ignore it with generation_config=vllm"
        ) from None
    return found
