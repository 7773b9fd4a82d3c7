"""Writes real text that every machine has: the sources and docstrings of this Python's standard library.

python experiments/stdlib_text.py OUT_DIR   ->  OUT_DIR/stdlib.jsonl, one module a line
"""

import json
import sys
import sysconfig
import tokenize
from pathlib import Path


def main(out: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    out.mkdir(parents=True, exist_ok=True)
    modules = sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py"))
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"}
    temporary = out / "stdlib.jsonl.partial"
    count = 0
    with open(temporary, "w", encoding="utf-8") as f:
        for path in modules:
            if path.parent.name in skipped:
                continue
            with tokenize.open(path) as source:  # honours the module's encoding line
                text = source.read()
            f.write(json.dumps({"text": text, "path": str(path.relative_to(library))}) + "\n")
            count += 1
    temporary.replace(out / "stdlib.jsonl")
    print(f"{count} modules of Python {sys.version.split()[0]} -> {out / 'stdlib.jsonl'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
