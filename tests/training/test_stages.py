"""The stages as functions, and the argument of the config files that are their command line."""

import pytest

from llada_jax import config_flag
from llada_jax.errors import InputError
from llada_jax.training import stages
from llada_jax.training.config import check
from tests.helpers.paths import ROOT


@pytest.mark.parametrize("stage", stages.STAGES)
@pytest.mark.parametrize("model", ["tiny", "smollm2_135m", "llada2_mini"])
def test_a_config_file_is_the_face_of_its_stage(stage, model):
    expected = stages.STAGES[stage](model, length=512)
    file = f"--config={ROOT / 'configs' / f'{stage}.py'}:{model},length=512"
    assert (
        config_flag.load([file]).to_json() == expected.to_json() == stages.parse(stage, f"{model},length=512").to_json()
    )
    assert expected.stage == stage and expected.data.length == 512 and expected.is_locked
    expected.init_from = "/of/the/stage/before"
    expected.evaluation.block_sizes = (1, 32)
    expected.rl.questions = "reasoning_gym:number_filtering"
    check(expected)


def test_defaults():
    assert stages.parse("sft").to_json() == stages.sft("init_from").to_json() == stages.parse("sft", "").to_json()
    assert stages.parse("wsd").to_json() == stages.wsd("tiny").to_json()
    assert (stages.wsd("smollm2_135m").data.length, stages.sft("smollm2_135m").data.length) == (4096, 2048)
    assert stages.dpo(steps=7).schedule.steps == 7


@pytest.mark.parametrize(
    "stage, argument, said",
    [
        ("sft", "tiny,rows=3", "config argument: unknown option 'rows'; options: length, steps"),
        ("wsd", "tiny,steps=3", "config argument: unknown option 'steps'; options: length"),
        ("cap", "tiny,length=x", "config argument: 'length=x', expected option=INTEGER"),
        ("dpo", "tiny,length", "config argument: 'length', expected option=INTEGER"),
        ("ar", "huge", "config: unknown model 'huge'; presets: tiny,"),
    ],
)
def test_bad_arguments(stage, argument, said):
    with pytest.raises(InputError) as caught:
        stages.parse(stage, argument)
    assert str(caught.value).startswith(said)
