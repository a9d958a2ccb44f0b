"""The reference with one planted fault at a time: the mistakes an engine makes.

A fault edits the config, the weights, the loaded model, or the rotation, and says to which models it
applies. It makes no numbers; `make_goldens.py` runs what is returned here.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Fault:
    """Edits of config and model are in place; `weights` returns the values a tensor gets."""

    applies: Callable[[PreTrainedConfig], bool] = lambda config: True
    config: Callable[[PreTrainedConfig], None] = lambda config: None
    weights: Callable[[str, np.ndarray], np.ndarray] = lambda name, values: values
    model: Callable[[PreTrainedModel], None] = lambda model: None
    rotation: Callable[[PreTrainedModel], AbstractContextManager] = lambda model: nullcontext()


def _family(*names: str) -> Callable[[PreTrainedConfig], bool]:
    return lambda config: config.model_type in names


def _scaled_rope(config: PreTrainedConfig) -> bool:
    return config.rope_parameters["rope_type"] != "default"


def _yarn(config: PreTrainedConfig) -> bool:
    return config.rope_parameters["rope_type"] == "yarn"


def _groups(config: PreTrainedConfig) -> bool:
    limited = getattr(config, "topk_method", "noaux_tc") != "greedy"
    return limited and (getattr(config, "n_group", None) or 1) > 1


def _windows(config: PreTrainedConfig) -> bool:
    return "sliding_attention" in (getattr(config, "layer_types", None) or [])


def _no_mscale(config: PreTrainedConfig) -> None:
    # The factor on sine and cosine, and DeepSeek's on the softmax scale.
    config.rope_parameters.update(attention_factor=1.0, mscale_all_dim=0)


def _times_ten(config: PreTrainedConfig) -> None:
    config.rope_parameters["rope_theta"] *= 10


def _no_rope_scaling(config: PreTrainedConfig) -> None:
    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}


def _no_window(config: PreTrainedConfig) -> None:
    config.layer_types = ["full_attention"] * config.num_hidden_layers


def _no_group_limit(config: PreTrainedConfig) -> None:
    config.topk_group = config.n_group


def _flip_norm_topk(config: PreTrainedConfig) -> None:
    config.norm_topk_prob = not config.norm_topk_prob


def _no_routed_scaling(config: PreTrainedConfig) -> None:
    config.routed_scaling_factor = 1.0


def _scale_one_norm(name: str, values: np.ndarray) -> np.ndarray:
    # The norm before the MLP: what follows the other one is normalised again in latent attention.
    return values * np.float32(1.5) if name == "model.layers.1.post_attention_layernorm.weight" else values


def _zero(ending: str) -> Callable[[str, np.ndarray], np.ndarray]:
    return lambda name, values: np.zeros_like(values) if name.endswith(ending) else values


def _no_rotation(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq.zero_()


def _no_qk_norm(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()


def _as_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates neighbours (x0, x1), where sine and cosine repeat their first half."""
    half = x.shape[-1] // 2
    cos, sin, even, odd = cos[..., :half], sin[..., :half], x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def _as_halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotates (x0, x[n/2]) by complex angles, where the model rotates neighbours."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.real, angles.imag
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _other_layout(model: PreTrainedModel) -> AbstractContextManager:
    module = sys.modules[type(model).__module__]
    if model.config.model_type == "deepseek_v3":
        return mock.patch.object(model.config, "rope_interleave", not model.config.rope_interleave)
    if model.config.model_type == "deepseek_v2":

        def halves(q, k, angles):
            angles = angles.unsqueeze(1)
            return _as_halves(q, angles), _as_halves(k, angles)

        return mock.patch.object(module, "apply_rotary_emb", halves)

    def pairs(q, k, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _as_pairs(q, cos, sin), _as_pairs(k, cos, sin)

    return mock.patch.object(module, "apply_rotary_pos_emb", pairs)


FAULTS: dict[str, Fault] = {
    "no_rope": Fault(model=_no_rotation),
    "wrong_theta": Fault(config=_times_ten),
    "no_rope_scaling": Fault(_scaled_rope, config=_no_rope_scaling),
    "no_mscale": Fault(_yarn, config=_no_mscale),
    "wrong_interleave": Fault(rotation=_other_layout),
    "one_layers_scale": Fault(weights=_scale_one_norm),
    "no_correction_bias": Fault(_family("deepseek_v3"), weights=_zero(".e_score_correction_bias")),
    "no_group_limit": Fault(_groups, config=_no_group_limit),
    "no_shared_expert": Fault(
        _family("deepseek_v2", "deepseek_v3"), weights=_zero(".shared_experts.down_proj.weight")
    ),
    "no_routed_scaling": Fault(
        lambda config: getattr(config, "routed_scaling_factor", 1.0) != 1.0, config=_no_routed_scaling
    ),
    "norm_topk_flipped": Fault(_family("deepseek_v3", "qwen3_moe"), config=_flip_norm_topk),
    "no_window": Fault(_windows, config=_no_window),
    "no_qk_norm": Fault(_family("qwen3", "qwen3_moe"), model=_no_qk_norm),
}
