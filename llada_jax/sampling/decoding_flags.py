"""The flags of decoding, for every command that samples."""

import contextlib
import sys

from absl import flags

FLAGS = flags.FLAGS
# Of generate_config; --add_bos is the tokenizer's.
NAMES = (
    "gen_length", "block_length", "steps", "threshold", "temperature", "top_k", "top_p", "eos_early_stop", "rule",
    "editing_threshold", "max_post_steps", "entropy_bound", "max_steps_per_block", "delete_id", "insert_id",
    "active_blocks", "add_block_threshold", "semi_complete_threshold",
)  # fmt: skip
flags.disclaim_key_flags()  # they belong to the command that calls define, whose --help lists them


def define(gen_length: int) -> None:
    """Defines them; gen_length is the default of --gen_length."""
    flags.DEFINE_integer("gen_length", gen_length, "Most tokens of an answer.")
    flags.DEFINE_integer("block_length", 32, "Tokens decoded together.")
    flags.DEFINE_integer("steps", 32, "Most steps for a block.")
    flags.DEFINE_float("threshold", 0.95, "Probability above which a token is accepted.")
    flags.DEFINE_float("temperature", 0.0, "0 is argmax.")
    flags.DEFINE_integer("top_k", None, "Draw among the k most probable tokens.")
    flags.DEFINE_float("top_p", None, "Draw from the nucleus of this probability.")
    flags.DEFINE_bool("eos_early_stop", False, "Stop inside a block once the end is written.")
    flags.DEFINE_string(
        "rule",
        "llada2",
        "llada2 | llada2.1 (edits what is written) | llada2.2 (deletes and inserts, too) | sglang | "
        "dinfer | entropy | fixed.",
    )
    flags.DEFINE_float("editing_threshold", 0.5, "llada2.1, llada2.2: probability above which a token is edited.")
    flags.DEFINE_integer("max_post_steps", 16, "llada2.1, llada2.2: most steps after a block is full.")
    flags.DEFINE_integer("max_steps_per_block", 1000, "llada2.2: most steps for a block, edits included.")
    flags.DEFINE_integer("delete_id", None, "llada2.2: the token that deletes. Default: the checkpoint's.")
    flags.DEFINE_integer("insert_id", None, "llada2.2: the token that inserts. Default: the checkpoint's.")
    flags.DEFINE_float("entropy_bound", 0.15, "entropy: nats that a step may write, its largest not counted.")
    flags.DEFINE_integer("active_blocks", 1, "Blocks decoded at once, 1 to 4: of models that were trained for it.")
    flags.DEFINE_float(
        "add_block_threshold",
        0.1,
        "active_blocks: share of the last one that must be written before one more is added.",
    )
    flags.DEFINE_float(
        "semi_complete_threshold", 0.9, "active_blocks: share of a block that must be written before each step must "
        "write something in the next.",
    )  # fmt: skip
    flags.DEFINE_enum(
        "add_bos", None, ["auto", "true", "false"], "Begin texts and prompts without chat template with a beginning of "
        "sequence: auto as the tokenizer's post-processor does. Default: as the checkpoint was trained.",
    )  # fmt: skip

    flags.DEFINE_enum(
        "experts_dtype", None, ["int8"], "Keep the weights of routed experts in int8 (llada_jax/sampling/quantize.py). "
        "Default: as they are stored.",
    )  # fmt: skip
    flags.DEFINE_string(
        "mesh", "auto", "How the devices of this host share the work: auto, one (device), or axes: expert=2,tensor=2."
    )


@contextlib.contextmanager
def mesh(config, rows: int):
    """Sets the mesh that --mesh asks for, for a model of this ModelConfig and batches of `rows`, and yields it; None on
    one device. Raises InputError naming the flag.
    """
    import jax

    from llada_jax.sampling import meshes

    chosen = meshes.from_text(FLAGS.mesh, config, rows, jax.local_devices())
    if chosen is None:
        yield None
        return
    print(f"mesh: {meshes.name_of(chosen.shape)} (--mesh)", file=sys.stderr, flush=True)
    with jax.set_mesh(chosen):
        yield chosen


def with_bos(model):
    """Returns a checkpoint.weights.Model with the tokenizer that --add_bos asks for."""
    if FLAGS.add_bos is None or model.tokenizer is None:
        return model
    return model._replace(tokenizer=model.tokenizer.with_bos(FLAGS.add_bos))


def with_experts_dtype(model):
    """Returns a checkpoint.weights.Model with the experts that --experts_dtype asks for; the given one's are deleted.
    Raises InputError for a dense model.
    """
    if FLAGS.experts_dtype is None:
        return model
    from llada_jax.sampling.quantize import quantize_experts  # after the flags are parsed: jax takes seconds

    return model._replace(params=quantize_experts(model.params, model.config, donate=True))


def generate_config():
    """Returns the sampling.generate.GenerateConfig of the flags. Raises InputError naming the field."""
    from llada_jax.sampling.generate import GenerateConfig  # after the flags are parsed: jax takes seconds

    return GenerateConfig(**{name: FLAGS[name].value for name in NAMES})
