"""The stored head of a model whose config.json says that its embedding is the head."""

import numpy as np

from llada_jax.checkpoint.stream import in_order, slabs
from llada_jax.errors import InputError
from llada_jax.interop.stored_tensor import StoredTensor
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig

HEAD = "lm_head.weight"


def settle(tensors: dict[str, StoredTensor], config: ModelConfig) -> tuple[dict, ModelConfig, list[str]]:
    """Returns (tensors, config, notices) for a model whose config ties head and embedding, as transformers 5 reads it.

    A head equal to the embedding is dropped; `stores_tied_head` makes export write it again. A head that differs is
    the model's head, and the model is not tied. A head without an embedding is used as both.
    Reads both slab by slab up to the first difference. Raises InputError if their shapes differ.
    """
    if not config.tie_word_embeddings or HEAD not in tensors:
        return tensors, config, []
    name = parameters.declare(config)["embedding"].hf_name
    if name not in tensors:
        others = {other: tensor for other, tensor in tensors.items() if other != HEAD}
        return others | {name: tensors[HEAD]}, config, [f"no {name}: {HEAD} is the embedding, as the two are tied"]
    head, embedding = tensors[HEAD], tensors[name]
    if head.shape != embedding.shape:
        shapes = f"shape {list(head.shape)}, the embedding to which it is tied {list(embedding.shape)}"
        raise InputError(f"{head.file}: {HEAD} has {shapes}")
    if equal(head, embedding):
        others = {other: tensor for other, tensor in tensors.items() if other != HEAD}
        return others, config.replace(stores_tied_head=True), []
    notice = f"tie_word_embeddings is true, but {HEAD} differs from the embedding: it is the head, and nothing is tied"
    return tensors, config.replace(tie_word_embeddings=False), [notice]


def equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors of the same shape have equal values, or equal bits (NaN)."""

    def same(first: int, last: int) -> bool:
        x, y = a.read(first, last), b.read(first, last)
        return x.dtype == y.dtype and x.tobytes() == y.tobytes() or np.array_equal(x, y)

    return all(in_order(same, slabs(a.shape, max(a.dtype.itemsize, b.dtype.itemsize), 0)))
