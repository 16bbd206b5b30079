"""The decoder of a representation autoencoder: ViT-MAE's (He et al., 2022), with a trained class token."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mixflow.runtime.errors import UserError
from mixflow.runtime.torch_file import read_torch_file

COLOURS = 3
_EPS = 1e-12  # of every LayerNorm
_LAYER = re.compile(r"decoder_layers\.(\d+)\.")
_WRAPPERS = ("ema", "model")  # in the order of preference


class Decoder(nn.Module):
    """Tokens [B,N,num_channels] -> pixels in the encoder's normalisation [B,3,grid patch_size,grid patch_size].

    Its state_dict() has the key names of the peer's decoder files.
    """

    decoder_pos_embed: Tensor

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        mlp_width: int,
        num_channels: int,  # of the tokens
        grid: int,  # rows and columns of patches
        patch_size: int,  # pixels
    ) -> None:
        super().__init__()
        self.grid, self.patch_size = grid, patch_size
        self.decoder_embed = nn.Linear(num_channels, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_pos_embed", _positions(width, grid))
        self.decoder_layers = nn.ModuleList(_Layer(width, num_heads, mlp_width) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=_EPS)
        self.decoder_pred = nn.Linear(width, patch_size**2 * COLOURS)

    def forward(self, tokens: Tensor) -> Tensor:
        pixels = self.logits(tokens).unflatten(2, (self.patch_size, self.patch_size, COLOURS))
        pixels = pixels.unflatten(1, (self.grid, self.grid))  # [B,row,column,p,q,colour]
        return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the pixels of each patch [B,grid * grid,patch_size * patch_size * 3]."""
        x = self.decoder_embed(tokens)
        if x.shape[1] != self.grid**2:
            x = self._resized(x)
        x = torch.cat([self.trainable_cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1) + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def _resized(self, x: Tensor) -> Tensor:
        """Return the square grid of tokens [B,N,width] resampled to the decoder's own."""
        side = round(x.shape[1] ** 0.5)
        square = x.transpose(1, 2).unflatten(2, (side, side))
        return F.interpolate(square, size=(self.grid, self.grid), mode="bilinear").flatten(2).transpose(1, 2)


def load_decoder(
    path: Path,
    *,
    num_heads: int,  # which shapes do not tell
    num_channels: int,  # of the tokens
    grid: int,
    patch_size: int,
) -> Decoder:
    """Return the decoder in a file, in float32 on the CPU, for inference. The other sizes come from shapes.

    The file holds a flat state dict, or is a training checkpoint of the peer's first stage, of which the EMA is taken.
    The table of positions may be missing, which is computed. Raises `UserError` for whatever does not fit.
    """
    source = f"decoder '{path}'"
    tensors = _unwrapped(_read(path, source), source)
    try:
        width, found_channels = tensors["decoder_embed.weight"].shape
        rows, _ = tensors["decoder_pred.weight"].shape
        mlp_width, _ = tensors["decoder_layers.0.intermediate.dense.weight"].shape
        _, num_positions, _ = tensors.setdefault("decoder_pos_embed", _positions(width, grid)).shape
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{source} holds no decoder of RAE, for which it lacks such weights as decoder_embed.weight of two "
            "dimensions: name the peer's model.pt"
        ) from error
    found_patch = math.isqrt(rows // COLOURS)
    fault = None
    if found_channels != num_channels:
        fault = f"takes tokens of {found_channels} channels where its entry says {num_channels}: correct channels"
    elif found_patch != patch_size:
        fault = f"makes patches of {found_patch} pixels where its entry says {patch_size}: correct downsampling"
    elif num_positions != 1 + grid**2:
        fault = f"is for {num_positions - 1} tokens where latents have {grid} x {grid}: correct encoder_size"
    elif width % num_heads:
        fault = f"is {width} wide, which {num_heads} heads do not divide: correct decoder_heads"
    if fault:
        raise UserError(f"{source} {fault}, or name another download")
    depth = 1 + max(int(match[1]) for name in tensors if (match := _LAYER.match(name)))
    with torch.device("meta"):
        decoder = Decoder(
            width=width,
            depth=depth,
            num_heads=num_heads,
            mlp_width=mlp_width,
            num_channels=num_channels,
            grid=grid,
            patch_size=patch_size,
        )
    _check_fit(tensors, decoder, source)
    # Copies, in the precision of inference: the file's own pages may be half precision or memory-mapped.
    tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    decoder.load_state_dict(tensors, assign=True)
    return decoder.eval().requires_grad_(False)


class _Layer(nn.Module):
    """A pre-norm transformer block, nested as the peer's key names ask."""

    def __init__(self, width: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(width, eps=_EPS)
        self.attention = nn.ModuleDict({"attention": _Attention(width, num_heads), "output": _dense(width, width)})
        self.layernorm_after = nn.LayerNorm(width, eps=_EPS)
        self.intermediate = _dense(width, mlp_width)
        self.output = _dense(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attention["attention"](self.layernorm_before(x))
        x = x + self.attention["output"]["dense"](attended)  # type: ignore[index]
        hidden = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](hidden)


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B,heads,N,head width]
            for project in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _dense(fan_in: int, fan_out: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(fan_in, fan_out)})


def _positions(width: int, grid: int) -> Tensor:
    """Return the sine-cosine table [1,1 + grid * grid,width]: zeros for the class token, then row by row.

    The first half of the width tells the column and the second the row, each sines and then cosines.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid,width / 2]
    patches = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], dim=1)
    return torch.cat([torch.zeros(1, width), patches.float()])[None]


def _read(path: Path, source: str) -> object:
    # What convert-weights makes of a file that cannot be loaded safely.
    return load_file(path) if path.suffix == ".safetensors" else read_torch_file(path, source)


def _unwrapped(payload: object, source: str) -> dict[str, Tensor]:
    """Return the decoder's weights by name: of a flat state dict, or of the autoencoder in a training checkpoint."""
    if isinstance(payload, Mapping):
        wrapper = next((name for name in _WRAPPERS if isinstance(payload.get(name), Mapping)), None)
        payload = payload if wrapper is None else payload[wrapper]
    if not isinstance(payload, Mapping) or not all(isinstance(value, Tensor) for value in payload.values()):
        raise UserError(f"{source} holds no flat state dict: name the peer's model.pt")
    tensors = {str(name).replace("_orig_mod.", "").removeprefix("module."): value for name, value in payload.items()}
    inner = {name.removeprefix("decoder."): value for name, value in tensors.items() if name.startswith("decoder.")}
    return inner or tensors


def _check_fit(tensors: Mapping[str, Tensor], decoder: Decoder, source: str) -> None:
    wanted = {name: list(tensor.shape) for name, tensor in decoder.state_dict().items()}
    misfits = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "mismatched": [name for name in wanted if name in tensors and list(tensors[name].shape) != wanted[name]],
    }
    complaints = []
    for what, names in misfits.items():
        if names:
            some = ", ".join(f"'{name}'" for name in names[:3])
            complaints.append(f"{what} {some}" + (f" and {len(names) - 3} more" if names[3:] else ""))
    if complaints:
        raise UserError(
            f"{source} does not fit the decoder that its shapes tell ({'; '.join(complaints)}): download it again"
        )
