"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x W + (alpha / rank) (x A) B, where A and B train and W does not.

The term is added in activation space (`layers.project`), so that no gradient of W's size exists; an adapter is two
more weights beside its own, "query_lora_a" and "query_lora_b", declared from it (model/declarations.py).
"""

import dataclasses

from llada_jax.errors import check_range
from llada_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of a model. Functions of `parameters` take it like a ModelConfig, for the adapters' weights.

    targets: names of the adapted weights (parameters.adaptable). base: directory of the checkpoint with W; base_digest:
    the sha256 of its digests.json. Raises InputError naming the field.
    """

    model: ModelConfig
    rank: int
    alpha: float
    targets: tuple[str, ...]
    base: str = ""
    base_digest: str = ""

    def __post_init__(self):
        check_range("lora.rank", self.rank, at_least=1)
        check_range("lora.alpha", self.alpha, above=0)

    @property
    def layer_groups(self) -> dict[str, range]:
        return self.model.layer_groups

    @property
    def initializer_range(self) -> float:
        return self.model.initializer_range

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def to_dict(self) -> dict:
        """Everything but the model."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["model"]
        return values | {"targets": list(self.targets)}

    @classmethod
    def from_dict(cls, model: ModelConfig, values: dict) -> "Lora":
        return cls(model, **values | {"targets": tuple(values["targets"])})


def adapter_names(weight: str) -> tuple[str, str]:
    """Names of A and B."""
    return f"{weight}_lora_a", f"{weight}_lora_b"


def weight_of(name: str) -> str:
    """Returns the weight that an adapter belongs to; for any other name, the name itself."""
    return name.removesuffix("_lora_a").removesuffix("_lora_b")


def attach(params, adapters, lora: Lora):
    """Returns the base's weights with the adapters beside them, B times alpha / rank: the params of the forward pass.

    A base with adapters of its own keeps them: ranks add up, [A A'] [B; B'] = A B + A' B'.
    """
    import jax.numpy as jnp  # not above: declarations do without JAX

    def joined(weights, group):
        for name, w in group.items():
            axis = 1 if name.endswith("_lora_b") else -1  # of the rank, behind that of the layers
            w = w * lora.scale if name.endswith("_lora_b") else w
            weights = weights | {name: jnp.concatenate([weights[name], w], axis) if name in weights else w}
        return weights

    return params | {group: joined(params[group], adapters[group]) for group in adapters}


def merge(weight, a, b, scale: float, xp):
    """Returns W + scale A B, computed by xp (numpy or jax.numpy) in float32, in W's dtype. weight [*in, *out]; a [*in,
    rank]; b [rank, *out].
    """
    low_rank = xp.tensordot(a.astype(xp.float32), b.astype(xp.float32), 1)
    return (weight.astype(xp.float32) + xp.float32(scale) * low_rank).astype(weight.dtype)
