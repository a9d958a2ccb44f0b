"""Weights made of a seed and a tensor name: the numpy twin of the random weights of the `weights` crate.

Element i of a tensor (row-major) is the sum of the eight 16-bit lanes of two words of a splitmix64
sequence that starts at a key made of seed and name, centred and scaled to unit variance. All of it is
integer arithmetic up to two IEEE double operations, so every machine makes the same bits.
It does not know which tensors a model has. A tensor that no rule covers is an error, not a guess.
"""

import math

import numpy as np

_GAMMA = np.uint64(0x9E37_79B9_7F4A_7C15)
_MASK = (1 << 64) - 1


def _mix(z: np.ndarray) -> np.ndarray:
    """splitmix64's output function, element by element."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return z ^ (z >> np.uint64(31))


def fnv1a64(text: str) -> int:
    """FNV-1a, 64 bits, of the UTF-8 bytes."""
    value = 0xCBF2_9CE4_8422_2325
    for byte in text.encode():
        value = ((value ^ byte) * 0x0000_0100_0000_01B3) & _MASK
    return value


def normals(seed: int, name: str, count: int) -> np.ndarray:
    """The first `count` draws of the tensor `name`: float64, mean 0, variance 1."""
    # Arrays, not scalars: numpy wraps array products silently and warns of scalar ones.
    start = np.array([(seed + int(_GAMMA)) & _MASK], np.uint64)
    key = np.uint64(fnv1a64(name)) ^ _mix(start)
    words = _mix(key + np.arange(1, 2 * count + 1, dtype=np.uint64) * _GAMMA)
    lanes = words.view(np.uint16).reshape(count, 8)
    sums = lanes.sum(axis=1, dtype=np.int64)
    return (sums - 262_140) / (65_536.0 * math.sqrt(8.0 / 12.0))


def law(name: str, shape: tuple[int, ...], tied: bool) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's elements; `tied` is `tie_word_embeddings`."""

    def ends(path: str) -> bool:
        return name == path or name.endswith("." + path)

    if len(shape) == 1 and (ends("bias") or ends("e_score_correction_bias")):
        return 0.0, 0.1
    if len(shape) == 1 and ends("weight"):
        return 1.0, 0.2  # every vector called weight is a norm
    if len(shape) == 2 and ends("weight"):
        fan_in = math.sqrt(shape[1])
        if ends("embed_tokens.weight"):
            return 0.0, 2.0 / fan_in if tied else 1.0
        if ends("lm_head.weight") or ends("mlp.gate.weight"):
            return 0.0, 2.0 / fan_in
        return 0.0, 1.0 / fan_in
    raise ValueError(f"no rule for {name} of shape {shape}")


def tensor(seed: int, name: str, shape: tuple[int, ...], tied: bool) -> np.ndarray:
    """The float32 values of a tensor."""
    mean, std = law(name, shape, tied)
    values = mean + std * normals(seed, name, math.prod(shape))
    return values.astype(np.float32).reshape(shape)


def bits_sum(tensors: dict[str, np.ndarray]) -> int:
    """Sum of the bit patterns of all elements, modulo 2^64: equal where all weights are equal."""
    return sum(int(t.view(np.uint32).sum(dtype=np.uint64)) for t in tensors.values()) & _MASK
