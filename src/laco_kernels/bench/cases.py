"""The encoders that the benchmark knows by name, and what the LaCo paper reports for them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from laco_kernels.errors import complaint

FOLDER = Path(__file__).parent / "encoders"
DEFAULT_ENCODER = "aimv2-l-336"
DEFAULT_DEPTHS = "1/12,1/6,1/4,1/2,1"

# Vision time in ms by depth (LaCo, Tables 4 and 8), GPU and batch size not stated there.
PAPER_MS: dict[str, dict[Fraction, float]] = {
    "aimv2-l-336": {
        Fraction(1, 12): 23.5,
        Fraction(1, 6): 26.2,
        Fraction(1, 4): 29.3,
        Fraction(1, 2): 39.0,
        Fraction(1): 58.0,
    },
    "siglip-so400m-384": {Fraction(1, 4): 57.3, Fraction(1): 146.5},
    "internvit-300m-448": {Fraction(1, 4): 43.4, Fraction(1): 107.6},
}

# Inference throughput of the whole multimodal model, the column "TPS" (LaCo, Tables 4 and 8).
PAPER_TPS: dict[str, dict[Fraction, float]] = {
    "aimv2-l-336": {
        Fraction(1, 12): 28.2,
        Fraction(1, 6): 27.7,
        Fraction(1, 4): 27.4,
        Fraction(1, 2): 26.3,
        Fraction(1): 24.0,
    },
    "siglip-so400m-384": {Fraction(1, 4): 24.0, Fraction(1): 18.0},
    "internvit-300m-448": {Fraction(1, 4): 25.5, Fraction(1): 19.0},
}

LLAVA, STF = "LLaVA-1.5", "STF"
# STF's paper: time to first token on an A100 at batch 16 and seconds of a fine-tuning step on 8 A6000 at batch 128.
PAPER_TTFT_MS = {LLAVA: 346.2, STF: 103.8}
PAPER_STEP_S = {LLAVA: 27.8, STF: 18.6}
# LaCo's paper: a training step at @1 over one at @1/4.
PAPER_STEP_RATIO = {"@1": 1.0, "@1/4": 1.35}


def encoder_names() -> list[str]:
    """Return the names of the encoders whose architecture the package carries."""
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def paper_ratio(encoder: str, depth: Fraction) -> float | None:
    """Return the paper's vision time @1 over that at ``depth``, or ``None`` where it reports none."""
    times = PAPER_MS.get(encoder, {})
    return times[Fraction(1)] / times[depth] if depth in times else None


def parse_depths(text: str, yardstick: Fraction | None = Fraction(1)) -> list[Fraction]:
    """Read a list such as ``"1/12,1/4,1"``; ``yardstick``, if there is one, is added where it is missing.

    Raises:
        ValueError: if an entry is not a fraction in (0, 1].
    """
    depths = []
    for part in text.split(","):
        try:
            depth = Fraction(part.strip())
        except (ValueError, ZeroDivisionError):
            depth = Fraction(0)
        if not 0 < depth <= 1:
            remedy = f"Pass a list such as {DEFAULT_DEPTHS}"
            raise ValueError(complaint("depths", repr(part.strip()), "fractions in (0, 1]", remedy))
        depths.append(depth)
    return sorted({*depths} if yardstick is None else {*depths, yardstick})
