"""Models of real shapes with random weights, made from their configurations on the device that runs them.

Nothing is downloaded. Random weights spread attention evenly: times do not depend on it, choices of keys do.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

# The published configurations, as far as time and memory depend on them.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-3-270m": (
        "Gemma3TextConfig",
        dict(
            vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
            num_key_value_heads=1, head_dim=256, sliding_window=512, query_pre_attn_scalar=256,
            layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3, max_position_embeddings=32768,
        ),
    ),
    "gemma-3-1b": (
        "Gemma3TextConfig",
        dict(
            vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
            num_key_value_heads=1, head_dim=256, sliding_window=512, query_pre_attn_scalar=256,
            layer_types=((["sliding_attention"] * 5 + ["full_attention"]) * 5)[:26], max_position_embeddings=131072,
        ),
    ),
    "gemma-2-2b": (
        "Gemma2Config",
        dict(
            vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
            num_key_value_heads=4, head_dim=256, sliding_window=4096, query_pre_attn_scalar=256,
            attn_logit_softcapping=50.0, final_logit_softcapping=30.0, max_position_embeddings=131072,
        ),
    ),
    "qwen-2.5-7b": (
        "Qwen2Config",
        dict(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, max_position_embeddings=131072,
        ),
    ),
    "llama-3.1-8b": (
        "LlamaConfig",
        dict(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, max_position_embeddings=131072,
        ),
    ),
    "tiny": (
        "LlamaConfig",
        dict(
            vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        ),
    ),
    "tiny-gemma-2": (
        "Gemma2Config",
        dict(
            vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, sliding_window=128, query_pre_attn_scalar=64,
            attn_logit_softcapping=50.0, final_logit_softcapping=30.0, max_position_embeddings=4096,
        ),
    ),
}  # fmt: skip


def build(name: str, device: str, dtype: torch.dtype) -> Any:
    """The model with random weights, each tensor made and filled where it stays."""
    kind, sizes = MODELS[name]
    config = getattr(transformers, kind)(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
            model.tie_weights()
    finally:
        torch.set_default_dtype(before)
    for label, parameter in model.named_parameters():  # no_init_weights leaves there whatever the memory held
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, 0.02)
        else:  # Gemma's norms multiply by 1 + weight
            parameter.data.fill_(float("norm" in label and "Gemma" not in kind))
    return model.eval()


def weights_mib(model: Any) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


def global_layers(model: Any) -> int:
    """Layers without a sliding window: those that run DHSA."""
    types = getattr(model.config, "layer_types", None)
    return types.count("full_attention") if types else model.config.num_hidden_layers
