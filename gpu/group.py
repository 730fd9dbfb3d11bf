"""Workers that share a batch: integer sums and maxima over all of them, so that every split gives the same bits."""

from __future__ import annotations

import torch


class Group:
    """One worker alone. `shard` is its part of a batch; reductions return their argument."""

    rank = 0
    size = 1

    def shard(self, batch: int) -> slice:
        """The images of this worker: contiguous, sizes differ by at most one."""
        return slice(self.rank * batch // self.size, (self.rank + 1) * batch // self.size)

    def maximum(self, value: int) -> int:
        """The largest of the workers' values."""
        return value

    def maximum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over the workers, in place."""
        return tensor

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the workers, in place; the caller chooses a type that holds it."""
        return tensor

    def gather(self, part: torch.Tensor, batch: int) -> torch.Tensor:
        """The rows of all workers' parts of a batch."""
        return part


ALONE = Group()
