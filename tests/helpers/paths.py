"""Where the tests find things, and how the goldens of decoding are named."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "data" / "goldens"
GEN_KEY = re.compile(r"gen_p(\d+)_g(\d+)_b(\d+)_s(\d+)_t([\d.]+)_e(\d)_eos(\d+)")
EDIT_KEY = re.compile(r"edit_p(\d+)_g(\d+)_b(\d+)_t([\d.]+)_et([\d.]+)_ps(\d+)_e(\d)_eos(\d+)")
