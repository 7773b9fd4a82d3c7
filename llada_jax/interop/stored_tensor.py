"""A tensor in a file of another format, read on demand."""

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

# As safetensors calls them.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: read(a, b[, out]) returns indices a to b of the first axis, in `out` or a new array.

    reshape(shape): the same elements in another shape; None if the file does not allow it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    file: str
    read: Callable[..., np.ndarray]
    reshape: Callable[[tuple[int, ...]], "StoredTensor"] | None = None

    def rows(self, first: int, last: int) -> "StoredTensor":
        """Indices first to last of the first axis, as a tensor."""

        def read(a, b, out=None):
            return self.read(first + a, first + b, out) if out is not None else self.read(first + a, first + b)

        return StoredTensor((last - first, *self.shape[1:]), self.dtype, self.file, read)
