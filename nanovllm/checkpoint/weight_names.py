"""What checkpoints call the weights of a decoder: part → name.

Read through the `names` of a `DecoderSpec` by whoever loads or counts weights. Parts are those of
`WeightSlot.part`; ".weight" or ".bias" is added to a name, but to that of sinks (`tensor_name`).
"""

from msgspec import Struct


class WeightNames(Struct, frozen=True):
    """The name maps of one family, for both file formats.

    In a name the first "{}" is the layer, and a second one the expert; a name without a place for
    the expert holds all of them, one behind the other along a leading axis. Parts that share a name
    lie in that tensor one below the other, in the order of the map. gguf_interleaved: llama.cpp has
    reordered the rows of q and k within each head, so that the two numbers a rotation mixes are
    neighbours; the loader puts them head_dim / 2 apart again. prefixes: what names of safetensors
    may begin with, and what that means in the map; ignored: prefixes of what is no text decoder. A
    name that ends in "*" is that of parameters and of no module: of the weight, which lies inputs
    first, it has no "*"; of others it ends in "_bias" and so on. So does one that ends in "+", but
    its weight lies outputs first.
    """

    safetensors: dict[str, str]
    gguf: dict[str, str]
    gguf_interleaved: bool = False
    prefixes: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def known(self, stored: str) -> str | None:
        """The name in the map of safetensors that a stored tensor's name means; None: none."""
        if stored.startswith(self.ignored):
            return None
        for prefix, meant in self.prefixes:
            if stored.startswith(prefix):
                return meant + stored.removeprefix(prefix)
        return stored


def tensor_name(name: str, kind: str) -> str:
    """Of a module's tensor; kind: "" if the name is the tensor's own."""
    if is_parameter(name):
        return name[:-1] if kind == "weight" else f"{name[:-1]}_{kind}"
    return f"{name}.{kind}" if kind else name


def is_parameter(name: str) -> bool:
    """Whether a name in the maps is one of parameters and not of a module."""
    return name.endswith(("*", "+"))


def is_transposed(name: str) -> bool:
    """Whether its weight lies inputs first."""
    return name.endswith("*")


SAFETENSORS = {
    "embedding": "model.embed_tokens",
    "attention_norm": "model.layers.{}.input_layernorm",
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
    "o": "model.layers.{}.self_attn.o_proj",
    "key_scale": "model.layers.{}.self_attn.k_scale",
    "value_scale": "model.layers.{}.self_attn.v_scale",
    "sinks": "model.layers.{}.self_attn.sinks",
    "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
    "router": "model.layers.{}.mlp.gate",
    "expert_gate": "model.layers.{}.mlp.experts.{}.gate_proj",
    "expert_up": "model.layers.{}.mlp.experts.{}.up_proj",
    "expert_down": "model.layers.{}.mlp.experts.{}.down_proj",
    "shared_gate": "model.layers.{}.mlp.shared_expert.gate_proj",
    "shared_up": "model.layers.{}.mlp.shared_expert.up_proj",
    "shared_down": "model.layers.{}.mlp.shared_expert.down_proj",
    "shared_expert_gate": "model.layers.{}.mlp.shared_expert_gate",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
}
GGUF = {
    "embedding": "token_embd",
    "attention_norm": "blk.{}.attn_norm",
    "q": "blk.{}.attn_q",
    "k": "blk.{}.attn_k",
    "v": "blk.{}.attn_v",
    "q_norm": "blk.{}.attn_q_norm",
    "k_norm": "blk.{}.attn_k_norm",
    "o": "blk.{}.attn_output",
    "sinks": "blk.{}.attn_sinks.weight",
    "attention_post_norm": "blk.{}.post_attention_norm",
    "mlp_norm": "blk.{}.ffn_norm",
    "mlp_post_norm": "blk.{}.post_ffw_norm",
    "gate": "blk.{}.ffn_gate",
    "up": "blk.{}.ffn_up",
    "down": "blk.{}.ffn_down",
    "router": "blk.{}.ffn_gate_inp",
    "expert_gate": "blk.{}.ffn_gate_exps",
    "expert_up": "blk.{}.ffn_up_exps",
    "expert_down": "blk.{}.ffn_down_exps",
    "router_correction": "blk.{}.exp_probs_b",
    "shared_gate": "blk.{}.ffn_gate_shexp",
    "shared_up": "blk.{}.ffn_up_shexp",
    "shared_down": "blk.{}.ffn_down_shexp",
    "shared_expert_gate": "blk.{}.ffn_gate_inp_shexp",
    "final_norm": "output_norm",
    "lm_head": "output",
}


def of_text_part(names: WeightNames) -> WeightNames:
    """The same where a checkpoint may hold a text decoder beside what sees."""
    return WeightNames(
        names.safetensors,
        names.gguf,
        names.gguf_interleaved,
        prefixes=(
            ("language_model.model.", "model."),
            ("language_model.lm_head", "lm_head"),
            ("model.language_model.", "model."),
        ),
        ignored=(
            *("vision_tower.", "model.vision_tower."),
            *("multi_modal_projector.", "model.multi_modal_projector."),
            *("model.audio_tower.", "model.embed_vision.", "model.embed_audio."),
        ),
    )


LLAMA = WeightNames(SAFETENSORS, GGUF, gguf_interleaved=True)
QWEN = WeightNames(SAFETENSORS, GGUF)
