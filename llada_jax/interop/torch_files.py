"""Tensors of a pytorch_model.bin. Needs torch; code in the pickle is never run (weights_only)."""

import zipfile

import numpy as np
from etils import epath

from llada_jax.errors import InputError
from llada_jax.interop.stored_tensor import DTYPES, StoredTensor

# Where trainers and torch.distributed.checkpoint put the weights, beside a step or an optimizer.
_NESTED = ("model", "state_dict", "model_state_dict", "module")


def open_torch(path: epath.Path) -> dict[str, StoredTensor]:
    """Every tensor of the file: of its table {name: tensor}, or of the one under "model", "state_dict" and the like.

    A file from before torch 1.6 is read whole; from a newer one, tensors are read on demand. Raises InputError if torch
    is missing, or if the file is damaged, has no such table, or has a tensor of an unsupported kind.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(f"{path}: reading .bin files needs torch; install it or convert to safetensors") from error
    try:
        # Only the zip format can be mapped; the other is a stream of pickles.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # pickle, zip and torch errors
        raise InputError(f"{path}: {_first_line(error)}") from error
    dtypes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    tensors = {}
    for name, tensor in _table(path, loaded, torch.Tensor).items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise InputError(f"{path}: {name} is not a tensor, or not a plain one")
        if tensor.dtype not in dtypes:
            raise InputError(f"{path}: {name} has dtype {tensor.dtype}; supported: {', '.join(DTYPES)}")
        tensors[str(name)] = _stored(path, tensor.detach(), DTYPES[dtypes[tensor.dtype]], torch.uint8)
    return tensors


def _table(path: epath.Path, loaded, kind: type) -> dict:
    """The table {name: tensor} in a loaded file."""

    def holds_tensors(value) -> bool:
        return isinstance(value, dict) and any(isinstance(each, kind) for each in value.values())

    if holds_tensors(loaded):
        return loaded
    keys = list(loaded) if isinstance(loaded, dict) else []
    nested = [key for key in keys if key in _NESTED and holds_tensors(loaded[key])]
    if len(nested) == 1:
        return loaded[nested[0]]
    content = f"keys {', '.join(map(str, keys[:5]))}" if keys else type(loaded).__name__
    raise InputError(f"{path}: no table of tensors, nor one under {' or '.join(_NESTED)}: found {content}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _stored(path: epath.Path, tensor, dtype: np.dtype, byte) -> StoredTensor:
    def read(first, last, out=None):
        rows = tensor[first:last] if tensor.ndim else tensor
        value = rows.contiguous().reshape(-1).view(byte).numpy().view(dtype).reshape(tuple(rows.shape))
        if out is None:
            return value
        out[...] = value
        return out

    def reshape(shape):
        return _stored(path, tensor.reshape(shape), dtype, byte)

    return StoredTensor(tuple(tensor.shape), dtype, str(path), read, reshape)
