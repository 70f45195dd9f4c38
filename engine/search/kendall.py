"""Kendall's rank correlation: how well the order by one score agrees with the order by another."""

import math

import numpy as np


def kendall_tau(x: np.ndarray, y: np.ndarray) -> float | None:
    """tau-b of two scores of the same n things (n,), which counts ties (Kendall, 1945).

        tau = sum_{i<j} sign(x_i - x_j) sign(y_i - y_j) / sqrt(X Y)

    X: the number of pairs with x_i != x_j, Y: with y_i != y_j. 1: the same order, -1: the reverse. None if one of the
    two scores does not tell any two things apart. ValueError for a number that is not finite.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("scores that are not finite have no order")
    i, j = np.triu_indices(len(x), 1)
    order_x, order_y = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])  # (n (n - 1) / 2,)
    told_apart = np.abs(order_x).sum() * np.abs(order_y).sum()
    return None if told_apart == 0 else float((order_x * order_y).sum() / math.sqrt(told_apart))


def spread_without_relation(n: int) -> float:
    """The standard deviation of tau over n >= 2 things in random order, without ties (Kendall, 1938).

    sqrt(2 (2 n + 5) / (9 n (n - 1)))
    """
    return math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1)))
