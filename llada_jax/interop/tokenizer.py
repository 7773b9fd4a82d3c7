"""A tokenizer and its chat template, read from the files of a Hugging Face folder or of a converted checkpoint."""

import dataclasses
import datetime
import functools
import hashlib
import json
from collections.abc import Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from etils import epath

from llada_jax.errors import InputError
from llada_jax.interop.folder import file_in

MASK_NAMES = ("<|mask|>", "<|mask_token|>", "[MASK]")
NEW_MASK = "<|mask|>"
# What a checkpoint keeps, so that it can be exported with the tokenizer that it came with.
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
    """Text <-> ids. `files` is everything it was read from: {file name: content}."""

    files: dict[str, bytes]
    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]  # {"eos_token": "<|im_end|>", ...}
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Nothing is added; special tokens written out in the text become their ids."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ids; ids that the tokenizer does not know (a padded vocabulary has some) give nothing."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

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
    def digest(self) -> str:
        """sha256 (hex) over the names and contents of the files."""
        digest = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def identity(self, chat: bool) -> str:
        """sha256 (hex) over what changes the ids of a text and, of `chat`, the text of a conversation.

        How the files are written, and what of them only decoding uses (generation_config.json), does not count.
        """
        meant = [json.loads(self.backend.to_str()), self.eos_id, self.bos_id]
        if chat:
            meant += [self.special_tokens, self.chat_template]
        return hashlib.sha256(json.dumps(meant, sort_keys=True, default=repr).encode()).hexdigest()

    def apply_chat_template(self, messages: Sequence[dict], add_generation_prompt: bool = True, **kwargs) -> str:
        """Text of a conversation, [{"role": ..., "content": ...}, ...]; kwargs are variables of the template.

        Raises InputError if there is no template or it rejects the messages.
        """
        if self.chat_template is None:
            raise InputError("the tokenizer has no chat template (chat_template in tokenizer_config.json)")
        variables = {"tools": None, "documents": None} | self.special_tokens | kwargs
        try:
            template = _template(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(f"chat template: {error}") from error

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)


def load_tokenizer(directory: str) -> Tokenizer:
    """Tokenizer of a Hugging Face folder or of a converted checkpoint (its tokenizer/ folder).

    Raises InputError naming the folder or file if there is none or it cannot be read.
    """
    folder = epath.Path(directory)
    if (folder / "tokenizer" / "tokenizer.json").is_file():
        folder = folder / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{directory}: no tokenizer.json")
    return from_files(read_files(folder), str(folder))


def read_files(folder: epath.Path) -> dict[str, bytes]:
    """The tokenizer's files in a folder; {} without tokenizer.json."""
    if not file_in(folder, "tokenizer.json").is_file():
        return {}
    paths = {name: file_in(folder, name) for name in FILE_NAMES}
    try:
        return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error


def from_files(files: dict[str, bytes], where: str = "tokenizer") -> Tokenizer:
    """Tokenizer from {file name: content}. Raises InputError naming `where` and the file."""
    try:
        backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{where}/tokenizer.json: {error}") from error
    # A file may carry the truncation and padding of somebody's last call.
    backend.no_truncation()
    backend.no_padding()
    config = read_json(files, "tokenizer_config.json", where)
    named = read_json(files, "special_tokens_map.json", where) | config
    special = {name: _content(value) for name, value in named.items() if name.endswith("_token")}
    special = {name: token for name, token in special.items() if isinstance(token, str)}
    return Tokenizer(files, backend, special, _find_chat_template(files, config, where))


def read_json(files: dict[str, bytes], name: str, where: str = "tokenizer") -> dict:
    """A JSON object among the files, {} if absent. Raises InputError if it is malformed."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}/{name}: malformed JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}/{name}: not a JSON object")
    return value


def _content(token):
    return token.get("content") if isinstance(token, dict) else token


def _find_chat_template(files: dict[str, bytes], config: dict, where: str) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    template = read_json(files, "chat_template.json", where).get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def with_mask(files: dict[str, bytes], token_id: int) -> dict[str, bytes]:
    """The files with `token_id` as the mask token: under the name it has, else as a new special token "<|mask|>".

    Raises InputError if the tokenizer cannot hold a token of that id.
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

    The library numbers added tokens consecutively after the model's vocabulary, whatever ids the file states, unless
    the model's vocabulary holds them: so with an id that is not the next, all of them are written there.
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


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks what the assistant says; it prints its body."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=16)
def _template(source: str) -> jinja2.Template:
    """Compiled with the settings and helpers of transformers, which templates are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter escapes HTML.
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
