"""Distillation losses in float64 numpy, term by term from their equations; imports neither torch nor the project."""

import numpy as np


def feature_mse(s_map: np.ndarray, t_map: np.ndarray) -> float:
    total = 0.0
    for s, t in zip(s_map.ravel(), t_map.ravel()):
        total += (s - t) ** 2
    return total / max(s_map.size, 1)


def channel_wise_kl(s_map: np.ndarray, t_map: np.ndarray, temperature: float = 1.0) -> float:
    batch, channels = s_map.shape[:2]
    if s_map.size == 0:
        return 0.0
    total = 0.0
    for b in range(batch):
        for c in range(channels):
            log_s, log_t = (
                z / temperature - np.logaddexp.reduce(z / temperature)
                for z in (s_map[b, c].ravel(), t_map[b, c].ravel())
            )
            total += np.sum(np.exp(log_t) * (log_t - log_s))
    return temperature**2 * total / max(batch * channels, 1)


def soft_class_targets(s_logits: np.ndarray, t_logits: np.ndarray, temperature: float, power: float) -> float:
    classes = s_logits.shape[-1]
    total = weights = 0.0
    for s_row, t_row in zip(s_logits.reshape(-1, classes), t_logits.reshape(-1, classes)):
        weight = np.exp(-np.logaddexp(0, -t_row.max())) ** power
        row = 0.0
        for s_k, t_k in zip(s_row / temperature, t_row / temperature):
            log_p, log_not_p = -np.logaddexp(0, -t_k), -np.logaddexp(0, t_k)
            log_q, log_not_q = -np.logaddexp(0, -s_k), -np.logaddexp(0, s_k)
            row += np.exp(log_p) * (log_p - log_q) + np.exp(log_not_p) * (log_not_p - log_not_q)
        total, weights = total + weight * row, weights + weight
    return temperature**2 * total / max(weights, 1.0)
