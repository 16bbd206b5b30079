"""What networks cost: FLOPs of the matrix products of a forward pass (2 a multiply-add), and sizes of published files.

Norms, activations and the embedding of labels are left out, as torch.utils.flop_counter leaves them out. What is
written here in numbers, and not as a function of entries, are networks whose shape lies in their files alone.
"""

from __future__ import annotations


def linear(rows: int, inputs: int, outputs: int) -> int:
    """Return the FLOPs of a linear map of `rows` vectors."""
    return 2 * rows * inputs * outputs


def attention(tokens: int, width: int) -> int:
    """Return the FLOPs of self-attention with its four linear maps; the number of heads plays no part."""
    return linear(tokens, width, 4 * width) + 4 * tokens**2 * width


def mlp(tokens: int, width: int, hidden: int) -> int:
    """Return the FLOPs of two linear maps with one activation between them."""
    return linear(tokens, width, hidden) + linear(tokens, hidden, width)


def vit(tokens: int, width: int, depth: int, hidden: int) -> int:
    """Return the FLOPs of the blocks of a plain vision transformer."""
    return depth * (attention(tokens, width) + mlp(tokens, width, hidden))


# --- DINOv2: patches of 14 pixels, four times as wide inside

DINOV2_PATCH = 14
_DINOV2_DEPTHS = {384: 12, 768: 12, 1024: 24}  # by width: S, B, L
_FEW, _MANY = 12, 24  # layers of the others
_NUM_POSITIONS = 37**2 + 1  # those of 518 pixels are stored


def _dinov2_depth(width: int) -> int:
    return _DINOV2_DEPTHS.get(width, _FEW if width < 1024 else _MANY)


def dinov2(width: int, patches: int, prefix: int = 1, patch: int = DINOV2_PATCH) -> int:
    """Return the FLOPs for an image of `patches` patches; `prefix` tokens (class, registers) come before them."""
    embedding = linear(patches, 3 * patch**2, width)
    return embedding + vit(patches + prefix, width, _dinov2_depth(width), 4 * width)


def dinov2_parameters(width: int) -> int:
    """Return how many numbers such a file holds, registers and mask token apart."""
    block = 12 * width**2 + 15 * width  # attention, MLP, norms, layer scales
    return (3 * DINOV2_PATCH**2 + 1 + _NUM_POSITIONS + 1 + 2) * width + _dinov2_depth(width) * block


# --- RAE's released decoder, a ViT-XL on patches of 16 pixels

_RAE_WIDTH, _RAE_DEPTH, _RAE_HIDDEN, _RAE_PIXELS = 1152, 28, 4096, 3 * 16**2


def rae_decoder(channels: int, tokens: int) -> int:
    """Return the FLOPs of decoding an image of `tokens` tokens."""
    ends = linear(tokens, channels, _RAE_WIDTH) + linear(tokens + 1, _RAE_WIDTH, _RAE_PIXELS)
    return ends + vit(tokens + 1, _RAE_WIDTH, _RAE_DEPTH, _RAE_HIDDEN)


def rae_decoder_parameters(channels: int, tokens: int) -> int:
    """Return how many numbers such a file holds, its table of positions included."""
    width, hidden = _RAE_WIDTH, _RAE_HIDDEN
    block = 4 * (width**2 + width) + 2 * width * hidden + hidden + width + 4 * width
    ends = (channels + 1) * width + (width + 1) * _RAE_PIXELS + width + 2 * width
    return ends + (tokens + 1) * width + _RAE_DEPTH * block


# --- Stable Diffusion's autoencoder: convolutions, and one attention of width 512 at the latents' resolution

SD_VAE_PARAMETERS = 83_653_863
_SD_VAE_ENCODER, _SD_VAE_DECODER, _SD_VAE_WIDTH = 4_128_642, 9_461_056.5, 512  # FLOPs a pixel; attention apart


def sd_vae_encoder(pixels: int, latents: int) -> int:
    """Return the FLOPs of encoding an image of so many pixels into so many latents (of any channels)."""
    return _SD_VAE_ENCODER * pixels + 4 * latents**2 * _SD_VAE_WIDTH


def sd_vae_decoder(pixels: int, latents: int) -> int:
    """Return the FLOPs of decoding it."""
    return int(_SD_VAE_DECODER * pixels) + 4 * latents**2 * _SD_VAE_WIDTH


# --- Inception of 2015-12-05, at 299 pixels

INCEPTION_FLOPS = 11_426_464_960
INCEPTION_PARAMETERS = 23_885_392
