"""Camera frames -> what the vision tower takes (section 7.4).

The original resizes with OpenCV (INTER_AREA) and PIL (bicubic). Both are linear in rows and in columns, so that two
small matrices do the same for a whole batch on any device. What still differs is OpenCV's fixed-point arithmetic.
Measured on noisy frames of 84 x 84 to 720 x 1280: a reduction and PIL's step are each off by 1 of 255 grey levels on
less than 0.01 % of the numbers, an enlargement by 1 on 12 %; from frame to network that makes at most 3 levels, 0.1 to
0.3 on average. torch's own resize would be off by up to 28 (bilinear), 15 (bicubic, both with antialias=True) and 40
("area") levels in a single reduction from 480 x 640, and by 4 to 6 from PIL. `exact=True` runs OpenCV and PIL
themselves, frame by frame on the CPU: no difference, and there 6 ms per frame of 480 x 640 where matrices take 20.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lerobot_policy_groot_n1d6.processing.errors import ProcessingError

MULTIPLE = 28
"""Patches are 14 pixels wide, and 2 x 2 of them make a token."""
MIN_PIXELS, MAX_PIXELS = 4 * MULTIPLE**2, 4096 * MULTIPLE**2


@dataclass(frozen=True)
class ImageRules:
    """What a checkpoint chooses about its images.

    Attributes:
        shortest_edge: pixels of the shorter side before and after the crop.
        crop_fraction: share of each side that the crop keeps, in (0, 1].
        letterbox: pad to a square with black first. Checkpoints before February 2026 were trained without.
        exact: OpenCV and PIL, on the CPU, instead of matrices.
    """

    shortest_edge: int = 256
    crop_fraction: float = 0.95
    letterbox: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        if self.shortest_edge < 1:
            raise ProcessingError(f"shortest_edge is {self.shortest_edge}: expected at least 1 pixel")
        if not 0 < self.crop_fraction <= 1:
            raise ProcessingError(f"crop_fraction is {self.crop_fraction}: expected a share in (0, 1]")


@dataclass(frozen=True)
class Augmentation:
    """How training images of B samples differ from what the camera saw; one draw serves all views of a sample.

    Attributes:
        place: [B, 2] where the crop lies, down and right, as shares of what it leaves free.
        colour: [B, 4] factors of brightness, contrast and saturation, and the turn of the hue.
        order: [B, 4] in which the four are applied.
    """

    place: Tensor
    colour: Tensor
    order: Tensor

    STRENGTH = (0.3, 0.4, 0.5, 0.08)
    """Of brightness, contrast, saturation and hue (section 1)."""

    @classmethod
    def draw(cls, batch_size: int, generator: torch.Generator | None = None) -> "Augmentation":
        strength = torch.tensor(cls.STRENGTH)
        turn = (2 * torch.rand(batch_size, 4, generator=generator) - 1) * strength
        order = torch.rand(batch_size, 4, generator=generator).argsort(dim=1)
        return cls(torch.rand(batch_size, 2, generator=generator), turn + torch.tensor([1.0, 1.0, 1.0, 0.0]), order)


def transform_images(images: Tensor, rules: ImageRules, augmentation: Augmentation | None = None) -> Tensor:
    """One view of B samples, ready for the vision tower.

    Args:
        images: [B, 3, height, width], float in [0, 1] or uint8.
        rules: the checkpoint's.
        augmentation: for training; None crops the centre.

    Returns:
        [B, 3, h, w] float32 in [-1, 1], h and w multiples of 28; a view takes h w / 784 tokens.

    Raises:
        ProcessingError: `images` is something else.
    """
    levels = _levels(images)
    if rules.exact and augmentation is None:
        frames = levels.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()
        levels = torch.from_numpy(np.stack([exact_frame(frame, rules) for frame in frames])).permute(0, 3, 1, 2)
        levels = levels.to(images.device, torch.float32)
    else:
        levels = shortest_edge(letterbox(levels) if rules.letterbox else levels, rules.shortest_edge)
        levels = _crop(levels, rules.crop_fraction, None if augmentation is None else augmentation.place)
        levels = shortest_edge(levels, rules.shortest_edge)
        levels = levels if augmentation is None else jitter(levels, augmentation)
        levels = resize_cubic(levels, *smart_size(*levels.shape[-2:]))
    return (levels / 255 - 0.5) / 0.5


def exact_frame(frame: np.ndarray, rules: ImageRules) -> np.ndarray:
    """The same for one frame, uint8 [height, width, 3], by OpenCV and PIL: uint8, before the last scaling."""
    import cv2
    from PIL import Image

    def shortest(frame: np.ndarray) -> np.ndarray:
        height, width = shortest_size(frame.shape[0], frame.shape[1], rules.shortest_edge)
        if frame.shape[:2] == (height, width):
            return frame
        return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)

    if rules.letterbox:
        left, right, top, bottom = _margins(*frame.shape[:2])
        frame = np.pad(frame, ((top, bottom), (left, right), (0, 0)))
    frame = shortest(np.ascontiguousarray(frame))
    top, left, height, width = crop_box(frame.shape[0], frame.shape[1], rules.crop_fraction)
    frame = shortest(np.ascontiguousarray(frame[top : top + height, left : left + width]))
    height, width = smart_size(*frame.shape[:2])
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def shortest_size(height: int, width: int, edge: int) -> tuple[int, int]:
    """Height and width once the shorter one is `edge`."""
    scale = edge / min(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def crop_box(
    height: int, width: int, fraction: float, place: Sequence[float] = (0.5, 0.5)
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop; `place` as in Augmentation."""
    inner = max(1, int(height * fraction)), max(1, int(width * fraction))
    free = height - inner[0], width - inner[1]
    return int(free[0] * place[0]), int(free[1] * place[1]), *inner


