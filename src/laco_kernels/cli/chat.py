"""``laco chat``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from laco_kernels.cli.common import (
    Device,
    Json,
    app,
    err_console,
    parse_device,
    parse_dtype,
    print_json,
    progress_bar,
    quiet_transformers,
    usage_errors,
)
from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image


@app.command()
def chat(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="One photo or several.")],
    question: Annotated[str, typer.Argument(help="What to ask about them.")],
    model: Annotated[str, typer.Option(help="A folder with a model and its processor, or a hub name.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0: the likeliest token every time.")] = 0.0,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; default: bfloat16 on a GPU.")] = None,
    as_json: Json = False,
) -> None:
    """Ask a multimodal model about photos; the answer appears as it is written.

    TTFT in the JSON is the time from the prepared prompt to the first token, image encoding included.
    """
    with usage_errors():
        import laco_kernels.hf  # noqa: F401 - registers the compressed models
        from laco_kernels.hf import answer

        quiet_transformers()
        place, precision = parse_device(device), parse_dtype(dtype, device)
        if not question.strip():
            raise ValueError(complaint("question", repr(question), "some text", "Put the question last, in quotes"))
        photos = _open(images)
        if answer.is_folder(model) and not Path(model).is_dir():
            remedy = "Check the spelling, or pass a hub name such as owner/name"
            raise ValueError(complaint("model", repr(model), "a folder that exists", remedy))
        with progress_bar() as step:
            step(f"loading {model}", 0.0)
            pair = answer.load_pair(model, device=place, dtype=precision)

        def tell(text: str) -> None:
            # What would command a terminal is not for a model to say.
            print("".join(letter for letter in text if letter.isprintable() or letter in "\n\t"), end="", flush=True)

        found = answer.answer(
            *pair,
            photos,
            question,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            tell=(lambda _: None) if as_json else tell,
        )
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    print()
    err_console.print(
        f"{found.tokens} tokens in {found.seconds:.2f} s, the first after {found.ttft:.2f} s", style="dim", highlight=False
    )


def _open(files: Sequence[Path]) -> list[Image.Image]:
    """Open all photos; ValueError, with the reason, for the first that cannot be read."""
    from laco_kernels.images import open_image, reason

    opened = []
    for file in files:
        try:
            opened.append(open_image(file))
        except Exception as error:  # a damaged file raises whatever its decoder raises
            given = f"{file}, which does not exist" if not file.exists() else f"{file}, {reason(file, error)}"
            raise ValueError(complaint("image", given, "a photo that can be read", "Pass another one")) from error
    return opened
