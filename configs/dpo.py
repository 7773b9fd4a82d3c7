"""Direct preference optimisation on the diffusion ELBO (Eq. 7, 8), beta 0.1.

    python tools/pack_data.py --kind=preference --source=PAIRS --tokenizer=CHECKPOINT --out=ROWS --length=2048
    python -m llada_jax.train --config=configs/dpo.py:MODEL --workdir=DIR --config.init_from=SFT_WORKDIR \\
        --config.data.path=ROWS

PAIRS holds JSONL of {"prompt": ..., "chosen": ..., "rejected": ...}, texts or messages. A packed row holds pairs of
adjacent documents, the chosen answer and then the rejected one. CHECKPOINT is the one that SFT packed with. The weights
of init_from are the policy's start and the frozen reference. The paper averages one noise sample a score;
--config.preference.draws=8 averages eight. The learning rate starts at SFT's last, as the paper says: set
--config.optimizer.learning_rate to it. Options: length, steps (as in configs/sft.py).
"""

from llada_jax.training.config import load_sibling


def get_config(argument=None):
    config = load_sibling(__file__, "sft").get_config(argument)
    config.preference.enabled = True
    config.objective.complementary = False
    config.objective.rate_low = 1e-3
    config.objective.rate_high = 1.0
    config.objective.block_origin = "document"  # both answers to a prompt then have the same blocks
    config.optimizer.learning_rate = 1e-6
    return config