def smart_size(height: int, width: int) -> tuple[int, int]:
    """Both sides rounded to multiples of 28, with 4 to 4096 tokens in all."""
    sides = tuple(max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in (height, width))
    if MIN_PIXELS <= sides[0] * sides[1] <= MAX_PIXELS:
        return sides[0], sides[1]
    large = sides[0] * sides[1] > MAX_PIXELS
    scale = math.sqrt((MAX_PIXELS if large else MIN_PIXELS) / (height * width))
    rounded = math.floor if large else math.ceil
    sides = tuple(max(MULTIPLE, rounded(side * scale / MULTIPLE) * MULTIPLE) for side in (height, width))
    return sides[0], sides[1]


def num_tokens(height: int, width: int) -> int:
    """Tokens of a transformed image of this size."""
    return height * width // MULTIPLE**2


def letterbox(images: Tensor) -> Tensor:
    """Padded with black to squares, the frame in the middle."""
    return torch.nn.functional.pad(images, _margins(*images.shape[-2:]))


def shortest_edge(levels: Tensor, edge: int) -> Tensor:
    """Resized as OpenCV's INTER_AREA does, to whole grey levels."""
    height, width = levels.shape[-2:]
    rows, columns = shortest_size(height, width, edge)
    if (rows, columns) == (height, width):
        return levels
    resized = area_weights(height, rows).to(levels) @ levels @ area_weights(width, columns).to(levels).T
    halved = (height, width) == (2 * rows, 2 * columns)
    # OpenCV rounds halves to even, except in its own path for halving.
    return (resized + 0.5).floor() if halved else resized.round()


def resize_cubic(levels: Tensor, height: int, width: int) -> Tensor:
    """Resized as PIL's BICUBIC does: columns, whole grey levels, rows, whole grey levels."""
    if levels.shape[-1] != width:
        levels = _whole(levels @ cubic_weights(levels.shape[-1], width).to(levels).T)
    if levels.shape[-2] != height:
        levels = _whole(cubic_weights(levels.shape[-2], height).to(levels) @ levels)
    return levels


@lru_cache(maxsize=64)
def area_weights(size: int, new: int) -> Tensor:
    """[new, size]: how much of each old pixel is in each new one, as OpenCV's INTER_AREA has it.

    Enlarging, it interpolates linearly, but only in the pixel in which an old edge lies.
    """
    scale = size / new
    target = torch.arange(new, dtype=torch.float64)
    source = torch.arange(size, dtype=torch.float64)
    if scale >= 1:
        upper = torch.minimum((target[:, None] + 1) * scale, source + 1)
        overlap = (upper - torch.maximum(target[:, None] * scale, source)).clamp(min=0)
        return (overlap / overlap.sum(1, keepdim=True)).float()
    left = (target * scale).floor()
    share = (target + 1) - (left + 1) / scale
    share = torch.where(share <= 0, torch.zeros_like(share), share - share.floor())[:, None]
    right = (left + 1).clamp(max=size - 1)
    at_left, at_right = (source == left[:, None]).double(), (source == right[:, None]).double()
    return ((1 - share) * at_left + share * at_right).float()


@lru_cache(maxsize=64)
def cubic_weights(size: int, new: int) -> Tensor:
    """[new, size]: the cubic kernel with a = -0.5, widened when reducing, as PIL's BICUBIC has it."""
    scale = size / new
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    x = (torch.arange(size, dtype=torch.float64) + 0.5 - centre[:, None]).abs() / max(scale, 1)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return (weights / weights.sum(1, keepdim=True)).float()


def jitter(levels: Tensor, augmentation: Augmentation) -> Tensor:
    """Brightness, contrast, saturation and hue changed, each sample by its own draw."""
    from torchvision.transforms.v2 import functional

    changes = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    out = []
    for image, factors, order in zip(
        levels / 255, augmentation.colour.tolist(), augmentation.order.tolist(), strict=True
    ):
        for which in order:
            image = changes[which](image, factors[which])
        out.append(image)
    return _whole(torch.stack(out) * 255)


def _crop(levels: Tensor, fraction: float, place: Tensor | None) -> Tensor:
    size = levels.shape[-2], levels.shape[-1]
    if place is None:
        top, left, height, width = crop_box(*size, fraction)
        return levels[..., top : top + height, left : left + width]
    boxes = [crop_box(*size, fraction, row) for row in place.tolist()]
    return torch.stack(
        [image[:, y : y + rows, x : x + columns] for image, (y, x, rows, columns) in zip(levels, boxes, strict=True)]
    )


def _margins(height: int, width: int) -> tuple[int, int, int, int]:
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    return left, side - width - left, top, side - height - top


def _whole(levels: Tensor) -> Tensor:
    return (levels + 0.5).floor().clamp(0, 255)


def _levels(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ProcessingError(f"images have shape {tuple(images.shape)}: expected [B, 3, height, width]")
    if images.dtype == torch.uint8:
        return images.float()
    if not images.is_floating_point():
        raise ProcessingError(f"images are {images.dtype}: expected float in [0, 1], or uint8")
    return (images.float() * 255).round().clamp(0, 255)
