"""AdamW over ZeRO's partitions: steps without finite numbers are skipped, and any number of ranks reads the moments."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from alignment.engines.deepspeed_zero import Fragment, forget_gradients, spoil_gradients
from alignment.engines.optimizer import Tried, set_lr
from alignment.errors import UserError
from alignment.tensorfile import write_tensors

if TYPE_CHECKING:
    from alignment.engines.deepspeed_backend import ZeroBackend

PIECE = re.compile(r"(.+)\[(\d+):(\d+)\]")
MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroAdamW:
    """One slot's moments. DeepSpeed has one optimizer on the weights; a slot lends it its moments while it steps."""

    def __init__(self, backend: "ZeroBackend") -> None:
        self.backend, self.adamw = backend, backend.adamw
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)

    def begin(self, lr: float) -> None:
        forget_gradients(self.backend.engine, self.backend.stage)
        self.adamw.state = self.state
        set_lr(self.adamw, lr)

    def step(self, loss: Tensor) -> Tried:
        """Steps if the loss of every rank and the gradients' norm are finite: all ranks come to the same answer.

        DeepSpeed looks at the norm before it touches anything, and clears the gradients either way. A loss that is not
        finite makes a gradient so.
        """
        engine, ranks = self.backend.engine, self.backend.share.ranks
        loss_R = loss.new_empty(ranks, dtype=torch.float32)
        dist.all_gather_single(loss_R, loss.detach().float().reshape(1))
        losses = loss_R.tolist()
        bad_ranks = [str(rank) for rank, value in enumerate(losses) if not math.isfinite(value)]
        norm = self._plain_step(bool(bad_ranks)) if self.backend.stage == 0 else self._zero_step(bool(bad_ranks))
        total, bad = sum(losses), None
        if bad_ranks:
            bad = f"the loss of rank {' and '.join(bad_ranks)}"
        elif not math.isfinite(norm):
            bad = "the gradient"
        assert engine.was_step_applied() == (bad is None), f"stepped: {engine.was_step_applied()}, though {bad}"
        return Tried(total, norm, bad)

    def _zero_step(self, spoil: bool) -> float:
        engine = self.backend.engine
        if spoil:
            spoil_gradients(engine, self.backend.trained, self.backend.device)
        engine.step()
        return float(engine.get_global_grad_norm())

    def _plain_step(self, spoil: bool) -> float:
        engine, parameters = self.backend.engine, self.backend.trained.values()
        norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if math.isfinite(norm) and not spoil:
            engine.step()
        else:
            engine.zero_grad()
            engine._step_applied = False
        return norm

    def save(self, stem: Path) -> None:
        """A file per rank, with the moments of the parts of parameters that are its own."""
        pieces = {
            f"{part.name}.{key}": (part.start, part.of(self.state[part.flat][key]))
            for part in self.backend.own_fragments()
            for key in MOMENTS
            if self.state.get(part.flat)
        }
        write_pieces(stem, pieces, self.backend.share.rank, self.backend.share.ranks)

    def restore(self, stem: Path, steps: int) -> None:
        self.state.clear()
        parts = list(self.backend.fragments())
        if steps:
            for flat in {id(part.flat): part.flat for part in parts}.values():
                self.state[flat] = {
                    "step": torch.tensor(float(steps), dtype=torch.float32, device=flat.device),
                    **{key: torch.zeros_like(flat.detach()) for key in MOMENTS},
                }
            targets = [(f"{p.name}.{key}", p.start, p.of(self.state[p.flat][key])) for p in parts for key in MOMENTS]
            read_pieces(stem, targets)


def write_pieces(stem: Path, pieces: Mapping[str, tuple[int, Tensor]], rank: int, ranks: int) -> None:
    """Writes this rank's part of flat tensors: by name, where it starts and its elements."""
    named = {f"{name}[{start}:{start + len(piece)}]": piece for name, (start, piece) in pieces.items()}
    write_tensors(piece_file(stem, rank, ranks), named)


def piece_file(stem: Path, rank: int, ranks: int) -> Path:
    """Where a rank's pieces are."""
    return stem.with_name(f"{stem.name}.rank-{rank:05d}-of-{ranks:05d}.safetensors")


def piece_files(stem: Path) -> list[Path]:
    """The files of all ranks that wrote pieces.

    Raises:
        UserError: There are none, or one of a set is missing.
    """
    paths = sorted(stem.parent.glob(f"{stem.name}.rank-*-of-*.safetensors"))
    if not paths:
        raise UserError(
            f"{stem.parent} has no moments that this learner reads ({stem.name}.rank-*): another learner wrote it. Go"
            " on with that one, or start a new run from its weights"
        )
    ranks = int(paths[0].stem.rpartition("-")[2])
    whole = [piece_file(stem, rank, ranks) for rank in range(ranks)]
    if paths != whole:
        raise UserError(f"{stem.parent}: of {ranks} files {stem.name}.rank-* there are {len(paths)}")
    return whole


def read_pieces(stem: Path, targets: Sequence[tuple[str, int, Tensor]]) -> None:
    """Fills each target, a run of the named flat tensor from a start on, from the pieces of however many ranks.

    Raises:
        UserError: They do not have all of it.
    """
    filled = [0] * len(targets)
    wanted: dict[str, list[int]] = defaultdict(list)
    for i, (name, _, _) in enumerate(targets):
        wanted[name].append(i)
    for path in piece_files(stem):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                match = PIECE.fullmatch(key)
                assert match is not None, f"{path}: {key}"
                start, stop = int(match[2]), int(match[3])
                for i in wanted[match[1]]:
                    _, first, target = targets[i]
                    low, high = max(start, first), min(stop, first + len(target))
                    if low < high:
                        target[low - first : high - first].copy_(file.get_slice(key)[low - start : high - start])
                        filled[i] += high - low
    short = [name for (name, _, target), count in zip(targets, filled, strict=True) if count != len(target)]
    if short:
        raise UserError(f"{stem}.rank-*: not all of {', '.join(short[:3])} is there ({len(short)} in all)")


def masters(parts: Iterable[Fragment]) -> dict[str, tuple[int, Tensor]]:
    """Float32 values of fragments, as pieces."""
    return {part.name: (part.start, part.master) for part in parts}
