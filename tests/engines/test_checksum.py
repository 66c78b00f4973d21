"""The checksum of weights: what changes it and what does not."""

import pytest
import torch

from alignment.engines.checksum import ROW_WORDS, checksum

SIZES = (0, 1, 7, 2 * ROW_WORDS - 1, 2 * ROW_WORDS, 7 * ROW_WORDS + 3)


def numbers(size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_order_does_not_matter_and_sets_add_up():
    tensors = {f"w{i}": numbers(size, i) for i, size in enumerate(SIZES)}
    whole = checksum(tensors)
    assert whole == checksum(dict(reversed(tensors.items()))) and 0 < whole < 1 << 64
    parts = [checksum({name: tensor}) for name, tensor in tensors.items()]
    assert whole == sum(parts) % (1 << 64)
    assert checksum({}) == 0 and len(set(parts)) == len(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size", [s for s in SIZES if s > 1])
def test_every_element_counts_and_so_does_its_place(size: int, dtype: torch.dtype):
    plain = numbers(size, 1, torch.float32).mul(50).to(dtype)
    first = checksum({"w": plain})
    for place in {0, size // 2, size - 1}:
        changed = plain.clone()
        changed.view(torch.uint8).view(size, -1)[place, -1] ^= 1  # one bit
        assert checksum({"w": changed}) != first
    turned = plain.roll(1)
    assert checksum({"w": turned}) != first
    exchanged = plain.clone()
    exchanged[[0, size - 1]] = plain[[size - 1, 0]]
    assert (checksum({"w": exchanged}) == first) == bool(plain[0] == plain[-1])


def test_whole_rows_exchanged_are_seen():
    table = numbers(8 * ROW_WORDS).view(4, -1)
    assert checksum({"w": table[[1, 0, 2, 3]]}) != checksum({"w": table})


def test_name_shape_and_type_count():
    plain = numbers(12)
    variants = [{"w": plain}, {"v": plain}, {"w": plain.view(3, 4)}, {"w": plain.view(4, 3)}]
    variants += [{"w": plain.view(torch.int32)}, {"w": plain, "x": plain[:0]}]
    assert len({checksum(v) for v in variants}) == len(variants)


def test_layout_does_not_count():
    wide = numbers(4000).view(40, 100)
    assert checksum({"w": wide.t()}) == checksum({"w": wide.t().contiguous()})
    odd = numbers(4001, dtype=torch.bfloat16)[1:]  # starts in the middle of a word
    assert checksum({"w": odd}) == checksum({"w": odd.clone()})


@pytest.mark.gpu
def test_is_the_same_on_a_gpu():
    tensors = {f"w{i}": numbers(size, i, torch.bfloat16) for i, size in enumerate(SIZES)}
    assert checksum(tensors) == checksum({name: t.cuda() for name, t in tensors.items()})
