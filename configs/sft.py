"""Supervised fine-tuning (Eq. 5): block diffusion with noise on the response only, complementary masks, a rate band.

    python tools/pack_data.py --kind=chat --source=CHATS --tokenizer=CHECKPOINT --out=ROWS --length=2048
    python -m llada_jax.train --config=configs/sft.py --workdir=DIR --config.init_from=CHECKPOINT \
        --config.data.path=ROWS

trains the model that CHECKPOINT holds, of whatever size; configs/sft.py:MODEL names a preset that it must be.
CHATS holds JSONL of {"messages": [{"role": ..., "content": ...}, ...]}. Each row is trained under a mask and under its
complement, so that every response token is supervised exactly once per step. The paper gives neither the band nor the
weight that its code uses; the band is that of the authors' released trainer, [0.3, 0.8], the weight is the paper's 1/t
(--config.objective.time_weight=uniform is the trainer's). Options: length (tokens per row), steps.

Low-rank adapters instead of all weights, in this stage or in any that starts from a checkpoint:

    --config.lora.rank=16 --config.lora.alpha=32 --config.optimizer.learning_rate=1e-4

adapts every dense projection (--config.lora.targets="('query','value')" only those); routed experts, router, embeddings
and norms stay as they are, and gradients and optimizer state exist for the adapters alone. A step then holds adapters
and names CHECKPOINT, which must stay where it is; to sample, evaluate, export and init_from it is the adapted model.
"""

from llada_jax.training import stages


def get_config(argument=None):
    return stages.parse("sft", argument)
