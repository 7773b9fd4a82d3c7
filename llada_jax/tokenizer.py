"""A tokenizer with its chat templates, from the files of a Hugging Face folder or an imported checkpoint."""

import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence

import tokenizers
from etils import epath

from llada_jax import chat_template
from llada_jax.chat_template import compile_template
from llada_jax.errors import InputError
from llada_jax.folder import file_in
from llada_jax.token_text import TokenText

ADD_BOS = {"auto": "auto", "true": True, "false": False}
MASK_NAMES = ("<|mask|>", "<|mask_token|>", "[MASK]")
NEW_MASK = "<|mask|>"
# Files that a checkpoint keeps, so that it can be exported with its original tokenizer.
FILE_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text <-> ids. files: everything it was read from, {file name: content}.

    add_bos: whether documents and bare prompts begin with a beginning of sequence. "auto": as the tokenizer's own
    post-processor says, which is how transformers encodes them; True: always; False: never.
    """

    files: dict[str, bytes]
    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]  # {"eos_token": "<|im_end|>", ...}
    chat_templates: dict[str, str]  # {"default": ..., "tool_use": ...}, as they are named
    template_date: datetime.date = chat_template.DATE  # the current date, for templates
    add_bos: str | bool = "auto"

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Nothing is added; special tokens in the text become their ids."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def with_bos(self, add_bos: str | bool) -> "Tokenizer":
        """This tokenizer with another `add_bos`. Raises InputError on an unknown value, or if there is no beginning of
        sequence to add.
        """
        tokenizer = dataclasses.replace(self, add_bos=parse_add_bos(add_bos))
        if tokenizer.add_bos is True and not tokenizer.document_prefix:
            raise InputError("add_bos=true: the tokenizer has no bos_token (tokenizer_config.json)")
        return tokenizer

    @functools.cached_property
    def document_prefix(self) -> list[int]:
        """The ids with which a document and a bare prompt begin: [bos id] or []."""
        if self.add_bos is False:
            return []
        encoding = self.backend.encode("a", add_special_tokens=True)
        marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        own = [token_id for token_id, _ in itertools.takewhile(lambda entry: entry[1], marked)]
        return [self.bos_id] if self.add_bos is True and not own and self.bos_id is not None else own

    @property
    def adds_bos(self) -> bool:
        """Whether documents and bare prompts begin with a beginning of sequence."""
        return bool(self.document_prefix)

    def encode_document(self, text: str) -> list[int]:
        """Ids of a document or a bare prompt, with `document_prefix`. A text that already begins with a written-out
        beginning of sequence does not get a second one. For the text of a chat template use `encode`.
        """
        return self.begun(self.encode(text))

    def begun(self, ids: list[int]) -> list[int]:
        """The ids with `document_prefix` before them, unless they already begin with it."""
        prefix = self.document_prefix
        return ids if ids[: len(prefix)] == prefix else prefix + ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ids that begin a text; for ids after a prompt use `decode_after`. Unknown ids, as of a padded
        vocabulary, give nothing.
        """
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def decode_after(self, prompt: Sequence[int], ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """What the ids of an answer add to the text of their prompt: the text of both minus the prompt's. With
        SentencePiece-like tokenizers this keeps the space at the beginning of the answer.
        """
        return self.text.text_after(prompt, ids, skip_special_tokens)

    @functools.cached_property
    def text(self) -> TokenText:
        """Text and bytes of tokens inside a text, such as answers after their prompts."""
        named = (self._special_id(name) for name in self.special_tokens)
        return TokenText(self.backend, [i for i in named if i is not None])

    def id_to_token(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding is often padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_id(self) -> int | None:
        return self._special_id("eos_token")

    @functools.cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """All ends of sequence in the files: eos_id, other ends of a turn, and those of generation_config.json."""
        named = [self._special_id(name) for name in ("eos_token", "eot_token", "eom_token")]
        listed = read_json(self.files, "generation_config.json").get("eos_token_id")
        named += listed if isinstance(listed, list) else [listed]
        return tuple(dict.fromkeys(i for i in named if type(i) is int and i >= 0))

    @property
    def bos_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def pad_id(self) -> int | None:
        return self._special_id("pad_token")

    @functools.cached_property
    def mask_id(self) -> int | None:
        """The declared mask token, else an added token named as in MASK_NAMES, else None."""
        declared = self._special_id("mask_token")
        if declared is not None:
            return declared
        added = {token.content: token_id for token_id, token in self.backend.get_added_tokens_decoder().items()}
        return next((added[name] for name in MASK_NAMES if name in added), None)

    @functools.cached_property
    def text_ids(self) -> frozenset[int]:
        """Ids of the tokens that texts are made of: not of those marked as special, nor of those with a role."""
        added = self.backend.get_added_tokens_decoder().items()
        named = {self._special_id(name) for name in self.special_tokens}
        special = {token_id for token_id, token in added if token.special} | {*self.eos_ids, self.mask_id} | named
        return frozenset(self.backend.get_vocab(with_added_tokens=True).values()) - special

    @functools.cached_property
    def digest(self) -> str:
        """sha256 (hex) over the names and contents of the files."""
        digest = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def identity(self, chat: bool) -> str:
        """sha256 (hex) over everything that changes the ids of a text and, with `chat`, the text of a conversation.

        The formatting of the files and settings that only decoding uses (generation_config.json) do not count.
        """
        meant = [json.loads(self.backend.to_str()), self.eos_id, self.bos_id]
        if chat:
            meant += [self.special_tokens, self.chat_templates]
        return hashlib.sha256(json.dumps(meant, sort_keys=True, default=repr).encode()).hexdigest()

    @property
    def chat_template(self) -> str | None:
        """The template for conversations without tools."""
        return self.chat_templates.get(chat_template.DEFAULT)

    @functools.cached_property
    def asks_for_the_date(self) -> bool:
        """Whether a chat template may write `template_date`."""
        return any(map(chat_template.asks_for_the_date, self.chat_templates.values()))

    def apply_chat_template(
        self,
        messages: Sequence[dict],
        add_generation_prompt: bool = True,
        tools: Sequence[dict] | None = None,
        **kwargs,
    ) -> str:
        """Text of a conversation, [{"role": ..., "content": ...}, ...]; kwargs: variables of the template.

        Does not check that the text contains all of it; data/chat.py does. Raises InputError if there is no template or
        it rejects the messages.
        """
        source = chat_template.choose(self.chat_templates, bool(tools))
        if source is None:
            raise InputError("the tokenizer has no chat template (chat_template in tokenizer_config.json)")
        variables = {"documents": None} | self.special_tokens | kwargs
        variables |= {"messages": messages, "tools": tools or None, "add_generation_prompt": add_generation_prompt}
        return chat_template.render(compile_template(source), variables, self.template_date)

    def with_template_date(self, day: str) -> "Tokenizer":
        """This tokenizer with another template_date, YYYY-MM-DD.

        Raises InputError if `day` is not a date, or if no template writes one.
        """
        try:
            date = datetime.date.fromisoformat(day)
        except ValueError as error:
            raise InputError(f"template_date {day!r} is not a date, YYYY-MM-DD") from error
        if not self.asks_for_the_date:
            raise InputError(f"template_date {day}: the chat template writes no date")
        return dataclasses.replace(self, template_date=date)

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)


def parse_add_bos(value: str | bool) -> str | bool:
    """The add_bos of a flag or config as a value of ADD_BOS. Raises InputError on an unknown one."""
    if isinstance(value, bool | str) and (name := str(value).lower()) in ADD_BOS:
        return ADD_BOS[name]
    raise InputError(f"add_bos={value!r}, expected {', '.join(ADD_BOS)}")


def trained_with(lineage: dict | None) -> str | bool:
    """The add_bos of the latest training run in a checkpoint's lineage that set one; "auto" without one."""
    while isinstance(lineage, dict):
        chosen = lineage.get("config", {}).get("data", {}).get("add_bos", "auto")
        if chosen != "auto":
            return parse_add_bos(chosen)
        lineage = lineage.get("source")
    return "auto"


def load_tokenizer(directory: str) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or of an imported checkpoint (its tokenizer/ folder).

    Raises InputError naming the folder or file that is missing or cannot be read.
    """
    folder, add_bos = epath.Path(directory), "auto"
    if (folder / "tokenizer" / "tokenizer.json").is_file():
        if (config := folder / "config.json").is_file():
            files = {"config.json": config.read_bytes()}
            add_bos = trained_with(read_json(files, "config.json", directory).get("lineage"))
        folder = folder / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{directory}: no tokenizer.json")
    return from_files(read_files(folder), str(folder)).with_bos(add_bos)


def read_files(folder: epath.Path) -> dict[str, bytes]:
    """The tokenizer's files in a folder; {} without tokenizer.json."""
    if not file_in(folder, "tokenizer.json").is_file():
        return {}
    more = file_in(folder, chat_template.MORE.rstrip("/"))
    try:
        templates = sorted(path.name for path in more.iterdir() if path.suffix == ".jinja") if more.is_dir() else []
        names = [*FILE_NAMES, *(chat_template.MORE + name for name in templates)]
        paths = {name: file_in(folder, name) for name in names}
        return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error


def from_files(files: dict[str, bytes], place: str = "tokenizer") -> Tokenizer:
    """Tokenizer from {file name: content}. Raises InputError naming `place` and the file."""
    try:
        backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{place}/tokenizer.json: {error}") from error
    # A file may carry the truncation and padding of somebody's last call.
    backend.no_truncation()
    backend.no_padding()
    config = read_json(files, "tokenizer_config.json", place)
    named = read_json(files, "special_tokens_map.json", place) | config
    special = {name: _content(value) for name, value in named.items() if name.endswith("_token")}
    special = {name: token for name, token in special.items() if isinstance(token, str)}
    templates = chat_template.find(files, config, read_json(files, "chat_template.json", place), place)
    return Tokenizer(files, backend, special, templates)


def read_json(files: dict[str, bytes], name: str, place: str = "tokenizer") -> dict:
    """A JSON object among the files, {} if absent. Raises InputError if it is malformed."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}/{name}: malformed JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{place}/{name}: not a JSON object")
    return value


def _content(token):
    return token.get("content") if isinstance(token, dict) else token


def with_mask(files: dict[str, bytes], token_id: int) -> dict[str, bytes]:
    """The files with `token_id` as the mask token: under its existing name, else as a new special token "<|mask|>".

    Raises InputError if the tokenizer cannot hold a token with that id.
    """
    old = from_files(files)
    name = old.id_to_token(token_id) or NEW_MASK
    entry = {"content": name, "lstrip": False, "normalized": False, "rstrip": False}
    entry |= {"single_word": False, "special": True}
    files = dict(files)
    if old.id_to_token(token_id) is None:
        files["tokenizer.json"] = _dump(_insert(read_json(files, "tokenizer.json"), entry, token_id))
    config = read_json(files, "tokenizer_config.json") | {"mask_token": name}
    if isinstance(config.get("added_tokens_decoder"), dict):
        config["added_tokens_decoder"] = config["added_tokens_decoder"] | {str(token_id): entry}
    files["tokenizer_config.json"] = _dump(config)
    for file, change in (("special_tokens_map.json", {"mask_token": name}), ("added_tokens.json", {name: token_id})):
        if file in files:
            files[file] = _dump(read_json(files, file) | change)
    new = from_files(files)
    if new.mask_id != token_id or not old.backend.get_vocab().items() <= new.backend.get_vocab().items():
        raise InputError(f"this tokenizer cannot hold a mask token of id {token_id}")
    return files


def _insert(tokenizer: dict, entry: dict, token_id: int) -> dict:
    """tokenizer.json with one more added token.

    The library numbers added tokens consecutively after the model's vocabulary and ignores the ids in the file, unless
    that vocabulary contains the tokens. So if the id is not the next one, all added tokens are written there.
    """
    added = [*tokenizer.get("added_tokens", ()), {"id": token_id} | entry]
    model = tokenizer["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict) and token_id != max([*vocabulary.values(), *(t["id"] for t in added[:-1])]) + 1:
        vocabulary = {token["content"]: token["id"] for token in added} | vocabulary
        model = model | {"vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1]))}
    return tokenizer | {"added_tokens": sorted(added, key=lambda token: token["id"]), "model": model}


def _dump(value: dict) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
