"""The definition of `attention`, in NumPy."""

import numpy as np


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """softmax(query key^T / sqrt(head)) value, float64, for each sample and head of [batch, tokens, heads, head]."""
    q, k, v = (np.moveaxis(x.astype(np.float64), 1, 2) for x in (query, key, value))
    logits = q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.moveaxis(weights / weights.sum(-1, keepdims=True) @ v, 1, 2)
