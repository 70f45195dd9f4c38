"""Kendall's tau-b in float64, pair by pair from its definition."""

from itertools import combinations


def kendall_tau(x, y):
    """None where one of the two has only ties."""
    concordant = discordant = ties_x = ties_y = pairs = 0
    for (a, b), (c, d) in combinations(list(zip(x, y)), 2):
        pairs += 1
        ties_x += a == c
        ties_y += b == d
        if a != c and b != d:
            agrees = (a < c) == (b < d)
            concordant += agrees
            discordant += not agrees
    product = (pairs - ties_x) * (pairs - ties_y)
    return None if product == 0 else (concordant - discordant) / product**0.5
