"""Log-probabilities of a reference over all given pairs, computed once: then no copy of the weights is needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from alignment.errors import UserError
from alignment.tensorfile import read_tensors, write_tensors
from alignment.types import Batch, Group


@dataclass(frozen=True)
class ReferenceCache:
    """Ragged: of side ``s`` of the pair with uid ``u`` the numbers from ``start[first[u] + s]`` to the next start."""

    logp: Tensor
    """float32, of the tokens of all completions, one after the other."""
    start: Tensor
    """int64, one more than there are completions."""
    first: Tensor
    """int64: the first completion of each pair, and one more. A completion that was judged by itself has no second."""

    TOGETHER: ClassVar[int] = 256
    """Pairs that go through the model in one call."""

    @classmethod
    def of(cls, pairs: Sequence[Group], annotate: Callable[[Sequence[Group]], Batch]) -> Self:
        """What ``annotate`` finds, as ``old_logp_BT``, of ``pairs``, whose uids are 0, 1, ..."""
        parts, counts = list[Tensor](), [0]
        first = torch.tensor([0, *(len(pair.rollouts) for pair in pairs)]).cumsum(0)
        for at in range(0, len(pairs), cls.TOGETHER):
            batch = annotate(pairs[at : at + cls.TOGETHER])
            assert batch.old_logp_BT is not None
            parts.append(batch.old_logp_BT[batch.loss_mask_BT])
            counts += batch.loss_mask_BT.sum(1).tolist()
        return cls(torch.cat(parts), torch.tensor(counts).cumsum(0), first)

    def filled(self, batch: Batch, pairs: Sequence[Group]) -> Batch:
        """``batch``, which begins with the rows of ``pairs``, with their ``ref_logp_BT``; 0 in all other rows."""
        mask_BT, rows = torch.zeros_like(batch.loss_mask_BT), sum(len(pair.rollouts) for pair in pairs)
        mask_BT[:rows] = batch.loss_mask_BT[:rows]
        places = [int(self.first[pair.uid]) + side for pair in pairs for side in range(len(pair.rollouts))]
        spans = [(self.start[place], self.start[place + 1]) for place in places]
        numbers = torch.cat([self.logp[a:b] for a, b in spans]).to(batch.ids_BT.device)
        zero_BT = torch.zeros(batch.ids_BT.shape, device=batch.ids_BT.device)
        return replace(batch, ref_logp_BT=zero_BT.masked_scatter(mask_BT, numbers))

    def write(self, path: Path) -> None:
        """Writes a file that is whole or not there."""
        staging = path.with_suffix(".tmp")
        write_tensors(staging, {"logp": self.logp, "start": self.start, "first": self.first})
        staging.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """What :meth:`write` wrote.

        Raises:
            UserError: The file is gone or damaged.
        """
        try:
            return cls(**read_tensors(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise UserError(
                f"{path}, the reference's log-probabilities, cannot be read ({error}); put it back, or start again "
                f"with --fresh (the old run is kept aside)"
            ) from error
