"""The data of the experiment: number filtering from reasoning-gym, and a tokenizer for it.

    python experiments/post_training/task.py FOLDER SEED [TOKENIZER]
    python experiments/post_training/task.py settings      # those of the task, as JSON

"Remove all numbers larger than 4 in this list: ['7', '1', '3', '2', '8'] ..." -> "['1', '3', '2']": an answer can be
checked, and most of its tokens follow from the question alone, so that a model which is sure of itself can write many
at once. Writes to FOLDER

    tokenizer/        byte-level BPE trained on the task, numbers kept apart from text, with a chat template
                      (not when TOKENIZER, a folder or a checkpoint, is given)
    text.jsonl        conversations as plain text, for the AR model and for WSD
    chats.jsonl       other conversations, for SFT and CAP
    questions.jsonl   more questions with their solutions, for preference pairs

none of which has a question of the test; the test has its own seed (run.sh).
"""

import json
import sys
from pathlib import Path

import reasoning_gym
import tokenizers

from llada_jax.data.jsonl import write_values
from llada_jax.tokenizer import Tokenizer, load_tokenizer

NAME = "number_filtering"
SETTINGS = dict(min_numbers=4, max_numbers=12, min_decimals=0, max_decimals=0, min_value=0, max_value=9)
TEST_SEED, TEST_SIZE = 1_000_000_007, 1000
SIZES = {"text": 200_000, "chats": 40_000, "questions": 4_000}
EOS, USER, ASSISTANT, MASK = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|mask|>"
SPECIAL_FROM = 508  # the preset `tiny` has its end of text at 508 and its mask token at 511, of 512
TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}{{ m.content }}"
    "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def questions(seed: int, size: int) -> list[tuple[str, str]]:
    """(question, answer) pairs, a function of the seed."""
    data = reasoning_gym.create_dataset(NAME, seed=seed, size=size, **SETTINGS)
    return [(entry["question"], entry["answer"]) for entry in (data[index] for index in range(size))]


def messages(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def as_text(tokenizer: Tokenizer, question: str, answer: str) -> str:
    """The conversation without its end of sequence, which packing adds."""
    prompt = tokenizer.apply_chat_template(messages(question, answer)[:1], add_generation_prompt=True)
    return prompt + answer


def train_tokenizer(texts, folder: Path) -> None:
    """Byte-level BPE below SPECIAL_FROM, the four special tokens from there."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.Regex(r"'\d+'(?:, )?|\d+|[^'\d]+")
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(split, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=SPECIAL_FROM, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(texts, trainer)
    unused = [f"<|unused_{index}|>" for index in range(model.get_vocab_size(), SPECIAL_FROM)]
    model.add_special_tokens([*unused, EOS, USER, ASSISTANT, MASK])
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    config = {"eos_token": EOS, "pad_token": EOS, "mask_token": MASK, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(folder: str, seed: str, tokenizer_folder: str = "") -> None:
    out = Path(folder)
    test = {question for question, _ in questions(TEST_SEED, TEST_SIZE)}
    total = sum(SIZES.values())
    pairs = [pair for pair in questions(int(seed) * total, total) if pair[0] not in test]
    text = pairs[: SIZES["text"]]
    chats = pairs[len(text) : len(text) + SIZES["chats"]]
    out.mkdir(parents=True, exist_ok=True)
    if not tokenizer_folder:
        train_tokenizer((part for pair in text[:5000] for part in pair), out / "tokenizer")
    tokenizer = load_tokenizer(tokenizer_folder or str(out / "tokenizer"))
    write_values(out / "text.jsonl", ({"text": as_text(tokenizer, *pair)} for pair in text))
    write_values(out / "chats.jsonl", ({"messages": messages(*pair)} for pair in chats))
    rest = pairs[len(text) + len(chats) :]
    write_values(out / "questions.jsonl", ({"messages": messages(q, a)[:1], "solution": a} for q, a in rest))
    print(f"{out}: {len(text)} texts, {len(chats)} conversations, {len(rest)} questions for pairs")


if __name__ == "__main__":
    if sys.argv[1:] == ["settings"]:
        print(json.dumps(SETTINGS))
    else:
        main(*sys.argv[1:])
