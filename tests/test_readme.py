"""The READMEs: short, in short sentences, and every path, link, command, flag and public name in them is there."""

import ast
import functools
import inspect
import re
from pathlib import Path

import pytest

import llada_jax
from tests.helpers.paths import ROOT

FRONT = ROOT / "README.md"
PAGES = [
    FRONT,
    *(p for top in ("llada_jax", "configs", "experiments") for p in sorted((ROOT / top).rglob("README.md"))),
]
MOST_LINES, MOST_WORDS, MOST_WORDS_OF_A_SENTENCE = 150, 1500, 40
FOREIGN = {"model", "model_args", "tasks", "batch_size", "soak", "help"}  # flags of lm-eval, pytest and absl
COMMAND = re.compile(r"\b(?:python|bash) (-m [\w.]+|[\w/.-]+\.(?:py|sh))([^`\n]*)")
FLAG = re.compile(r"(?<![\w-])--([a-z][\w.]*)")
SAMPLE = re.compile(r"[\w.-]+(?:/[\w.-]+)*(?:\.(?:py|sh|md|svg|lock|json|jsonl)|/)")

of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(text: str) -> list[str]:
    """The sentences of a page: no code, no tables, no headings."""
    text = re.sub(r"```.*?```|<!--.*?-->", "\n\n", text, flags=re.DOTALL)
    lines = [("\n\n" if re.match(r"( {4}|\||#|!\[)", line) else line) for line in text.splitlines()]
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:-|\d+\.) )", "\n".join(lines))
    return [s for p in paragraphs for s in re.split(r"(?<=[.:?!])[*)]*\s+(?=[A-Z*`\[(0-9])", p.strip()) if s]


def commands(text: str) -> list[tuple[str, str]]:
    """(script or "-m module", what follows) of every command in code and in backticks; continued lines are one."""
    return COMMAND.findall(text.replace("\\\n", " "))


@functools.cache
def flags_of(file: Path) -> frozenset[str]:
    """Names of the flags that a script and the modules it imports define."""
    text = file.read_text()
    flags = set(re.findall(r"""(?:DEFINE_\w+|add_argument)\(\s*["'](?:--)?([\w-]+)["']""", text))
    flags |= {"config"} if "DEFINE_config_file" in text else set()
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        module = getattr(node, "module", None)
        for name in names:
            dotted = f"{module}.{name}" if module else name
            for target in (dotted, module or name):
                for folder in (ROOT, file.parent):
                    path = folder / (target.replace(".", "/") + ".py")
                    if path.exists() and path != file:
                        flags |= _defined_in(path)
    return frozenset(flags)


@functools.cache
def _defined_in(path: Path) -> set[str]:
    return set(re.findall(r"""DEFINE_\w+\(\s*["']([\w-]+)["']""", path.read_text()))


@functools.cache
def config_keys() -> frozenset[str]:
    """ "KEY", "SECTION.KEY" and "SECTION" of the training config, by the page that is generated from it."""
    keys = set(re.findall(r"^\| `([\w.]+)` \|", (ROOT / "configs" / "README.md").read_text(), re.MULTILINE))
    return frozenset(keys | {key.partition(".")[0] for key in keys})


def known_flags() -> set[str]:
    files = [f for top in ("llada_jax", "tools", "experiments") for f in (ROOT / top).rglob("*.py")]
    return set().union(*map(flags_of, files)) | FOREIGN


def script(name: str) -> Path:
    return ROOT / (name.removeprefix("-m ").replace(".", "/") + ".py" if name.startswith("-m ") else name)


def test_the_front_page_is_short():
    text = FRONT.read_text()
    assert len(text.splitlines()) <= MOST_LINES and len(text.split()) <= MOST_WORDS


@of_each_page
def test_sentences_are_short(page):
    long = [s for s in prose(page.read_text()) if len(s.split()) > MOST_WORDS_OF_A_SENTENCE]
    assert not long, "\n".join(long)


def test_a_long_sentence_is_found():
    text = (
        "# "
        + "word " * 50
        + "\n\nShort one. The "
        + "word " * 40
        + "end.\n- An item\n\n| "
        + "cell " * 50
        + "|\n\n    code\n"
    )
    assert [len(s.split()) for s in prose(text)] == [2, 42, 3]


@of_each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target


@of_each_page
def test_files_in_backticks_are_there(page):
    for name in re.findall(r"`([^`\s]+)`", page.read_text()):
        if not SAMPLE.fullmatch(name) or ("/" not in name and name.endswith((".json", ".jsonl"))):
            continue  # a file without a folder and of data: one that a run writes
        if name.startswith(("runs/", "checkpoints/")):
            continue
        places = (page.parent / name, ROOT / name, ROOT / "tools" / name)
        assert any(place.exists() for place in places), name


@of_each_page
def test_commands_and_their_flags_are_there(page):
    for name, rest in commands(page.read_text()):
        if name in ("-m pytest", "-m venv"):
            continue
        file = script(name)
        assert file.exists(), name
        if file.suffix != ".py":
            continue
        own, _, trainer = rest.partition(" -- ")
        for text, of in ((own, file), (trainer, script("-m llada_jax.train"))):
            found = {flag for flag in FLAG.findall(text) if not flag.startswith("config.")}
            known = flags_of(of) | (FOREIGN)
            assert found <= known, f"{name}: {sorted(found - known)}"


@of_each_page
def test_flags_config_keys_and_config_files_are_there(page):
    text = page.read_text()
    for flag in FLAG.findall(text):
        if flag.startswith("config."):
            key = flag.removeprefix("config.").rstrip(".")
            assert key in config_keys() or key in ("a.b", "SECTION.KEY"), flag
        else:
            assert flag in known_flags(), flag
    for file in re.findall(r"--config=([\w/]+\.py)", text):
        assert (ROOT / file).exists(), file


def test_the_python_example_calls_what_there_is():
    examples = re.findall(r"```python\n(.*?)```", FRONT.read_text(), re.DOTALL)
    calls = [n for example in examples for n in ast.walk(ast.parse(example)) if isinstance(n, ast.Call)]
    ours = [n for n in calls if isinstance(n.func, ast.Attribute) and ast.unparse(n.func.value) == "llada_jax"]
    assert len(ours) >= 5
    for call in ours:
        signature = inspect.signature(getattr(llada_jax, call.func.attr))
        signature.bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})


def test_every_room_of_the_front_page_is_a_folder_and_every_folder_is_there():
    tree = re.search(r"## Where is what\n(.*?)\n## ", FRONT.read_text() + "\n## ", re.DOTALL)[1]
    named = set(re.findall(r"^ {6}(\w+)/", tree, re.MULTILINE))
    assert named == {path.parent.name for path in (ROOT / "llada_jax").glob("*/__init__.py")}
