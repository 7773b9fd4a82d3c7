"""What may lie in a pytorch_model.bin (tests/check_transformers5.py reads real ones, with torch)."""

import numpy as np
import pytest

from llada_jax.errors import InputError
from llada_jax.interop import huggingface, torch_files
from llada_jax.interop.stored_tensor import StoredTensor

WEIGHTS = {"model.norm.weight": np.ones(2)}


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module"])
def test_nested_tables_are_found(key):
    loaded = {"step": 7, key: WEIGHTS, "optimizer": {"state": {0: {"exp_avg": np.ones(2)}}, "param_groups": []}}
    assert torch_files._table("a.bin", loaded, np.ndarray) is WEIGHTS
    assert torch_files._table("a.bin", WEIGHTS, np.ndarray) is WEIGHTS


@pytest.mark.parametrize(
    ("loaded", "found"),
    [
        ({"epoch": 3, "weights": WEIGHTS}, "keys epoch, weights"),
        ({"model": WEIGHTS, "state_dict": WEIGHTS}, "keys model, state_dict"),  # which of them?
        ({"model": {"a": {"b": np.ones(2)}}}, "keys model"),
        ([np.ones(2)], "list"),
        ({}, "dict"),
    ],
)
def test_others_are_refused_in_one_line(loaded, found):
    with pytest.raises(InputError, match=f"a.bin: no table of tensors, nor one under model or .*: found {found}$"):
        torch_files._table("a.bin", loaded, np.ndarray)


def test_the_prefix_of_a_wrapper_is_taken_away():
    one = StoredTensor((2,), np.dtype(np.float32), "a.bin", None)

    def names(*given):
        return list(huggingface._without_wrappers(dict.fromkeys(given, one)))

    assert names("module.model.a", "module.lm_head") == ["model.a", "lm_head"]
    assert names("module._orig_mod.model.a") == ["model.a"]
    assert names("module.model.a", "model.b") == ["module.model.a", "model.b"]
