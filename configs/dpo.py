"""Direct preference optimisation on the diffusion ELBO (Eq. 7, 8), beta 0.1.

    python tools/pack_data.py --kind=preference --source=PAIRS --tokenizer=CHECKPOINT --out=ROWS --length=2048
    python -m llada_jax.train --config=configs/dpo.py --workdir=DIR --config.init_from=SFT_WORKDIR \\
        --config.data.path=ROWS

PAIRS holds JSONL of {"prompt": ..., "chosen": ..., "rejected": ...}, texts or messages. A packed row holds pairs of
adjacent documents, the chosen answer and then the rejected one. CHECKPOINT is the one that SFT packed with. The weights
of init_from are the policy's start and the frozen reference. The paper averages one noise sample per score;
--config.preference.draws=8 averages eight. --config.preference.reference=precomputed scores all steps by the reference
before the first one, into DIR/reference_scores.bin, and then trains without the second model; with other settings they
are scored again, or refused once a step is saved. The learning rate starts at SFT's last, as the paper says, without a
warm-up: it is read from the step that init_from stands for. An init_from that no run of ours has written needs
--config.optimizer.learning_rate=R. Options: length, steps (as in configs/sft.py).
"""

from llada_jax.training import stages


def get_config(argument=None):
    return stages.parse("dpo", argument)
