"""The frozen image encoders of representation autoencoders, through transformers: a new kind is an entry of KINDS.

Read from `config.json` and `model.safetensors`, as `facebook/dinov2-with-registers-base`, `facebook/vit-mae-base` and
`google/siglip2-base-patch16-256` have them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixflow.runtime.errors import UserError

FILES = ("config.json", "model.safetensors")
_Triple = tuple[float, float, float]
_IMAGENET: tuple[_Triple, _Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF: tuple[_Triple, _Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Kind:
    """What distinguishes one encoder of transformers from another."""

    module: str  # below transformers.models
    model: str  # the class there
    normalisation: tuple[_Triple, _Triple]  # mean and standard deviation of the pixels that it wants
    norm: str  # the name of its last norm, whose weight and bias play no part
    prefix: Callable[[Any], int]  # its config -> how many tokens come before those of the patches
    inputs: Callable[[int, Tensor], dict[str, Any]]  # how many patches, pixels -> what else its forward pass takes
    unused: tuple[str, ...]  # how the names of its file's other weights begin that play no part


# By the model_type of config.json.
KINDS = {
    "dinov2_with_registers": Kind(
        module="dinov2_with_registers.modeling_dinov2_with_registers",
        model="Dinov2WithRegistersModel",
        normalisation=_IMAGENET,
        norm="layernorm",
        prefix=lambda config: 1 + config.num_register_tokens,
        inputs=lambda num_patches, pixels: {},
        unused=("embeddings.mask_token",),
    ),
    "vit_mae": Kind(
        module="vit_mae.modeling_vit_mae",
        model="ViTMAEModel",
        normalisation=_IMAGENET,
        norm="layernorm",
        prefix=lambda config: 1,
        # It shuffles its patches by the order of this noise.
        inputs=lambda num_patches, pixels: {
            "noise": torch.arange(num_patches, device=pixels.device).expand(len(pixels), -1),
            "interpolate_pos_encoding": True,
        },
        unused=("decoder.",),
    ),
    # SigLIP2 with square images of one size; its text model is left where it is.
    "siglip": Kind(
        module="siglip.modeling_siglip",
        model="SiglipVisionModel",
        normalisation=_HALF,
        norm="post_layernorm",
        prefix=lambda config: 0,
        inputs=lambda num_patches, pixels: {"interpolate_pos_encoding": True},
        unused=("text_model.", "logit_scale", "logit_bias", "head.", "vision_model.head."),
    ),
}


class Encoder(nn.Module):
    """Images float32 [B,3,H,W] in [0,1] -> patch tokens float32 [B,grid * grid,width] of zero mean and unit variance.

    Images of another size are resized to `size` pixels first: bicubic, not antialiased, as the peer does it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, kind: Kind, size: int) -> None:  # what transformers has read
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.kind, self.size = kind, size
        self.patch_size: int = model.config.patch_size
        self.width: int = model.config.hidden_size
        self.grid = size // self.patch_size
        mean, std = (torch.tensor(values)[:, None, None] for values in kind.normalisation)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.num_prefix = kind.prefix(model.config)
        inner = getattr(model, "vision_model", model)  # one level deeper in transformers 4
        norm = getattr(inner, kind.norm)
        setattr(inner, kind.norm, nn.LayerNorm(self.width, eps=norm.eps, elementwise_affine=False))
        if hasattr(inner, "use_head"):
            inner.use_head = False  # which pools the tokens for the text model
        if hasattr(model.config, "mask_ratio"):
            model.config.mask_ratio = 0.0
        _resize_positions(inner.embeddings, size, self.grid, self.width)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2:] != (self.size, self.size):
            images = F.interpolate(images, size=(self.size, self.size), mode="bicubic")
        pixels = (images - self.mean) / self.std
        tokens = self.model(pixels, **self.kind.inputs(self.grid**2, pixels)).last_hidden_state
        return tokens[:, self.num_prefix :].float()


def load_encoder(
    folder: Path,  # of FILES
    kind: str,  # of KINDS, which its config must name
    size: int,  # pixels
    patch_size: int,  # pixels, which its config must have
    width: int,  # of its tokens, too
) -> Encoder:
    """Return the encoder in float32 on the CPU, for inference. Raises `UserError` for files that do not fit."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"encoder '{folder}' lacks {' and '.join(missing)}: download it again, or name its folder")
    found = _model_type(folder / FILES[0])
    if found != kind:
        raise UserError(
            f"encoder '{folder}' is of the kind '{found}' where its entry says '{kind}': correct encoder_kind, or name "
            "another download"
        )
    entry = KINDS[kind]
    # Imported here, and by its narrowest path: it takes seconds, and training on cached latents does without.
    model_class = getattr(importlib.import_module(f"transformers.models.{entry.module}"), entry.model)
    try:
        with _quiet_transformers():
            model, info = model_class.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation="sdpa",
                ignore_mismatched_sizes=True,  # they are told below, in one sentence
                output_loading_info=True,
            )
    except Exception as error:  # whatever transformers, safetensors or the JSON parser say of broken files
        reason = " ".join(str(error).split())
        raise UserError(f"encoder '{folder}' cannot be read ({reason}): download it again") from error
    _check_fit(folder, entry, info)
    sizes = model.config.patch_size, model.config.hidden_size
    if sizes != (patch_size, width):
        raise UserError(
            f"encoder '{folder}' has patches of {sizes[0]} pixels and {sizes[1]} channels where its entry says "
            f"{patch_size} and {width}: correct encoder_patch and channels, or name another download"
        )
    return Encoder(model, entry, size)


def _model_type(config: Path) -> Any:
    try:
        told = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise UserError(f"encoder config '{config}' is not a JSON object: download it again")
    return told.get("model_type")


def _check_fit(folder: Path, kind: Kind, info: dict[str, Any]) -> None:
    """Raise `UserError` where transformers met a weight that the file lacks, has too many of or has misshapen."""
    unused = (*kind.unused, f"{kind.norm}.", f"vision_model.{kind.norm}.")

    complaints = []
    for what in ("missing", "unexpected", "mismatched"):
        names = [name[0] if isinstance(name, tuple) else name for name in info[f"{what}_keys"]]  # or with its shapes
        names = sorted(f"'{name}'" for name in names if not name.startswith(unused))
        if names:
            complaints.append(f"{what} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else ""))
    if complaints:
        raise UserError(
            f"the weights in encoder '{folder}' do not fit its config.json ({'; '.join(complaints)}): download it again"
        )


def _resize_positions(embeddings: Any, size: int, grid: int, width: int) -> None:
    """Replace the table of positions by the one that transformers would make of it, at every call, for this size."""
    is_table = hasattr(embeddings, "position_embedding")  # an nn.Embedding without a class token
    tokens = torch.empty(1, grid**2 + (not is_table), width)
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(tokens, size, size).clone()
    if is_table:
        embeddings.position_embedding = nn.Embedding.from_pretrained(positions[0])
        embeddings.register_buffer("position_ids", torch.arange(grid**2)[None], persistent=False)
    else:
        embeddings.position_embeddings = nn.Parameter(positions, requires_grad=False)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bar and its report, of which the sentences here hold what matters."""
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
