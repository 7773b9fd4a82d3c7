"""A tied model's stored head: the embedding again, or the model's own head."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import llada_jax
from llada_jax.checkpoint import weights
from llada_jax.checkpoint.merge import merge_checkpoints
from llada_jax.errors import InputError
from llada_jax.interop.convert import import_checkpoint
from llada_jax.interop.export import export_checkpoint
from llada_jax.model import parameters
from tests.interop.test_huggingface import CLASSES, TINY, tiny_tensors, write_folder

TIED = TINY | CLASSES["llama"] | {"tie_word_embeddings": True}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def folder_of(path, head, dtype=np.float32, kind="llama"):
    """A tied model; head(embedding): what its file holds as the head, or None."""
    tensors = tiny_tensors(kind, dtype)
    tensors[HEAD] = head(tensors[EMBEDDING])
    config = TIED | CLASSES[kind]
    return write_folder(path, config, {name: value for name, value in tensors.items() if value is not None}), tensors


def came_back(tmp_path, source):
    export_checkpoint(str(source), str(tmp_path / "hf"))
    return load_file(tmp_path / "hf" / "model.safetensors"), json.loads((tmp_path / "hf" / "config.json").read_text())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_one_that_differs_is_the_models_head(tmp_path, capsys, dtype, kind):
    """By one bit of the last row."""

    def changed(embedding):
        head = embedding.copy()
        head[-1, -1] = np.nextafter(head[-1, -1], dtype(np.inf))
        return head

    source, tensors = folder_of(tmp_path / "source", changed, dtype, kind)
    import_checkpoint(str(source), str(tmp_path / "ours"))
    assert "lm_head.weight differs from the embedding" in capsys.readouterr().out
    model = weights.load_checkpoint(tmp_path / "ours")
    assert not model.config.tie_word_embeddings and not model.config.stores_tied_head
    assert np.array_equal(np.asarray(model.params["head"]).T, tensors[HEAD])
    found, config = came_back(tmp_path, tmp_path / "ours")
    assert config["tie_word_embeddings"] is False
    assert found[HEAD].tobytes() == tensors[HEAD].tobytes()


def test_logits_are_those_of_the_head_that_differs(tmp_path):
    source, tensors = folder_of(tmp_path / "source", lambda embedding: -2 * embedding)
    import_checkpoint(str(source), str(tmp_path / "ours"))
    without, _ = folder_of(tmp_path / "without", lambda embedding: None)
    import_checkpoint(str(without), str(tmp_path / "tied"))
    logits = [
        np.asarray(llada_jax.forward(model.params, model.config, [[1, 2, 3]], mask="causal"))
        for model in map(weights.load_checkpoint, (tmp_path / "ours", tmp_path / "tied"))
    ]
    np.testing.assert_allclose(logits[0], -2 * logits[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", [True, False])
def test_an_equal_one_is_exported_byte_for_byte_and_none_is_not_made(tmp_path, capsys, stored):
    source, tensors = folder_of(tmp_path / "source", lambda embedding: embedding.copy() if stored else None)
    import_checkpoint(str(source), str(tmp_path / "ours"))
    assert "differs" not in capsys.readouterr().out
    config, _ = weights.read_config(tmp_path / "ours")
    assert (config.tie_word_embeddings, config.stores_tied_head) == (True, stored)
    found, exported = came_back(tmp_path, tmp_path / "ours")
    assert exported["tie_word_embeddings"] is True
    assert {name: value.tobytes() for name, value in found.items()} == {
        name: value.tobytes() for name, value in tensors.items() if value is not None
    }


def _trained(path):
    model = weights.load_checkpoint(path / "ours")
    changed = model.params | {"embedding": model.params["embedding"] + jnp.float32(1)}
    leaves = parameters.unstack(changed, model.config)
    weights.write_weights(path / "trained", model.config, leaves.items(), {}, {"source": model.lineage})
    return path / "trained"


def _merged(path):
    merge_checkpoints([path / "ours", _trained(path)], path / "merged")
    return path / "merged"


def _converted(path):
    merge_checkpoints([_trained(path)], path / "converted", np.dtype(ml_dtypes.bfloat16))
    return path / "converted"


def _with_a_mask_token(path):
    import_checkpoint(str(path / "source"), str(path / "masked"), add_mask_token=True)
    return path / "masked"


@pytest.mark.parametrize("change", [_trained, _merged, _converted, _with_a_mask_token])
def test_no_stale_head_is_exported(tmp_path, change):
    source, tensors = folder_of(tmp_path / "source", np.copy)
    import_checkpoint(str(source), str(tmp_path / "ours"))
    found, config = came_back(tmp_path, change(tmp_path))
    assert config["tie_word_embeddings"] is True
    assert found[HEAD].tobytes() == found[EMBEDDING].tobytes()
    assert found[HEAD].shape != tensors[HEAD].shape or not np.array_equal(found[HEAD], tensors[HEAD])


def test_an_equal_head_in_another_dtype_is_the_embedding(tmp_path):
    source, tensors = folder_of(tmp_path / "source", lambda e: e.astype(np.float32), ml_dtypes.bfloat16)
    import_checkpoint(str(source), str(tmp_path / "ours"))
    assert weights.read_config(tmp_path / "ours")[0].tie_word_embeddings
    rounded, _ = folder_of(tmp_path / "rounded", lambda e: e.astype(ml_dtypes.bfloat16))
    import_checkpoint(str(rounded), str(tmp_path / "other"))
    assert not weights.read_config(tmp_path / "other")[0].tie_word_embeddings


def test_a_head_alone_is_the_embedding(tmp_path, capsys):
    tensors = tiny_tensors("llama")
    del tensors[EMBEDDING]
    import_checkpoint(str(write_folder(tmp_path / "source", TIED, tensors)), str(tmp_path / "ours"))
    assert "no model.embed_tokens.weight: lm_head.weight is the embedding" in capsys.readouterr().out
    model = weights.load_checkpoint(tmp_path / "ours")
    assert np.array_equal(model.params["embedding"], tensors[HEAD]) and "head" not in model.params


def test_a_head_of_another_shape_is_refused(tmp_path):
    source, _ = folder_of(tmp_path / "source", lambda embedding: embedding[:-1].copy())
    with pytest.raises(InputError, match=r"lm_head.weight has shape \[39, 32\], the embedding to .* \[40, 32\]"):
        import_checkpoint(str(source), str(tmp_path / "ours"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
