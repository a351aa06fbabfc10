"""What checkpoints call the weights of a dense decoder: part → name, "{}" being the layer.

Read by `weights`, through the `names` of a `DecoderSpec`. Parts are those of `WeightSlot.part`;
".weight" or ".bias" is added to a name.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightNames:
    """The name maps of one architecture, for both file formats.

    gguf_interleaved: llama.cpp has reordered the rows of q and k within each head, so that the two
    numbers a rotation mixes are neighbours; the loader puts them head_dim / 2 apart again.
    """

    safetensors: Mapping[str, str]
    gguf: Mapping[str, str]
    gguf_interleaved: bool


SAFETENSORS = {
    "embedding": "model.embed_tokens",
    "input_norm": "model.layers.{}.input_layernorm",
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
    "o": "model.layers.{}.self_attn.o_proj",
    "post_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
}
GGUF = {
    "embedding": "token_embd",
    "input_norm": "blk.{}.attn_norm",
    "q": "blk.{}.attn_q",
    "k": "blk.{}.attn_k",
    "v": "blk.{}.attn_v",
    "q_norm": "blk.{}.attn_q_norm",
    "k_norm": "blk.{}.attn_k_norm",
    "o": "blk.{}.attn_output",
    "post_norm": "blk.{}.ffn_norm",
    "gate": "blk.{}.ffn_gate",
    "up": "blk.{}.ffn_up",
    "down": "blk.{}.ffn_down",
    "final_norm": "output_norm",
    "lm_head": "output",
}
LLAMA = WeightNames(SAFETENSORS, GGUF, gguf_interleaved=True)
QWEN = WeightNames(SAFETENSORS, GGUF, gguf_interleaved=False)
