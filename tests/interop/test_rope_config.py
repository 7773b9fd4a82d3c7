"""The rotary embedding of a config.json, in every form that transformers reads or a stranger's file has."""

import numpy as np
import pytest

from llada_jax.errors import InputError
from llada_jax.interop import hf_config
from llada_jax.model.config import RopeScaling
from tests.interop import test_hf_config as hf_configs

LLAMA = hf_configs.LLAMA | {"max_position_embeddings": 2048}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
FLOAT32 = np.dtype(np.float32)
DEFAULT = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rope_of(**fields):
    config = hf_config.from_hf(LLAMA | fields)
    return config.rope_theta, config.rope_scaling


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_types(field):
    assert rope_of(**{field: {"rope_type": "linear", "factor": 4}}) == (1e4, RopeScaling("linear", 4.0))
    assert rope_of(**{field: {"type": "linear", "factor": 4.0}}) == (1e4, RopeScaling("linear", 4.0))
    assert rope_of(**{field: YARN}, rope_theta=5e5) == (5e5, RopeScaling("yarn", 4.0, 512))
    # Without an original length it is that of the model, as in transformers.
    assert rope_of(**{field: LLAMA3}) == (1e4, RopeScaling("llama3", 8.0, 2048, 1.0, 4.0))
    assert rope_of(**{field: DEFAULT}) == (1e6, None)
    assert rope_of(**{field: None}) == rope_of(**{field: {}}) == (1e4, None)


def test_null_is_as_good_as_absent():
    nulls = dict.fromkeys(["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "rope_theta"])
    assert rope_of(rope_scaling=YARN | nulls) == (1e4, RopeScaling("yarn", 4.0, 512))
    assert rope_of(rope_scaling=YARN | {"beta_fast": 0, "beta_slow": 0})[1] == RopeScaling("yarn", 4.0, 512)
    assert rope_of(rope_scaling=None, rope_parameters=DEFAULT, rope_theta=None) == (1e6, None)
    assert rope_of(rope_scaling={}, rope_parameters=YARN) == (1e4, RopeScaling("yarn", 4.0, 512))


def test_mscale_counts_only_where_it_changes_the_scale():
    assert rope_of(rope_scaling=YARN | {"mscale": 0.7})[1] == RopeScaling("yarn", 4.0, 512)
    given = {"mscale": 0.7, "mscale_all_dim": 0.7, "attention_factor": 1.138629436111989}
    assert rope_of(rope_scaling=YARN | given)[1] == RopeScaling("yarn", 4.0, 512)
    with pytest.raises(InputError, match="rope_scaling.mscale_all_dim=0.7 is not supported"):
        rope_of(rope_scaling=YARN | {"mscale": 0.7, "mscale_all_dim": 0.7})


def test_both_fields_that_say_the_same():
    assert rope_of(rope_scaling=DEFAULT, rope_parameters=DEFAULT) == (1e6, None)
    both = YARN | {"rope_theta": 5e5}
    assert rope_of(rope_scaling=YARN, rope_parameters=both, rope_theta=5e5) == (5e5, RopeScaling("yarn", 4.0, 512))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # As model cards say for long contexts: transformers 5 would take rope_scaling, and theta's default.
        ({"rope_parameters": DEFAULT, "rope_scaling": YARN}, "rope_scaling=.*yarn.* and rope_parameters=.*default"),
        ({"rope_parameters": YARN, "rope_scaling": YARN | {"factor": 2.0}}, "rope_scaling=.* and rope_parameters="),
        ({"rope_parameters": YARN | {"rope_theta": 5e5}, "rope_scaling": YARN}, "rope_scaling=.* and rope_parameters="),
        ({"rope_parameters": DEFAULT, "rope_theta": 5e5}, "rope_theta=500000.0 contradicts rope_parameters.rope_theta"),
        ({"rope_scaling": YARN | {"type": "linear"}}, "rope_scaling.type='linear' contradicts .*rope_type='yarn'"),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 1024},
            "original_max_position_embeddings=1024 contradicts rope_scaling.original_max_position_embeddings=512",
        ),
        ({"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": YARN}}, "rope_parameters.full_attention"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' is not supported"),
        ({"rope_scaling": [4.0]}, r"rope_scaling=\[4.0\] is not supported"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.factor=4.0 is not supported with rope_type 'default'"),
        ({"rope_scaling": DEFAULT | {"mrope_section": [1, 2]}}, "rope_scaling.mrope_section"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type='dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1]}}, "rope_scaling.rope_type='longrope'"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_scaling.rope_type=\['yarn'\]"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor='4', expected a number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": True}}, "factor=True, expected a number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling.factor=0.5, expected at least 1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}, "rope_scaling.beta_fast=32"),
        ({"rope_scaling": YARN | {"truncate": None}}, "rope_scaling.truncate=None"),  # falsy, in transformers too
        ({"rope_parameters": YARN | {"attention_factor": 1.0}}, "rope_parameters.attention_factor=1.0"),
        ({"rope_parameters": YARN | {"beta_slow": 2}}, "rope_parameters.beta_slow=2"),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            "rope_scaling.high_freq_factor=1.0, expected more than 1.0",
        ),
        ({"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        (
            {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 1.0},
            "partial_rotary_factor=1.0 contradicts rope_parameters.partial_rotary_factor=0.5",
        ),
        ({"rotary_dim": 4}, "rotary_dim=4 is not supported"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(InputError, match=message):
        rope_of(**fields)


LING = LLAMA | {"architectures": ["BailingMoeV2ForCausalLM"], "num_key_value_heads": 2, "head_dim": 8}
LING |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PARTIAL = DEFAULT | {"partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    "source",
    [
        LLAMA,
        LLAMA | {"rope_theta": 1e6, "rope_scaling": None},
        LLAMA | {"rope_parameters": DEFAULT},
        LLAMA | {"rope_parameters": DEFAULT, "rope_scaling": None, "rope_theta": 1e6},
        LLAMA | {"rope_parameters": DEFAULT, "rope_scaling": DEFAULT},
        LLAMA | {"rope_parameters": {"type": "default"}, "rope_theta": 1e6},
        LING,
        LING | {"rope_parameters": PARTIAL},
    ],
)
def test_a_model_that_yarn_extended_has_a_config_json_in_the_style_of_its_source(source):
    config = hf_config.from_hf(source)
    untouched = hf_config.exported(config, source, FLOAT32)
    extended = config.extended(2)
    hf = hf_config.exported(extended, source, FLOAT32)
    assert hf_config.from_hf(hf) == extended
    for field in ("rope_scaling", "rope_parameters", "rope_theta"):
        assert untouched.get(field) == source.get(field)
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": config.max_position_embeddings}
    if source.get("rope_parameters"):
        partial = {key: value for key, value in source["rope_parameters"].items() if key == "partial_rotary_factor"}
        assert hf["rope_parameters"] == yarn | {"rope_theta": config.rope_theta} | partial
        assert not {"rope_scaling", "rope_theta"} & set(hf)  # another reader would take them for the model's
    else:
        assert hf["rope_scaling"] == yarn and "rope_parameters" not in hf


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_linear_comes_back(field):
    source = LLAMA | {field: {"rope_type": "linear", "factor": 4.0}}
    config = hf_config.from_hf(source)
    assert hf_config.from_hf(hf_config.to_hf(config)) == config
    with pytest.raises(InputError, match="YaRN by 2: the model has rope_scaling already"):
        config.extended(2)
