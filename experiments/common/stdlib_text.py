"""Writes real text that every machine has: the sources and docstrings of this Python's standard library.

python experiments/common/stdlib_text.py OUT            ->  OUT/stdlib.jsonl, one module per line
python experiments/common/stdlib_text.py OUT packages   ->  also OUT/packages.jsonl, the installed packages
"""

import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterable
from pathlib import Path

_SKIPPED = {
    "site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data",
}  # fmt: skip
_SHORTEST = 500  # characters of a package's module: most shorter ones are imports alone


def main(out: Path, packages: bool = False) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    out.mkdir(parents=True, exist_ok=True)
    modules = sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py"))
    _write(out / "stdlib.jsonl", (path for path in modules if path.parent.name not in _SKIPPED), library)
    if packages:
        site = Path(sysconfig.get_paths()["purelib"])
        own = (path for path in sorted(site.rglob("*.py")) if not _SKIPPED & set(path.relative_to(site).parts))
        _write(out / "packages.jsonl", own, site, _SHORTEST)


def _write(target: Path, modules: Iterable[Path], root: Path, shortest: int = 0) -> None:
    """One line per module. With `shortest`, only texts of at least so many characters, each once. Files that are not
    Python text are left out.
    """
    temporary = target.with_name(target.name + ".partial")
    seen, count = set(), 0
    with open(temporary, "w", encoding="utf-8") as f:
        for path in modules:
            try:
                with tokenize.open(path) as source:  # honours the module's encoding line
                    text = source.read()
            except (SyntaxError, UnicodeDecodeError):
                continue
            if shortest and (len(text) < shortest or text in seen):
                continue
            seen.add(text)
            count += 1
            f.write(json.dumps({"text": text, "path": str(path.relative_to(root))}) + "\n")
    temporary.replace(target)
    print(f"{count} modules of Python {sys.version.split()[0]} -> {target}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["packages"]):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), bool(sys.argv[2:]))
