"""Labelled images: small ones decoded once into memory, large ones read when they are needed."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from deploypipe.data.listing import Listing
from deploypipe.errors import UsageError
from deploypipe.progress import Reporter

Normalise = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation per channel, of values in [0, 1]
Size = tuple[int, int, int]  # channels, height, width

IMAGENET: Normalise = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DIGITS_NORMALISE: Normalise = ((0.31,), (0.32,))
DIGITS_SIZE: Size = (1, 16, 16)
MEMORY_LIMIT_BYTES = 2**30
_DECODING = 2  # goes up when the same files are decoded to other pixels than before
SMALL = 64  # pixels: below, an image is an icon that is used whole; above, a photograph with a margin around its subject
_SIXTEEN_BITS = ("PNG", "PPM")  # formats without 32-bit greys, whose 16-bit ones Pillow may open as such
_MARGIN = 0.875  # of the shorter side stays after the centre crop, the ImageNet habit (224 of 256)


class Images(Dataset[tuple[Tensor, int]]):
    """Images in memory.

    Attributes:
        pixels: (N, C, H, W) uint8.
        labels: (N,) int64.
        normalise: Mean and standard deviation per channel, applied to pixels scaled to [0, 1].
        shape: (height, width) that they are scaled to when they are taken, where all at that size would be too many bytes.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, normalise: Normalise, shape: tuple[int, int] | None = None) -> None:
        assert pixels.dtype == torch.uint8
        assert len(pixels) == len(labels)
        self.pixels, self.labels, self.normalise, self.shape = pixels, labels.long(), normalise, shape
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in normalise)
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs, labels = self.take(torch.tensor([index]))
        return inputs[0], int(labels[0])

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalised images (B, C, H, W) and their labels (B,)."""
        pixels = self.pixels[indices]
        if self.shape is not None:
            pixels = _scaled(pixels, self.shape)
        return pixels.float().mul_(self._scale).add_(self._shift), self.labels[indices]


class Files(Dataset[tuple[Tensor, int]]):
    """Images too large to keep in memory: read, resized and cropped whenever they are asked for."""

    def __init__(self, files: Sequence[Path], labels: Tensor, size: Size, normalise: Normalise) -> None:
        self.files, self.labels, self.size, self.normalise = tuple(files), labels.long(), size, normalise

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs, labels = self.take(torch.tensor([index]))
        return inputs[0], int(labels[0])

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalised images (B, C, H, W) and their labels (B,)."""
        pixels = decode([self.files[i] for i in indices.tolist()], self.size)
        return Images(pixels, self.labels[indices], self.normalise).take(torch.arange(len(pixels)))


def native_size(listing: Listing) -> Size:
    """Return the size of the first image if it is small, else 3x224x224."""
    image = _open(listing.files[0], "RGB")
    return (3, image.height, image.width) if max(image.size) <= 2 * SMALL else (3, 224, 224)


def load_images(listing: Listing, size: Size, normalise: Normalise, cache: Path, reporter: Reporter) -> Images | Files:
    """Return the listed images at one size: in memory, and kept in `cache`, if they fit into 1 GiB.

    Raises:
        UsageError: An image cannot be read.
    """
    if len(listing.files) * size[0] * size[1] * size[2] > MEMORY_LIMIT_BYTES:
        return Files(listing.files, listing.labels, size, normalise)
    place = f"{listing.root.resolve()} {size}"
    stem = hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
    path = cache / f"{stem}-{listing.key}-{_DECODING}.safetensors"
    pixels = _cached(path)
    if pixels is None:
        pixels = _decode_all(listing, size, reporter)
        _keep(path, pixels, reporter)
    return Images(pixels, listing.labels, normalise)


def _cached(path: Path) -> Tensor | None:
    try:
        return load_file(path)["pixels"]
    except (OSError, SafetensorError, KeyError):  # absent, or damaged: decode again
        return None


