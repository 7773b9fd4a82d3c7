"""Reinforcement learning on verifiable rewards: EBPO, or the sampler's own trajectories.

    python -m llada_jax.train --config=configs/rl.py --workdir=DIR --config.init_from=SFT_WORKDIR \\
        --config.rl.questions=reasoning_gym:number_filtering

A step answers batch.rows / rl.group questions, rl.group times each, and updates the weights by how the answers score.
Questions are those of a reasoning-gym task, as many as are needed, or of a JSONL file. Rewards are the task's own, an
exact match, a pattern, programs that pass tests, or --config.rl.reward=FILE.py:FUNCTION.
--config.rl.estimator=trajectory replays what the sampler did. data.length is the room for a prompt and its answer;
schedule.block_size is the block length of decoding. LLaDA2.1 publishes no values: the
learning rate (1e-6) is ours, and N = 16 copies are those of DARE's recipe for LLaDA2.0-mini. Options:
length, steps (as in configs/sft.py).
"""

from llada_jax.training import stages


def get_config(argument=None):
    return stages.parse("rl", argument)
