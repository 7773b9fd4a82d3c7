import pytest

from llada_jax.data import chat
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.errors import InputError

EOS = 256
TOKENIZER = byte_tokenizer(EOS)


def read(row, turns="all"):
    return [(found.ids.tolist(), found.spans) for found in chat.prepare(row, TOKENIZER, turns)]


@pytest.mark.parametrize(
    "name", ["supervised", "completion_mask", "assistant_masks", "assistant_mask", "loss_mask", "weights"]
)
@pytest.mark.parametrize("values", [[0, 1, 1, 0], [False, True, True, False], [0.0, 1.0, 1.0, 0.0]])
def test_every_name_of_what_is_supervised(name, values):
    assert read({"input_ids": [1, 2, 3, 4], name: values}) == [([1, 2, 3], [(1, 3)])]


PAD = {"input_ids": [EOS, EOS, 1, 2, 3, EOS], "attention_mask": [0, 0, 1, 1, 1, 0]}


@pytest.mark.parametrize(
    "mask",
    [{"labels": [-100, -100, -100, 2, 3, -100]}, {"loss_mask": [0, 0, 0, 1, 1, 0]}, {"weights": [0, 0, 0, 1, 1, 0]}],
)
@pytest.mark.parametrize("turns", ["all", "last", "each"])
def test_padding_at_either_end_is_left_out(mask, turns):
    assert read(PAD | mask, turns) == [([1, 2, 3], [(1, 3)])]


def test_padding_at_the_right_of_a_prompt_length():
    row = {"input_ids": [1, 2, 3, EOS, EOS], "prompt_length": 1}
    assert read(row | {"attention_mask": [True, True, True, False, False]}) == [([1, 2, 3], [(1, 3)])]
    assert read(row | {"attention_mask": [1] * 5}) == [([1, 2, 3, EOS, EOS], [(1, 5)])]
    assert read({"input_ids": [1], "labels": [-100], "attention_mask": [0]}) == []


def test_what_says_nothing_new_is_taken():
    row = PAD | {"labels": [-100, -100, -100, 2, 3, -100], "position_ids": [1, 1, 0, 1, 2, 1], "id": 3}
    assert read(row | {"token_type_ids": [0] * 6}) == [([1, 2, 3], [(1, 3)])]
    assert read(row | {"weight": 1}) == read(row) and read(row | {"weight": 0}) == []


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"attention_mask": [1, 0, 1]}, "attention_mask has a 0 between two 1"),
        ({"attention_mask": [1, 1]}, "attention_mask is not a list of 3 entries"),
        ({"attention_mask": [1, 2, 1]}, "attention_mask holds something else than true and false"),
        ({"attention_mask": [1, 1, 0]}, "attention_mask is 0 at a token that is supervised"),
        ({"position_ids": [3, 4, 5]}, "position_ids cannot be honoured"),
        ({"position_ids": [0, 1, 0]}, "position_ids cannot be honoured"),
        ({"token_type_ids": [0, 0, 1]}, "token_type_ids cannot be honoured"),
        ({"segment_ids": [1, 1, 2]}, "segment_ids cannot be honoured"),
        ({"seq_lengths": [1, 2]}, "seq_lengths cannot be honoured"),
        ({"loss_mask": [0, 0, 1]}, "input_ids comes with labels and loss_mask"),
        ({"weight": 0.5}, "weight 0.5 is neither 0 nor 1"),
        ({"loss_weights": [1, 1, 1]}, "loss_weights cannot be honoured"),
    ],
)
def test_what_cannot_be_honoured_is_named(more, reason):
    with pytest.raises(InputError) as caught:
        read({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]} | more)
    assert reason in str(caught.value)


def test_values_between_and_left_padding_of_a_prompt_length():
    with pytest.raises(InputError, match="weights holds something else"):
        read({"input_ids": [1, 2], "weights": [0, 0.5]})
    with pytest.raises(InputError, match="attention_mask pads at the left, where prompt_length counts tokens"):
        read({"input_ids": [EOS, 1, 2], "attention_mask": [0, 1, 1], "prompt_length": 2})
