#!/usr/bin/env bash
# reasoning-gym 0.1.25 (PyPI): three tasks' questions of one seed, in two processes.
#
# Expected: create_dataset(name, seed=1) is the same data set in every process, as for the other tasks.
# Seen: isomorphic_strings, polynomial_multiplication and ransom_note go through sets of strings, so that their
# questions follow PYTHONHASHSEED, which Python draws anew in every process unless it is set:
#   isomorphic_strings 59b3aebbc7 e08705d4e8
#   polynomial_multiplication a945ce2310 d551087aaa
#   ransom_note de342b5b43 0ca2eaf4e5
#   number_filtering eb351ad874 eb351ad874
# A resumed run, a second host, or a second evaluation asks something else under the same seed.
#
# Exits with 0 while it behaves so, with 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'reasoning-gym==0.1.25'
cat >"$work/digest.py" <<'PY'
import hashlib
import sys

import reasoning_gym

data = reasoning_gym.create_dataset(sys.argv[1], seed=1, size=8)
print(hashlib.sha256("".join(data[i]["question"] for i in range(8)).encode()).hexdigest()[:10])
PY
differ=0
for task in isomorphic_strings polynomial_multiplication ransom_note number_filtering; do
  first=$(PYTHONHASHSEED=1 "$work/venv/bin/python" "$work/digest.py" "$task")
  second=$(PYTHONHASHSEED=2 "$work/venv/bin/python" "$work/digest.py" "$task")
  echo "$task $first $second"
  [ "$first" = "$second" ] || differ=$((differ + 1))
done
[ "$differ" = 3 ]
