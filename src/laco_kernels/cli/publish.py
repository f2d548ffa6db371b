"""``laco tune`` and ``laco report``: what is made of measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from laco_kernels.cli.common import Json, app, err_console, out_console, print_json, usage_errors
from laco_kernels.errors import complaint

ROOT = Path("benchmarks/results")
Folder = Annotated[Path, typer.Argument(help="Folder of results, a folder for each device.")]


@app.command()
def tune(
    results: Folder = ROOT,
    out: Annotated[Path | None, typer.Option(help="File to write; default: the table this package ships.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would change and write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Write the table of what runs where, from measured rows: checked, and at least 3 % faster than anything simpler."""
    with usage_errors():
        import json

        from laco_kernels.bench import tune as tuning
        from laco_kernels.bench.results import Results, device_folders
        from laco_kernels.kernels import select

        file = out or select.TABLE
        found = tuning.table(Results.open(folder) for folder in device_folders(results))
        old = json.loads(file.read_text()) if file.exists() else {}
        found = {**old, **found}  # devices that these results do not know keep what they have
        changes = tuning.changes(old, found)
        if changes and not dry_run:
            tuning.write(found, file)
    if as_json:
        print_json({"table": found, "changes": changes, "file": str(file)})
        return
    for line in changes or ["nothing changed"]:
        out_console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not found:
        out_console.print("No rows of a GPU: the reference runs everywhere.", highlight=False)
    if changes and not dry_run:
        err_console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)


START, END = "<!-- performance -->", "<!-- end of performance -->"


class _ReadmeByDefault(TyperCommand):
    """``--readme`` without a path is ``--readme README.md``, which typer has no way of saying."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        following = [*args[1:], "-"]
        is_bare = [arg == "--readme" and after.startswith("-") for arg, after in zip(args, following, strict=True)]
        args = ["--readme=README.md" if bare else arg for arg, bare in zip(args, is_bare, strict=True)]
        return super().parse_args(ctx, args)


@app.command(cls=_ReadmeByDefault)
def report(
    results: Folder = ROOT,
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.md.")] = Path("report"),
    readme: Annotated[
        Path | None, typer.Option(help="A README whose performance section to write instead; README.md if none is named.")
    ] = None,
) -> None:
    """Write one HTML page and one Markdown file of everything that was measured."""
    with usage_errors():
        from laco_kernels.bench import page
        from laco_kernels.bench.report import check_folder
        from laco_kernels.bench.results import device_folders

        folders = device_folders(results)
        if readme is not None:
            text = readme.read_text(encoding="utf-8")
            if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
                remedy = "Put both comments where the section belongs"
                raise ValueError(complaint("readme", str(readme), f"one {START} before one {END}", remedy))
            head, tail = text[: text.index(START) + len(START)], text[text.index(END) :]
            files = {readme: f"{head}\n{page.readme_section(folders)}\n{tail}"}
        else:
            check_folder(out)
            out.mkdir(parents=True, exist_ok=True)
            files = {out / "report.html": page.html(folders), out / "report.md": page.markdown(folders)}
        for file, text in files.items():
            part = file.with_name(f".{file.name}.part")
            part.write_text(text, encoding="utf-8")
            part.replace(file)
    for file in files:
        err_console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
