"""SigLIP2 and the projection of its patches to the language model's width (section 4).

Shapes: h w patches of an image (rows, columns), P = h w, C width.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lerobot_policy_groot_n1d6.model.configuration import VisionSizes
from lerobot_policy_groot_n1d6.model.layers import Stored

Image = Float[Tensor, "1 3 _ _"]
"""One image, its numbers in [-1, 1]."""
UNSHUFFLE = 2
"""Side of the square of patches that becomes one token."""


class ImageEncoder(nn.Module):
    """Images to tokens of the language model: the tower, then `mlp1` over squares of 2 x 2 patches."""

    def __init__(self, sizes: VisionSizes, token_width: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.vision_model = nn.Module()
        self.vision_model.vision_model = VisionTower(sizes)  # the checkpoint doubles the name
        square = sizes.width * UNSHUFFLE**2
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(square), nn.Linear(square, token_width), nn.GELU(), nn.Linear(token_width, token_width)
        )

    @property
    def tower(self) -> "VisionTower":
        return self.vision_model.vision_model  # type: ignore[return-value]

    def image_tokens(self, images: Sequence[Image]) -> list[Float[Tensor, "_ C"]]:
        """Tokens of each image, a quarter as many as it has patches, row by row.

        Raises:
            ValueError: an image cannot be cut into squares of 2 x 2 patches.
        """
        patches = self.tower(images)
        grids = [_grid(image, self.sizes.patch) for image in images]
        return [self.mlp1(unshuffle(p, *grid)) for p, grid in zip(patches, grids, strict=True)]


class VisionTower(nn.Module):
    """A pre-norm ViT over images of any size. Each image attends to itself alone: no patch sees another image's."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Linear(3 * sizes.patch**2, sizes.width)
        self.embeddings.position_embedding = nn.Embedding(sizes.grid**2, sizes.width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionLayer(sizes) for _ in range(sizes.depth))
        self.post_layernorm = nn.LayerNorm(sizes.width, eps=sizes.norm_eps)
        self.head = Stored(_pooling_head(sizes))

    def forward(self, images: Sequence[Image]) -> list[Float[Tensor, "_ C"]]:
        """Normalised patch features of each image. Images of one size run as one batch, whoever they belong to."""
        same_size = defaultdict(list)
        for index, image in enumerate(images):
            same_size[tuple(image.shape[-2:])].append(index)
        features: dict[int, Tensor] = {}
        for indices in same_size.values():
            batch = torch.cat([images[index] for index in indices])
            features.update(zip(indices, self._equal_sizes(batch), strict=True))
        return [features[index] for index in range(len(images))]

    def _equal_sizes(self, images: Float[Tensor, "G 3 height width"]) -> Float[Tensor, "G P C"]:
        embed: nn.Linear = self.embeddings.patch_embedding  # type: ignore[assignment]
        x = embed(flat_patches(images, self.sizes.patch).to(embed.weight.dtype))
        x = x + self._positions(*_grid(images, self.sizes.patch)).to(x.dtype)
        for layer in self.encoder.layers:  # type: ignore[union-attr]
            x = layer(x)
        return self.post_layernorm(x)

    def _positions(self, rows: int, columns: int) -> Float[Tensor, "P C"]:
        """The learned square of position embeddings, resized in float32."""
        table: Tensor = self.embeddings.position_embedding.weight  # type: ignore[union-attr, assignment]
        square = table.float().T.unflatten(1, (self.sizes.grid, self.sizes.grid))[None]
        resized = F.interpolate(square, (rows, columns), mode="bilinear", align_corners=False, antialias=True)
        return resized[0].flatten(1).T


class VisionLayer(nn.Module):
    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.layer_norm1 = nn.LayerNorm(sizes.width, eps=sizes.norm_eps)
        self.layer_norm2 = nn.LayerNorm(sizes.width, eps=sizes.norm_eps)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(sizes.width, sizes.width) for name in names})
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(sizes.width, sizes.mlp_dim), "fc2": nn.Linear(sizes.mlp_dim, sizes.width)}
        )

    def forward(self, x: Float[Tensor, "G P C"]) -> Float[Tensor, "G P C"]:
        normed = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.self_attn["out_proj"](attended)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh"))


def flat_patches(images: Float[Tensor, "G 3 height width"], patch: int) -> Float[Tensor, "G P numbers"]:
    """Square patches, row by row; the numbers of each in the order (row, column, channel)."""
    rows, columns = _grid(images, patch)
    cut = images.reshape(images.shape[0], -1, rows, patch, columns, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(images.shape[0], rows * columns, -1)


def unshuffle(patches: Float[Tensor, "P C"], rows: int, columns: int) -> Float[Tensor, "tokens 4*C"]:
    """Squares of 2 x 2 patches, row by row; each one's numbers are channel-major: channel * 4 + row * 2 + column."""
    image = patches.T.unflatten(1, (rows, columns))
    return F.pixel_unshuffle(image, UNSHUFFLE).flatten(1).T


def _grid(image: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    height, width = image.shape[-2:]
    side = patch * UNSHUFFLE
    if height % side or width % side or not height or not width:
        raise ValueError(f"an image is {height} x {width} pixels: expected multiples of {side}; resize it before")
    return height // patch, width // patch


def _pooling_head(sizes: VisionSizes) -> dict[str, tuple[int, ...]]:
    """SigLIP2's pooling head, which GR00T never runs."""
    width, inner = sizes.width, sizes.mlp_dim
    return {
        "probe": (1, 1, width),
        "attention.in_proj_weight": (3 * width, width),
        "attention.in_proj_bias": (3 * width,),
        "attention.out_proj.weight": (width, width),
        "attention.out_proj.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
        "mlp.fc1.weight": (inner, width),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (width, inner),
        "mlp.fc2.bias": (width,),
    }
