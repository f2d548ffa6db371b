"""LLaVA's data for training: :class:`ConversationDataset`, :class:`Collator`, :class:`EpochSampler`, :func:`inspect`.

``inspect`` reads everything but pixels, and returns a dataset without the samples that cannot be used. What only decoding
shows, a damaged image, is left out when it is its turn: the batch has one row less, and nothing takes its place, so that the
order of samples is a function of seed and epoch alone and an interrupted run goes on where it was. Every batch tells in its
notes which samples are in it and which were left out, as workers of a DataLoader count for themselves; whoever trains takes
the notes with :func:`take_notes` and keeps a :class:`~laco_kernels.train.skipping.Tally`.
"""

from __future__ import annotations

import copy
import errno
from array import array
from collections import Counter
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, UnidentifiedImageError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers import LlavaProcessor

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.images import BOMB, open_image, peek_image, reason
from laco_kernels.train.conversation import IGNORED, encode, parse
from laco_kernels.train.skipping import BadSampleError, Cause, Skipped, Tally

if TYPE_CHECKING:
    from laco_kernels.train.mixture import Records

#: How many times longer than wide an image may be: scaling the short side up would make the long one enormous.
LONGEST = 200


@dataclass(frozen=True)
class Sample:
    """A conversation that can be trained on.

    Args:
        index: which of the data it is.
        id: its own, or its file and position.
        input_ids, labels: ``[tokens]``; labels are -100 but for the answers.
        pixel_values: ``[images, 3, height, width]``; ``None`` without images.
    """

    index: int
    id: str
    input_ids: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor | None


@dataclass(frozen=True)
class Notes:
    """What a batch is made of: the ids of its samples, row by row, and the samples that were left out of it."""

    ids: tuple[str, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found.

    Args:
        dataset: without what was left out.
        tally: what was left out; what loading leaves out counts on it.
        converted: how many images are not in RGB, by Pillow's mode, and are turned into it.
        images: how many images there are.
        longest: tokens of the longest sample that stays.
    """

    dataset: ConversationDataset
    tally: Tally
    converted: dict[str, int]
    images: int
    longest: int


class ConversationDataset(Dataset[Sample | Skipped]):
    """Samples of :func:`~laco_kernels.train.mixture.read_data`, tokenised and with their images when they are asked for.

    Args:
        records: the samples.
        processor: of :func:`laco_kernels.hf.build_processor`.
        max_length: in tokens, those of images included; longer samples are left out, not cut. No limit unless given.

    Raises:
        TypeError: ``processor`` is no ``LlavaProcessor`` with a fast tokenizer.
        ValueError: ``max_length`` is not positive.
    """

    def __init__(self, records: Records, processor: LlavaProcessor, max_length: int | None = None) -> None:
        if not isinstance(processor, LlavaProcessor) or not processor.tokenizer.is_fast:
            given = type(getattr(processor, "tokenizer", processor)).__name__
            remedy = "Build one with laco_kernels.hf.build_processor(model, tokenizer)"
            raise TypeError(complaint("processor", given, "a LlavaProcessor with a fast tokenizer", remedy))
        self.records = records
        self.processor = processor
        self.max_length = None if max_length is None else integer("max_length", max_length, 1)
        self.indices: Sequence[int] = range(len(records))
        self._image_tokens = image_tokens_of(processor)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Sample | Skipped:
        """Return a sample, or why there is none.

        Raises:
            OSError: the disk fails, which is not the sample's fault.
        """
        index = self.indices[place]
        try:
            files, ids, labels = self.read(index)
            images = [_open(file) for file in files]
        except BadSampleError as error:
            return Skipped(index, self.id_of(index), error.cause, error.detail)
        pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"] if images else None
        return Sample(index, self.id_of(index), torch.tensor(ids), torch.tensor(labels), pixels)

    def read(self, index: int) -> tuple[list[Path], list[int], list[int]]:
        """Return the image files, token ids and labels of a record.

        Raises:
            BadSampleError: it cannot be used.
        """
        source, _, record = self.records[index]
        messages, images = parse(record)
        ids, labels = encode(self.processor, messages, self._image_tokens)
        if self.max_length is not None and len(ids) > self.max_length:
            raise BadSampleError(Cause.TOO_LONG, f"{len(ids)} tokens, more than {self.max_length}")
        return [source.image_folder / image for image in images], ids, labels

    def id_of(self, index: int) -> str:
        """Return a record's id, or its file and position where it has none."""
        source, position, record = self.records[index]
        own = record.get("id") if isinstance(record, dict) else None
        name = f"{source.path.name}#{position}" if own is None else str(own)
        # It is printed, and is not to command a terminal.
        return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name)

    def only(self, indices: Sequence[int]) -> ConversationDataset:
        """Return a dataset of these records."""
        part = copy.copy(self)
        part.indices = array("q", indices)  # which workers share, unlike a list
        return part


