"""What student and teachers computed for a batch, as terms read it: for all of its images, or for some of them."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from structures import Targets, select_images


@dataclass(frozen=True)
class BatchOutputs:
    """s_output, t_outputs (by teacher): for the same images. targets: their objects.

    content: (B, 1, H, W) bool, False in the padding of the images; None: no padding.
    shared: by teacher, what its terms compute only once (TermInputs.computed_once).
    """

    s_output: Any
    t_outputs: dict[str, Any]
    targets: Targets
    content: Tensor | None = None
    shared: dict[str, dict[Hashable, Any]] = field(default_factory=dict)

    def of_images(self, chosen: Tensor) -> "BatchOutputs":
        """The same for the chosen images alone. chosen: (B,) bool, at least one True."""
        t_outputs = {name: select_images(output, chosen) for name, output in self.t_outputs.items()}
        content = None if self.content is None else self.content[chosen.to(self.content.device)]
        return BatchOutputs(select_images(self.s_output, chosen), t_outputs, self.targets.of_images(chosen), content)
