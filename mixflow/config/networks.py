"""The networks of checkpoint entries: the families, their published sizes, and what an entry must say of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, model_validator

from mixflow.config import costs
from mixflow.config.values import LIST, BelowOne, Count, Entry, Flag, from_text
from mixflow.runtime.errors import UserError, did_you_mean

# fmt: off
SIT_SIZES = {
    "S":  {"depth": 12, "hidden_size":  384, "num_heads":  6},  #  33 M parameters with patch 2
    "B":  {"depth": 12, "hidden_size":  768, "num_heads": 12},  # 131 M
    "L":  {"depth": 24, "hidden_size": 1024, "num_heads": 16},  # 458 M
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},  # 675 M
}
RAE_SIZES = {  # trunk, head
    "DH-S":  {"hidden_size": ( 384, 2048), "depth": (12, 2), "num_heads": ( 6, 16)},  # 196 M; guides the others
    "DH-B":  {"hidden_size": ( 768, 2048), "depth": (12, 2), "num_heads": (12, 16)},  # 294 M
    "DH-XL": {"hidden_size": (1152, 2048), "depth": (28, 2), "num_heads": (16, 16)},  # 839 M
}
# fmt: on
TIME_FEATURES = 256
SIT_SHORTHANDS = {
    f"{size}/{patch_size}": {**numbers, "patch_size": patch_size}
    for size, numbers in SIT_SIZES.items()
    for patch_size in (2, 4, 8)
}


def _offers(sizes: Mapping[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Let the schema know `size`, which stands for other keys and is none itself."""

    def add(schema: dict[str, Any]) -> None:
        schema["properties"]["size"] = {"enum": list(sizes)}

    return add


