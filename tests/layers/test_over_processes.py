"""Sums, normalisers and shares: alone what a process has itself, in two processes what one would have."""

import torch

from layers.over_processes import joint_mean, joint_normaliser, process_count, sum_over_processes
from tests.two_processes import in_two_processes

OWN = ([3.0, -1.0], [5.0])  # what each process has


def spread(values: torch.Tensor) -> torch.Tensor:
    """The variance of the values of all processes."""
    count = sum_over_processes(torch.tensor(float(len(values))))
    mean = sum_over_processes(values.sum()) / count
    return sum_over_processes((values - mean).square().sum()) / count


def in_one_of_two(rank: int) -> dict[str, torch.Tensor]:
    values = torch.tensor(OWN[rank], requires_grad=True)
    loss = spread(values)
    counts = torch.tensor([rank, 4])
    return {
        "count": torch.tensor(process_count()),
        "spread": loss.detach(),
        "gradient": torch.autograd.grad(loss, values)[0],
        "rows": joint_normaliser(len(values), values),
        "per level": joint_normaliser(counts.float(), values, at_least=0),
        "at least": joint_normaliser(0.25, values),
        "int": joint_normaliser(counts, values),
        "mean": joint_mean(values.detach().mean(), len(values)),
        "nothing": joint_mean(torch.zeros(()), 0),
        "large": joint_normaliser(2**25 + 1, values.double()),
    }


def test_in_two_processes(tmp_path):
    found = in_two_processes(in_one_of_two, tmp_path)
    joined = torch.tensor([*OWN[0], *OWN[1]], requires_grad=True)
    alone = spread(joined)
    (gradient,) = torch.autograd.grad(alone, joined)
    for own in found:
        assert own["count"] == 2
        torch.testing.assert_close(own["spread"], alone.detach())
        assert own["rows"] == 1.5  # three rows, for two processes
        assert own["per level"].tolist() == [0.5, 4] == own["int"].tolist()
        assert own["at least"] == 0.5  # at least 1 of both together
        assert own["nothing"] == 0
        assert own["large"] == 2**25 + 1
    torch.testing.assert_close((found[0]["mean"] + found[1]["mean"]) / 2, joined.detach().mean())
    mean = torch.cat([own["gradient"] for own in found]) / 2  # as DistributedDataParallel averages
    torch.testing.assert_close(mean, gradient)


def test_alone_nothing_changes():
    values = torch.tensor([0.25, 3.0], requires_grad=True)
    assert process_count() == 1
    assert sum_over_processes(values) is values
    assert joint_normaliser(0, values) == 1 and isinstance(joint_normaliser(7, values), int)
    assert joint_normaliser(values, values).tolist() == [1, 3] and not joint_normaliser(values, values).requires_grad
    mean = values.mean()
    assert joint_mean(mean, 2) is mean
