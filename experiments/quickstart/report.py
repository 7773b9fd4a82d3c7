"""Prints the table of a quickstart: python experiments/quickstart/report.py before.json after.json"""

import json
import sys
from pathlib import Path


def main(before: Path, after: Path) -> None:
    old, new = (json.loads(path.read_text()) for path in (before, after))
    print("\nheld-out nats per token     before            after")
    for name, entry in old.items():
        if isinstance(entry, dict):
            label = "AR loss" if name == "ar" else f"NELBO, {name}"
            cells = "   ".join(f"{e['nats']:6.3f} ± {e['stderr']:.3f}" for e in (entry, new[name]))
            print(f"  {label:<22} {cells}")
    gap = abs(old["ar"]["nats"] - old["block 1"]["nats"])
    print(f"before training, |NELBO at block size 1 - AR loss| = {gap:.1e} (the same model, seen two ways)")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