def _expanded(values: Any, sizes: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return an entry's values with its `size` spelled out."""
    if not isinstance(values, dict) or "size" not in values:
        return values
    values = dict(values)
    size = values.pop("size")
    if size not in sizes:
        raise UserError(f"size: '{size}' is not known{did_you_mean(size, sizes)}")
    for key, number in sizes[size].items():
        value = values.setdefault(key, number)
        if (tuple(value) if isinstance(value, list) else from_text(value)) != number:
            raise UserError(f"{key}: {value} contradicts size: {size}: write one of the two")
    return values


class Backbone(Entry):
    """What SiT and REPA share; `size: XL/2` stands for hidden_size, depth, num_heads and patch_size."""

    model_config = ConfigDict(json_schema_extra=_offers(SIT_SHORTHANDS))

    hidden_size: Count
    depth: Count
    num_heads: Count
    patch_size: Count
    label_dropout: BelowOne

    @property
    def has_null_class(self) -> bool:
        return self.label_dropout > 0

    @model_validator(mode="before")
    @classmethod
    def _expand_size(cls, values: Any) -> Any:
        return _expanded(values, SIT_SHORTHANDS)

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        for divisor, needed_by in ((self.num_heads, "num_heads"), (4, "its position embedding")):
            if self.hidden_size % divisor:
                raise UserError(f"hidden_size: {self.hidden_size} is not divisible by {needed_by} ({divisor})")
        return self

    def _num_parameters(self, channels: int, size: int, num_classes: int, head_channels: int) -> int:
        width, patch = self.hidden_size, self.patch_size**2
        embedders = _linear(channels * patch, width) + _linear(TIME_FEATURES, width) + _linear(width, width)
        tables = (num_classes + (self.label_dropout > 0)) * width + (size // self.patch_size) ** 2 * width
        attention = _linear(width, 3 * width) + _linear(width, width)
        mlp = _linear(width, 4 * width) + _linear(4 * width, width)
        blocks = self.depth * (attention + mlp + _linear(width, 6 * width))
        return embedders + tables + blocks + _linear(width, 2 * width) + _linear(width, patch * head_channels)

    def flops(self, channels: int, size: int) -> int:
        """Return the FLOPs of a forward pass on an image's latents [channels, size, size], as in mixflow.config.costs.

        Of a head that learns sigma only the velocity's half is computed.
        """
        width, patch = self.hidden_size, channels * self.patch_size**2
        tokens = (size // self.patch_size) ** 2
        ends = costs.linear(tokens, patch, width) + costs.linear(tokens, width, patch)
        time = costs.linear(1, TIME_FEATURES, width) + costs.linear(1, width, width)
        modulations = costs.linear(1, width, (6 * self.depth + 2) * width)
        return ends + time + modulations + costs.vit(tokens, width, self.depth, 4 * width)


class SiT(Backbone):
    """A SiT network (arXiv 2401.08740)."""

    family: Literal["sit"]
    learn_sigma: Flag

    def num_parameters(self, channels: int, size: int, num_classes: int) -> int:
        """Return the number of weights on latents [channels, size, size]."""
        return self._num_parameters(channels, size, num_classes, (1 + self.learn_sigma) * channels)


class REPA(Backbone):
    """A SiT with projectors on the output of one block (arXiv 2410.06940)."""

    family: Literal["repa"]
    encoder_depth: Count  # the block whose output is aligned, counted from 1
    z_dims: Annotated[tuple[Count, ...], Field(min_length=1), LIST]  # widths of the encoders' features
    projector_dim: Count
    qk_norm: Flag

    def num_parameters(self, channels: int, size: int, num_classes: int) -> int:
        """Return the number of weights on latents [channels, size, size], projectors included."""
        norms = 4 * (self.hidden_size // self.num_heads) if self.qk_norm else 0
        hidden = self.projector_dim
        projectors = sum(
            _linear(self.hidden_size, hidden) + _linear(hidden, hidden) + _linear(hidden, width)
            for width in self.z_dims
        )
        return self._num_parameters(channels, size, num_classes, channels) + self.depth * norms + projectors

    def projector_flops(self, size: int) -> int:
        """Return the FLOPs of the projectors on latents [channels, size, size]; only training with alignment asks."""
        tokens, hidden = (size // self.patch_size) ** 2, self.projector_dim
        layers = ((self.hidden_size, hidden), (hidden, hidden))
        return sum(costs.linear(tokens, *layer) for width in self.z_dims for layer in (*layers, (hidden, width)))

    @model_validator(mode="after")
    def _aligned_block(self) -> REPA:
        if self.encoder_depth > self.depth:
            raise UserError(f"encoder_depth: {self.encoder_depth} is beyond the {self.depth} blocks: lower it")
        return self


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


CountPair = Annotated[tuple[Count, Count], LIST]  # of the trunk, of the head


class DiTDH(Entry):
    """RAE's DiT with a wide head (arXiv 2510.11690); `size: DH-XL` stands for the three pairs."""

    model_config = ConfigDict(json_schema_extra=_offers(RAE_SIZES))

    family: Literal["rae"]
    hidden_size: CountPair
    depth: CountPair
    num_heads: CountPair
    label_dropout: BelowOne

    @property
    def has_null_class(self) -> bool:
        return self.label_dropout > 0

    @model_validator(mode="before")
    @classmethod
    def _expand_size(cls, values: Any) -> Any:
        return _expanded(values, RAE_SIZES)

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        for part, width, heads in zip(("trunk", "head"), self.hidden_size, self.num_heads, strict=True):
            if width % heads or width // heads % 4:
                raise UserError(
                    f"hidden_size: {width} of the {part} is no multiple of four times its num_heads {heads}, as rotary "
                    "positions on two axes ask for: change one of them"
                )
        return self

    def num_parameters(self, channels: int, size: int, num_classes: int) -> int:
        """Return the number of weights on latents [channels, size, size], without the tables of rotary positions."""
        trunk, head = self.hidden_size
        embedders = _linear(channels, trunk) + _linear(channels, head)
        time = TIME_FEATURES + _linear(2 * TIME_FEATURES, trunk) + _linear(trunk, trunk)
        tables = (num_classes + (self.label_dropout > 0)) * trunk + size**2 * trunk
        bridge = _linear(trunk, head) if trunk != head else 0
        blocks = 0
        for width, depth in zip(self.hidden_size, self.depth, strict=True):
            attention, hidden = _linear(width, 3 * width) + _linear(width, width), int(2 / 3 * 4 * width)
            swiglu = _linear(width, 2 * hidden) + _linear(hidden, width)
            blocks += depth * (2 * width + attention + swiglu + _linear(width, 6 * width))
        return embedders + time + tables + bridge + blocks + head + _linear(head, 2 * head) + _linear(head, channels)

    def flops(self, channels: int, size: int) -> int:
        """Return the FLOPs of a forward pass on an image's latents [channels, size, size], as in mixflow.config.costs.

        The trunk is modulated once an image, the head token by token.
        """
        trunk, head, tokens = *self.hidden_size, size**2
        ends = costs.linear(tokens, channels, trunk) + 2 * costs.linear(tokens, channels, head)
        time = costs.linear(1, 2 * TIME_FEATURES, trunk) + costs.linear(1, trunk, trunk)
        bridge = costs.linear(tokens, trunk, head) if trunk != head else 0
        modulations = costs.linear(tokens, head, 2 * head)
        blocks = 0
        for width, depth, modulated in zip(self.hidden_size, self.depth, (1, tokens), strict=True):
            swiglu = 3 * costs.linear(tokens, width, int(2 / 3 * 4 * width))
            modulations += depth * costs.linear(modulated, width, 6 * width)
            blocks += depth * (costs.attention(tokens, width) + swiglu)
        return ends + time + bridge + modulations + blocks


class GaussianField(Entry):
    """The exact velocity field of a Gaussian: mixflow.models.exact."""

    family: Literal["gaussian"]
    axes: Flag  # whether its principal axes are those of the latents
    law: str
    gamma: float

    @property
    def has_null_class(self) -> bool:
        return True

    def num_parameters(self, channels: int, size: int, num_classes: int) -> int:
        """Return how many numbers its file holds: mean, variances, axes."""
        dimensions = channels * size**2
        return 2 * dimensions + (0 if self.axes else dimensions**2)

    def flops(self, channels: int, size: int) -> int:
        """Return the FLOPs of its matrix products on one input: into the principal axes and back.

        Those of the quadrature under a law of times are left out.
        """
        dimensions = channels * size**2
        return 0 if self.axes else 2 * costs.linear(1, dimensions, dimensions)


class MixtureField(Entry):
    """The exact velocity field of a kernel density estimate: mixflow.models.exact."""

    family: Literal["mixture"]
    num_components: Count
    law: str
    gamma: float

    @property
    def has_null_class(self) -> bool:
        return True

    def num_parameters(self, channels: int, size: int, num_classes: int) -> int:
        """Return how many numbers its file holds: components, labels, weights, bandwidth."""
        return self.num_components * (channels * size**2 + 2) + 1

    def flops(self, channels: int, size: int) -> int:
        """Return the FLOPs of its matrix products on one input, were all components of its class.

        Those of the quadrature under a law of times are left out.
        """
        return 2 * costs.linear(1, channels * size**2, self.num_components)


Model = Annotated[SiT | REPA | DiTDH, Field(discriminator="family")]
AnyModel = SiT | REPA | DiTDH | GaussianField | MixtureField
_MODEL: TypeAdapter[AnyModel] = TypeAdapter(Annotated[AnyModel, Field(discriminator="family")])


def network_flops(options: Mapping[str, Any]) -> int:
    """Return the FLOPs of a forward pass from a network's options, as slices and run records hold them."""
    own = {key: value for key, value in options.items() if key not in ("input_size", "in_channels", "num_classes")}
    return _MODEL.validate_python(own).flops(options["in_channels"], options["input_size"])
