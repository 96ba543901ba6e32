"""Pictures of an open LeRobot dataset, decoded to uint8 [S, height, width, 3] within a byte budget."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from poco_vla.data.features import pixel_axes
from poco_vla.data.folder import check_videos, video_file
from poco_vla.data.numbers import read_column
from poco_vla.data.rename import name_in_files
from poco_vla.errors import DataError

logger = logging.getLogger(__name__)

DEEP = ("I", "F")
"""First letters of PIL's modes of more than 8 bits per pixel: depth, not colour."""

type ResizeImages = Callable[[np.ndarray], np.ndarray]


def read_pictures(
    dataset: Any,
    keys: Sequence[str],
    columns: Mapping[str, np.ndarray],
    budget: int,
    name: str,
    resize_images: ResizeImages,
    per_call: int,
) -> dict[str, np.ndarray]:
    """Return each camera's pictures.

    Args:
        dataset: an open LeRobotDataset.
        keys: of the cameras.
        columns: its episode_index and timestamp, [S] each.
        budget: most bytes of all pictures together.
        name: of the dataset, for messages.
        resize_images: maps pictures [T, height, width, 3] to the size that is kept.
        per_call: video frames decoded at once.

    Raises:
        DataError: too many pictures, or some that cannot be read; the message names episode, camera and file.
    """
    if not keys:
        return {}
    videos = [key for key in keys if dataset.meta.features[key]["dtype"] == "video"]
    check_videos(dataset, videos, name)
    kinds = {"video": _Video, "image": _Column}
    cameras = {
        key: kinds.get(dataset.meta.features[key]["dtype"], _Pixels)(dataset, key, columns, name, per_call)
        for key in keys
    }
    num_frames = len(dataset)
    shapes = {key: resize_images(camera.frames(0, 1)).shape[1:] for key, camera in cameras.items()}
    needed = num_frames * sum(int(np.prod(shape)) for shape in shapes.values())
    if needed > budget:
        raise DataError(
            f"{name}: {num_frames} frames of {', '.join(keys)} take {needed / 1e9:.1f} GB decoded, more than "
            f"dataset.max_image_bytes ({budget / 1e9:.1f} GB). Raise it, or use fewer episodes."
        )
    logger.info("decoding %d frames of %s", num_frames, ", ".join(keys))
    out = {key: np.empty((num_frames, *shape), dtype=np.uint8) for key, shape in shapes.items()}
    with ThreadPoolExecutor() as pool:  # a camera each: they share no file, and decoders leave Python's lock
        list(pool.map(lambda key: cameras[key].fill(out[key], resize_images), keys))
    return out


class _Camera:
    """Pictures of one camera, by the steps of the dataset."""

    def __init__(self, dataset: Any, key: str, columns: Mapping[str, np.ndarray], name: str, per_call: int) -> None:
        self.dataset, self.key, self.name, self.per_call = dataset, key, name, per_call
        self.episodes, self.stamps = columns["episode_index"], columns["timestamp"]

    def fill(self, out: np.ndarray, resize_images: ResizeImages) -> None:
        """Decode all pictures into `out`."""
        for begin, end in self.pieces():
            frames = resize_images(self.frames(begin, end))
            if frames.shape[1:] != out.shape[1:]:
                raise self._error(
                    begin, f"its pictures are {frames.shape[1]}x{frames.shape[2]}, others {out.shape[1]}x{out.shape[2]}"
                )
            out[begin:end] = frames

    def pieces(self) -> list[tuple[int, int]]:
        """Return begin and end of the steps that are decoded together; each range lies within one episode."""
        raise NotImplementedError

    def frames(self, begin: int, end: int) -> np.ndarray:
        """Return uint8 [end - begin, height, width, 3]."""
        raise NotImplementedError

    def _error(self, step: int, why: str, file: Path | None = None) -> DataError:
        where = f"{self.name}, episode {int(self.episodes[step])}"
        named = "" if file is None else f" ({file})"
        return DataError(f'{where}: camera "{self.key}"{named}: {why}')


