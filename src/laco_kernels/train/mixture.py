"""Lists of samples: LLaVA's JSON and JSONL, and mixtures of them in YAML as LLaVA-OneVision writes them."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from array import array
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from collections.abc import Iterable

_STRATEGY = re.compile(r"(first|end|random):(\d+(?:\.\d+)?%|\d+)")
_KEYS = {"json_path", "sampling_strategy", "image_folder"}


@dataclass(frozen=True)
class Source:
    """A file of samples in a mixture.

    Args:
        path: the JSON or JSONL file.
        image_folder: where its images lie.
        strategy: what is taken of it.
        total, taken: how many samples it has, and how many are taken.
    """

    path: Path
    image_folder: Path
    strategy: str
    total: int
    taken: int


class Records:
    """Samples as they were read, in one piece of memory.

    A list of millions of dictionaries would be copied into each worker of a DataLoader little by little, as counting
    references writes to it.

    Args:
        sources: files they are from.
        records: of each, its source's number, its position there, and the sample itself.
    """

    def __init__(self, sources: Iterable[Source], records: Iterable[tuple[int, int, Any]]) -> None:
        self.sources = tuple(sources)
        text, self._ends = bytearray(), array("Q", [0])
        for record in records:
            text += json.dumps(record).encode()
            self._ends.append(len(text))
        self._text = bytes(text)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[Source, int, Any]:
        """Return a sample's source, its position there, and the sample."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        source, position, record = json.loads(self._text[self._ends[index] : self._ends[index + 1]])
        return self.sources[source], position, record

    def fingerprint(self) -> str:
        """Return a hash of all samples in their order: equal where an interrupted run can go on with them."""
        return hashlib.sha256(self._text).hexdigest()


def read_data(path: Path | str, image_folder: Path | str | None = None, seed: int = 0) -> Records:
    """Read samples from a JSON or JSONL file, or from those of a mixture.

    A mixture is YAML: ``datasets: [{json_path: a.json, sampling_strategy: "random:10%", image_folder: images}, ...]``. A
    strategy is ``all``, or ``first``, ``end`` or ``random`` with a number or a percentage, rounded up; what is taken stays in
    the file's order. Paths are relative to the YAML file.

    Args:
        path: the file.
        image_folder: where images lie unless the mixture says; the folder that the file of samples is in unless given.
        seed: of ``random``; each dataset of a mixture draws its own numbers.

    Raises:
        ValueError: the file is not what its name says, or asks for more samples than there are; naming the line.
        OSError: it cannot be read.
    """
    path = Path(path)
    given = None if image_folder is None else Path(image_folder)
    entries: list[dict[str, str]] = [{"json_path": path.name}]
    if path.suffix in (".yaml", ".yml"):
        entries = _read_mixture(path)
    sources, records = [], []
    for number, entry in enumerate(entries):
        file = path.parent / entry["json_path"]
        samples = _read_samples(file)
        strategy = entry.get("sampling_strategy", "all")
        chosen = choose(strategy, len(samples), f"{seed} {number} {entry['json_path']}")
        folder = path.parent / entry["image_folder"] if "image_folder" in entry else given or file.parent
        sources.append(Source(file, folder, strategy, len(samples), len(chosen)))
        records += [(number, index, samples[index]) for index in chosen]
    return Records(sources, records)


def choose(strategy: str, total: int, seed: str) -> list[int]:
    """Return which of ``total`` samples a strategy takes, in their order.

    Raises:
        ValueError: there is no such strategy, or there are fewer samples than it takes.
    """
    match = _STRATEGY.fullmatch(strategy)
    if strategy != "all" and match is None:
        expected = "all, or first:N, end:N or random:N, with N or N%"
        raise ValueError(complaint("sampling_strategy", repr(strategy), expected, "Correct the mixture"))
    if match is None:
        return list(range(total))
    kind, amount = match.groups()
    count = math.ceil(Fraction(amount[:-1]) * total / 100) if amount.endswith("%") else int(amount)
    if count > total:
        given = f"{strategy!r} of {total} samples"
        raise ValueError(complaint("sampling_strategy", given, f"at most {total}", "Take fewer, or all"))
    if kind == "random":
        return sorted(random.Random(seed).sample(range(total), count))
    return list(range(count)) if kind == "first" else list(range(total - count, total))


def _read_mixture(path: Path) -> list[dict[str, str]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(complaint("data", f"{path} ({error})", "a mixture in YAML", "Correct it")) from error
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        remedy = "Write datasets: [{json_path: ..., sampling_strategy: all}]"
        raise ValueError(complaint("data", f"{path} without datasets", "a mixture with a list of datasets", remedy))
    for entry in entries:
        fits = isinstance(entry, dict) and "json_path" in entry and entry.keys() <= _KEYS
        if not fits or not all(isinstance(value, str) for value in entry.values()):
            expected = "json_path and, if need be, sampling_strategy and image_folder, all of them text"
            raise ValueError(complaint("data", f"{entry} in {path}", expected, "Correct the mixture"))
    return entries


def _read_samples(path: Path) -> list[Any]:
    line = 0
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            samples = []
            for line, written in enumerate(text.split("\n"), 1):  # noqa: B007, the line is for the complaint
                if written.strip():
                    samples.append(json.loads(written))
            return samples
        samples = json.loads(text)
    except ValueError as error:
        given = f"{path}, which is damaged" + (f" in line {line}" if line else "") + f" ({error})"
        raise ValueError(complaint("data", given, "JSON, or in a .jsonl file JSON line by line", "Copy it again")) from error
    if not isinstance(samples, list):
        raise ValueError(complaint("data", f"{path} with {type(samples).__name__}", "a list of samples", "Put [ and ] around"))
    return samples