def _keep(path: Path, pixels: Tensor, reporter: Reporter) -> None:
    """Store decoded pixels, and drop those of an earlier state of the same folder."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f"{path.stem.partition('-')[0]}-*"):
            old.unlink(missing_ok=True)
        save_file({"pixels": pixels}, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as failure:
        with suppress(OSError):
            temporary.unlink()
        reporter.note(f"decoded images are not cached: {failure}")


def _decode_all(listing: Listing, size: Size, reporter: Reporter) -> Tensor:
    reporter.stage(f"decode {listing.root.name}", len(listing.files))
    pixels = torch.empty((len(listing.files), *size), dtype=torch.uint8)
    for start in range(0, len(pixels), 1000):
        part = listing.files[start : start + 1000]
        pixels[start : start + len(part)] = decode(part, size)
        reporter.advance(start + len(part))
    return pixels


def decode(files: Sequence[Path], size: Size) -> Tensor:
    """Read images into (N, C, H, W) uint8: shorter side resized, centre cropped.

    Raises:
        UsageError: A file is not an image that can be read.
    """
    if min(size[1:]) < SMALL:  # reading small images is Python's own work, which threads only slow down
        arrays = [_read(file, size) for file in files]
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            arrays = list(pool.map(lambda file: _read(file, size), files))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def _read(file: Path, size: Size) -> NDArray[np.uint8]:
    """Return one image (H, W, C)."""
    channels, height, width = size
    image = _open(file, "L" if channels == 1 else "RGB")
    if image.size != (width, height):
        margin = 1.0 if min(height, width) < SMALL else _MARGIN
        scale = max(height / image.height, width / image.width) / margin
        shape = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        left, top = (shape[0] - width) // 2, (shape[1] - height) // 2
        image = image.resize(shape, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    array = np.asarray(image)
    return array[..., None] if channels == 1 else array


def _open(file: Path, mode: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return _eight_bits(image).convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as failure:
        fix = "replace or remove the file"
        raise UsageError(f"'{file.name}' is not a readable image: {failure}", at=str(file), fix=fix) from failure


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of 16-bit greys with 8 bits: `convert` would cut nearly all of them off at white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in {"I", "F"}:
        raise ValueError("it has 32 bits a pixel, and does not say which value is white; store it with 8 or 16")
    return image


def resized(images: Images, size: Size) -> Images:
    """Return in-memory images at another size: bilinear, and one channel repeated if three are asked for.

    What would then be more than 1 GiB keeps its size, and is scaled when it is taken: CIFAR-10 for a model of 224 pixels.

    Raises:
        UsageError: The channels cannot be made to fit.
    """
    channels, *shape = size
    pixels, later = images.pixels, None
    if list(pixels.shape[2:]) != shape:
        if len(pixels) * channels * shape[0] * shape[1] > MEMORY_LIMIT_BYTES:
            later = (shape[0], shape[1])
        else:
            pixels = torch.cat(
                [_scaled(part, shape) for part in torch.split(pixels, 1000)]
            )  # all as floats are four times as much
    if pixels.shape[1] == channels:
        return Images(pixels, images.labels, images.normalise, later)
    if pixels.shape[1] != 1:
        fix = f"use a model with {pixels.shape[1]} input channels"
        raise UsageError(f"the images have {pixels.shape[1]} channels, the model takes {channels}", at="--data", fix=fix)
    mean, std = (values * channels if len(values) == 1 else values for values in images.normalise)
    return Images(pixels.expand(-1, channels, -1, -1).contiguous(), images.labels, (mean, std), later)


def _scaled(pixels: Tensor, shape: Sequence[int]) -> Tensor:
    """Return (N, C, H, W) uint8 at another height and width."""
    scaled = F.interpolate(pixels.float(), list(shape), mode="bilinear", antialias=True)
    return scaled.round_().clamp_(0, 255).to(torch.uint8)