class _Column(_Camera):
    """Pictures in the table itself."""

    def __init__(self, dataset: Any, key: str, *rest: Any) -> None:
        super().__init__(dataset, key, *rest)
        self._rows = dataset.hf_dataset.select_columns([key]).with_format(None)

    def pieces(self) -> list[tuple[int, int]]:
        return [(i, i + 1) for i in range(len(self.dataset))]

    def frames(self, begin: int, end: int) -> np.ndarray:
        return np.stack([self._picture(i) for i in range(begin, end)])

    def _picture(self, step: int) -> np.ndarray:
        try:
            picture = self._rows[step][self.key]
            mode = "none" if picture is None else picture.mode
            pixels = None if picture is None or mode.startswith(DEEP) else np.asarray(picture.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:  # PIL's own for damaged files
            raise self._error(step, f"the picture of step {step} cannot be read ({_first_line(error)})") from None
        if pixels is None:
            raise self._error(
                step,
                f"step {step} has no picture of 8 bits per colour (PIL mode {mode}), which policies here read; depth "
                "has more. Name the cameras to use in dataset.cameras.",
            )
        return pixels  # grey thrice, of RGBA the colours


class _Pixels(_Camera):
    """Pictures as columns of numbers: whole ones of 0 to 255, or fractions of 0 to 1; channels last or first."""

    def __init__(self, dataset: Any, key: str, *rest: Any) -> None:
        super().__init__(dataset, key, *rest)
        self._rows = dataset.hf_dataset.select_columns([key]).with_format("arrow")
        self._feature = dataset.meta.features[key]
        self._channels = pixel_axes(key, self._feature)
        self._scale = 1.0
        if str(self._feature["dtype"]).startswith(("float", "bool")):
            largest = max((float(self._numbers(*piece).max()) for piece in self.pieces()), default=1.0)
            self._scale = 255.0 if largest <= 1 else 1.0

    def pieces(self) -> list[tuple[int, int]]:
        total = len(self.dataset)
        return [(first, min(first + self.per_call, total)) for first in range(0, total, self.per_call)]

    def frames(self, begin: int, end: int) -> np.ndarray:
        pixels = np.moveaxis(self._numbers(begin, end), 1 + self._channels, -1) * self._scale
        bad = ~((pixels >= 0) & (pixels <= 255)).all(axis=(1, 2, 3))
        if bad.any():
            step = begin + int(bad.argmax())
            raise self._error(step, f"step {step} holds numbers that are neither 0 to 255 nor 0 to 1")
        colours = pixels.repeat(3, axis=-1) if pixels.shape[-1] == 1 else pixels[..., :3]
        return np.ascontiguousarray(np.round(colours).astype(np.uint8))

    def _numbers(self, begin: int, end: int) -> np.ndarray:
        return read_column(self._rows[begin:end], self.key, self._feature)


class _Video(_Camera):
    """Pictures in video files, many per call (18 times faster than frame by frame)."""

    def pieces(self) -> list[tuple[int, int]]:
        bounds = np.flatnonzero(np.diff(self.episodes, prepend=-1, append=-1)).tolist()
        return [
            (first, min(first + self.per_call, end))
            for begin, end in pairwise(bounds)
            for first in range(begin, end, self.per_call)
        ]

    def frames(self, begin: int, end: int) -> np.ndarray:
        from lerobot.datasets.video_utils import FrameTimestampError, decode_video_frames

        index = int(self.episodes[begin])
        path = video_file(self.dataset, index, self.key)
        key = name_in_files(self.dataset.meta, self.key)
        offset = self.dataset.meta.episodes[index][f"videos/{key}/from_timestamp"]
        stamps = [offset + stamp for stamp in self.stamps[begin:end].tolist()]
        try:
            frames = decode_video_frames(path, stamps, self.dataset.tolerance_s, return_uint8=True)
        except FrameTimestampError as error:
            raise self._error(begin, self._describe_gap(str(error)), path) from error
        except Exception as error:  # each decoder raises its own
            raise self._error(
                begin,
                f"the video cannot be decoded ({_first_line(error)}): copy or download the file again, or leave the "
                "episode out with dataset.episodes",
                path,
            ) from None
        return frames.permute(0, 2, 3, 1).numpy()

    def _describe_gap(self, said: str) -> str:
        """Describe the time gap between rows and frames, from LeRobot's message, and the option that accepts it."""
        tolerance, frame = self.dataset.tolerance_s, 1 / self.dataset.meta.fps
        found = re.search(r"tolerance \(tensor\(\[(.*?)\]", said, re.DOTALL)
        gaps = [float(number) for number in re.findall(r"\d[\d.]*(?:e[-+]?\d+)?", found[1])] if found else []
        if not gaps:
            return (
                f"the video has no frames at the times of the rows ({said.splitlines()[0]}): it is shorter than its "
                "table, or of another episode; leave the episode out with dataset.episodes"
            )
        accepts = f"dataset.tolerance_s {_round_up(1.05 * max(gaps) + 1e-6):g} accepts the nearest frame"
        text = (
            f"its frames are up to {max(gaps):.4g} s away from the times of the rows, more than dataset.tolerance_s "
            f"({tolerance:g}); a frame lasts {frame:.4g} s"
        )
        if max(gaps) > frame / 2:
            return f"{text}, so that rows and frames may not belong together. Check the recording; {accepts}."
        return f"{text}. {accepts}."


def _round_up(value: float) -> float:
    """Return the next number of two significant digits."""
    scale = 10.0 ** (np.floor(np.log10(value)) - 1)
    return float(np.ceil(value / scale) * scale)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
