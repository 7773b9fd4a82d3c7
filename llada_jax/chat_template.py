"""Chat templates: finds those in a tokenizer's files and renders them, both as transformers does."""

import contextlib
import datetime
import functools
import json
from collections.abc import Iterator, Mapping

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from llada_jax.errors import InputError

DEFAULT, TOOL_USE = "default", "tool_use"  # the names of templates; the second is for conversations with tools
MORE = "additional_chat_templates/"  # where transformers 5 keeps those with other names, as NAME.jinja
# The date that templates see. It is fixed, so that a conversation has one text; it is also the default of Llama 3's
# templates.
DATE = datetime.date(2024, 7, 26)


def find(files: Mapping[str, bytes], config: dict, processor: dict, place: str) -> dict[str, str]:
    """{name: template} from a tokenizer's files: .jinja files, else chat_template.json, else tokenizer_config.json.

    config, processor: the parsed tokenizer_config.json and chat_template.json. Raises InputError naming `place` and the
    file.
    """
    jinja_files = {DEFAULT: "chat_template.jinja"} if "chat_template.jinja" in files else {}
    jinja_files |= {
        name.removeprefix(MORE).removesuffix(".jinja"): name for name in sorted(files) if name.startswith(MORE)
    }
    if jinja_files:
        return {name: _decode(files[file], f"{place}/{file}") for name, file in jinja_files.items()}
    given = {"chat_template.json": processor, "tokenizer_config.json": config}
    file = next((file for file, value in given.items() if value.get("chat_template")), None)
    if file is None:
        return {}
    value = given[file]["chat_template"]
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    templates = value if isinstance(value, dict) else {DEFAULT: value}
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise InputError(f"{place}/{file}: chat_template is neither a text nor named texts")
    return templates


def choose(templates: Mapping[str, str], tools: bool) -> str | None:
    """The template for a conversation with or without tools; None if there is none.

    Raises InputError if none of several is the default one.
    """
    for name in (TOOL_USE, DEFAULT) if tools else (DEFAULT,):
        if name in templates:
            return templates[name]
    if templates:
        raise InputError(f"chat template: none of {', '.join(sorted(templates))} is for a conversation without tools")
    return None


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """Compiles a template, cached. Raises InputError if it is malformed."""
    with _errors():
        return _environment().from_string(source)


def render(template: jinja2.Template, variables: dict, date: datetime.date) -> str:
    """Renders the template. Raises InputError if it rejects the variables."""
    with _errors():
        return template.render(strftime_now=date.strftime, **variables)


def asks_for_the_date(source: str) -> bool:
    """Whether the template may write the current date. Raises InputError if it is malformed."""
    with _errors():
        return "strftime_now" in jinja2.meta.find_undeclared_variables(_environment().parse(source))


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise InputError(f"chat template: {error}") from error


@functools.cache
def _environment() -> jinja2.Environment:
    """A jinja environment with the settings and helpers of transformers, for which templates are written."""
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
    return environment


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %}, which marks the assistant's text; it prints its body."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8") from error
