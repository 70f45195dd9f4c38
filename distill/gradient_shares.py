"""Weights of terms given as shares of the detection loss's gradient: measured after the warm-up, then fixed.

A weight taken from a paper belongs to the paper's detector: with published weights, one term's gradient can be hundreds
of times another's. A share means the same for all. With L_det the student's own loss of a batch (times
detection_weight), L_term the term before its weight and schedule, summed over its pairs of maps, and F the shared maps,

    w = share * sum_b ||d L_det / d F||_b / sum_b ||d L_term / d F||_b

over BATCHES batches b, the first after the optimizer's warm-up. ||.|| is the Euclidean norm over all shared maps
together, those of all processes. From then on w is a number like any other.

Until then w is that of each batch alone, so the term acts from the first step, at its share, while the student changes
fastest. If the warm-up never ends, this holds to the end of the run. A batch in which either gradient is 0 gives w = 0
and is not counted: it has no labelled picture, or nothing that the term compares.

The shared maps are the pyramid, all its levels: the output maps of the neck, which the head reads (YOLO: p3, p4, p5;
Faster R-CNN: p2 ... p6, or as many as it has, which RPN and RoI head read). A term that names maps of the backbone (c3,
c4, ...), which come before the pyramid, is measured on these maps instead. Derivatives are total: what p3 does through
p4 counts.
"""

import re

import torch
from torch import Tensor, nn

from errors import UserError
from layers.over_processes import process_count, sum_over_processes

BATCHES = 10  # those that a weight is measured on
PYRAMID, BACKBONE = re.compile(r"p\d\w*"), re.compile(r"c\d\w*")  # names of maps, such as p3, p5_first


class GradientShares(nn.Module):
    """The measured weights of the terms that have a share.

    shares: each above 0, by the term's name. student_maps: the names of the maps that the same terms compare.
    map_names: those of the student's output.features.
    `measured` is saved with the run, so that a resumed one goes on measuring where it was: (T, 3) float32, a row for
    each such term: batches, sum of the detection loss's norms, sum of the term's norms. Without any it does not exist.
    UserError where the student has no pyramid.
    """

    measured: Tensor

    def __init__(
        self, shares: dict[str, float], student_maps: dict[str, tuple[str, ...]], map_names: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.shares = shares
        self.maps = {name: shared_maps(name, student_maps[name], map_names) for name in shares}
        self.rows = {name: row for row, name in enumerate(self.shares)}
        self.fixed: dict[str, float] = {}  # the weights that are measured
        self.announced: set[str] = set()  # those that `announcements` has named
        if self.shares:
            self.register_buffer("measured", torch.zeros(len(self.shares), 3))
            self.register_load_state_dict_post_hook(lambda module, _: module.fix())

    @property
    def is_measuring(self) -> bool:
        """Whether `forward` computes gradients: until every weight is fixed."""
        return len(self.fixed) < len(self.shares)

    def forward(
        self,
        values: dict[str, Tensor],
        detection: dict[str, Tensor] | None,
        features: dict[str, Tensor],
        *,
        counts: bool,
    ) -> dict[str, Tensor | float]:
        """The weights of the terms in `values`, by name; those of terms with a number are not among them.

        values: L_term, scalars with their graph. detection: the parts of L_det. features: the student's maps.
        counts: whether the batch is after the warm-up. Every process must call it with the same terms.
        UserError for a term whose gradient never reaches the shared maps.
        """
        weights: dict[str, Tensor | float] = {n: self.fixed[n] for n in values if n in self.fixed}
        names = [name for name in values if name in self.shares and name not in self.fixed]
        if not names:
            return weights
        if detection is None:
            raise ValueError("found no detection losses, expected them for a weight that is a share of their gradient")
        map_sets = list(dict.fromkeys(self.maps[name] for name in names))
        l_det = torch.stack(list(detection.values())).sum()
        squares = [squared_norm("the detection loss", l_det, features, maps) for maps in map_sets]
        squares += [squared_norm(f"term {name!r}", values[name], features, self.maps[name]) for name in names]
        # The loss of all processes is the mean of theirs, so its gradient on the maps of one has their share of it.
        norms = sum_over_processes(torch.stack(squares)).sqrt() / process_count()
        detection_norms = dict(zip(map_sets, norms))
        for name, term_norm in zip(names, norms[len(map_sets) :]):
            pair = torch.stack((detection_norms[self.maps[name]], term_norm))  # (2,)
            has_both = (pair > 0).all() & pair.isfinite().all()
            weights[name] = torch.where(has_both, self.shares[name] * pair[0] / pair[1], 0.0)
            if counts:
                self.measured[self.rows[name]] += torch.where(has_both, torch.cat((pair.new_ones(1), pair)), 0.0)
        if counts:
            self.fix()
        return weights

    def measured_weights(self) -> dict[str, tuple[int, float]]:
        """By term, once it was measured in some batch: the number of such batches, and the weight that they give."""
        rows = zip(self.shares, self.measured.tolist()) if self.shares else ()
        return {n: (int(count), self.shares[n] * detection / term) for n, (count, detection, term) in rows if count}

    def fix(self) -> None:
        """Fix the weights that enough batches were counted for."""
        self.fixed = {name: weight for name, (count, weight) in self.measured_weights().items() if count >= BATCHES}

    def describe(self, name: str, weight: float) -> str:
        """`cwd_big: weight 2.31, 0.1 of the detection loss's gradient on p3, p4, p5`"""
        share = f"{self.shares[name]:g} of the detection loss's gradient on {', '.join(self.maps[name])}"
        return f"{name}: weight {weight:.4g}, {share}"

    def announcements(self) -> list[str]:
        """A line for each weight that was fixed since the last call."""
        new = {name: weight for name, weight in self.fixed.items() if name not in self.announced}
        self.announced.update(new)
        return [f"{self.describe(name, weight)}, from here on" for name, weight in new.items()]

    def report(self) -> dict[str, dict[str, float | int | None]]:
        """For report.json: of each term its share, its weight (None: each batch had its own), the batches measured."""
        counts = {name: count for name, (count, _) in self.measured_weights().items()}
        return {
            name: {"share": share, "weight": self.fixed.get(name), "measured_batches": counts.get(name, 0)}
            for name, share in self.shares.items()
        }


def shared_maps(name: str, own_maps: tuple[str, ...], map_names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the maps that a term's gradient is measured on; see the head of this file."""
    if of_backbone := tuple(own for own in own_maps if BACKBONE.fullmatch(own)):
        return of_backbone
    if pyramid := tuple(own for own in map_names if PYRAMID.fullmatch(own)):
        return pyramid
    found = ", ".join(map_names) or "no maps"
    raise UserError(f"term {name!r}: found {found}, expected a student with maps p3, p4, ... or a number as weight")


def squared_norm(what: str, loss: Tensor, features: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """||d loss / d features||^2 over the named maps, (), float32; 0 for a loss without a graph. The graph is kept.

    UserError for a loss that depends on none of them.
    """
    if not loss.requires_grad:
        return loss.detach().float() * 0
    maps = [features[name] for name in names]
    gradients = [g for g in torch.autograd.grad(loss, maps, retain_graph=True, allow_unused=True) if g is not None]
    if not gradients:
        raise UserError(f"{what}: its gradient reaches none of {', '.join(names)}: expected a number as weight")
    return torch.stack([g.float().square().sum() for g in gradients]).sum()
