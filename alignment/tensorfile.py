"""Named tensors in a file, without pickle, and checked against what is expected when they are read back."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes ``tensors`` as safetensors, exactly; tensors may share memory."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        # safetensors refuses tensors that share memory, which parameters of one flat buffer do.
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    save_file(plain, path)


def read_tensors(path: Path, expected: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of the file, on the CPU.

    Raises:
        ValueError: ``expected`` has other names, shapes or types; the message names the first few.
        FileNotFoundError: There is no such file.
    """
    tensors = load_file(path)
    if expected is None:
        return tensors
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is not part of this model" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        there, here = tensors[name], expected[name]
        if there.shape != here.shape or there.dtype != here.dtype:
            wrong.append(f"{name} is {_describe(there)} there and {_describe(here)} here")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path} does not fit: {'; '.join(sorted(wrong)[:5])}{more}. Restore it with the same model")
    return tensors


def copy_into(own: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Sets each tensor of ``own`` in place to the one of the same name."""
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(new[name])


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied parameter appears once."""
    saved = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
    return {**dict(module.named_parameters()), **buffers}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and every byte, in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        sha.update(f"{name} {_describe(tensor)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