class Collator:
    """Makes a batch of samples: padded on the right, images of all samples one behind the other.

    A batch is ``input_ids``, ``attention_mask`` and ``labels`` ``[rows, tokens]``, ``pixel_values``
    ``[images, 3, height, width]``, and ``notes``, which :func:`take_notes` takes out. Samples that are left out leave no row. A
    batch without an image, because its samples have none or were all left out, gets one row more: a black image, with no
    label. It teaches nothing, and lets the encoder take part, without which DDP and FSDP wait for its gradients. Where a
    whole batch is left out the loss is thus a sum over nothing: pass ``num_items_in_batch``, as the Trainer does, for 0
    instead of NaN.

    Args:
        processor: of the dataset.
        always_images: whether a batch without an image gets that row. A batch of nothing always does.

    Raises:
        ValueError: the tokenizer has no padding token.
    """

    def __init__(self, processor: LlavaProcessor, always_images: bool = True) -> None:
        self.padding = processor.tokenizer.pad_token_id
        if self.padding is None:
            remedy = "Set tokenizer.pad_token, or build a processor with laco_kernels.hf.build_processor"
            raise ValueError(complaint("pad_token", None, "a token to fill up rows with", remedy))
        self.always_images = always_images
        ids = torch.full((image_tokens_of(processor),), processor.image_token_id)
        pixels = processor.image_processor(images=[Image.new("RGB", (32, 32))], return_tensors="pt")["pixel_values"]
        self._stand_in = Sample(-1, "", ids, torch.full_like(ids, IGNORED), pixels)

    def __call__(self, samples: Sequence[Sample | Skipped]) -> dict[str, Any]:
        """Return the batch of these samples."""
        rows = [sample for sample in samples if isinstance(sample, Sample)]
        skipped = tuple(sample for sample in samples if isinstance(sample, Skipped))
        notes = Notes(tuple(sample.id for sample in rows), skipped)
        if not rows or (self.always_images and all(sample.pixel_values is None for sample in rows)):
            rows.append(self._stand_in)
        pixels = [sample.pixel_values for sample in rows if sample.pixel_values is not None]
        mask = [torch.ones_like(sample.input_ids) for sample in rows]
        batch = {
            "input_ids": pad_sequence([sample.input_ids for sample in rows], True, self.padding),
            "attention_mask": pad_sequence(mask, True, 0),
            "labels": pad_sequence([sample.labels for sample in rows], True, IGNORED),
            **({"pixel_values": torch.cat(pixels)} if pixels else {}),
        }
        return {**batch, "notes": notes}


def take_notes(batch: MutableMapping[str, Any]) -> Notes:
    """Take the notes out of a batch, which is then what a model is called with."""
    return batch.pop("notes")


class EpochSampler(Sampler[int]):
    """An order of samples that depends on seed and epoch alone.

    Accelerate shares its batches among processes and calls :meth:`set_epoch` when an epoch begins.

    Args:
        size: how many samples there are.
        seed: of the order.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        first = torch.randint(2**62, (), generator=torch.Generator().manual_seed(self.seed))
        generator = torch.Generator().manual_seed(int(first) + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


def inspect(dataset: ConversationDataset, cap: float = 0.01) -> Inspection:
    """Look at every sample but its pixels: the conversation, its length, and the headers of its images.

    Args:
        dataset: all samples.
        cap: how many may be left out, here and later, as :class:`~laco_kernels.train.skipping.Tally` takes it.

    Raises:
        TooManySkippedError: more samples than ``cap`` cannot be used. All were looked at, and all causes are named.
    """
    tally = Tally(len(dataset), cap)
    kept, skipped, longest = [], [], 0
    modes: Counter[str] = Counter()
    for index in dataset.indices:
        try:
            files, ids, _ = dataset.read(index)
            found = [_peek(file) for file in files]
        except BadSampleError as error:
            skipped.append(Skipped(index, dataset.id_of(index), error.cause, error.detail))
            continue
        kept.append(index)
        modes.update(found)
        longest = max(longest, len(ids))
    tally.add(skipped)
    converted = {mode: count for mode, count in modes.items() if mode != "RGB"}
    return Inspection(dataset.only(kept), tally, converted, modes.total(), longest)


def image_tokens_of(processor: LlavaProcessor) -> int:
    """Return how many tokens a processor writes for an image; all images are made one size."""
    return processor._get_num_multimodal_tokens(image_sizes=[[32, 32]]).num_image_tokens[0]


def _open(file: Path) -> Image.Image:
    _peek(file)
    try:
        return open_image(file)
    except Exception as error:
        raise _bad(file, error) from error


def _peek(file: Path) -> str:
    """Return an image's mode."""
    try:
        if not file.is_file():
            raise FileNotFoundError(errno.ENOENT, "no such file")
        (width, height), mode = peek_image(file)
    except Exception as error:  # a damaged file raises whatever its decoder raises
        raise _bad(file, error) from error
    if min(width, height) < 2:
        raise BadSampleError(Cause.TINY, f"{file}: {width} x {height} pixels")
    if max(width, height) > LONGEST * min(width, height):
        raise BadSampleError(Cause.ELONGATED, f"{file}: {width} x {height} pixels")
    return mode


def _bad(file: Path, error: Exception) -> Exception:
    """Return what to raise: the sample's fault by its cause, the machine's as it is."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return BadSampleError(Cause.MISSING, str(file))
    if number in (errno.EACCES, errno.EPERM):
        return BadSampleError(Cause.UNREADABLE, str(file))
    if number is not None or isinstance(error, MemoryError):
        return error
    cause = Cause.BOMB if isinstance(error, BOMB) else Cause.DAMAGED
    if isinstance(error, UnidentifiedImageError):
        cause = Cause.EMPTY_FILE if file.stat().st_size == 0 else Cause.NO_IMAGE
    return BadSampleError(cause, f"{file}: {reason(file, error)}")
