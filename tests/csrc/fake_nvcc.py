"""Stands in for nvcc, in no time: an object is its options and all text that a compiler would read, a library its objects.

``FAKE_FAIL`` names a source that fails, ``FAKE_WAIT`` a file to wait for, both half way; ``FAKE_EDIT`` a header that somebody
edits meanwhile. Sources that were compiled are written to ``calls``.
"""

import os
import re
import sys
import time
from pathlib import Path

OPTIONS = r"-D\w+|-gencode=\S+"


def files(source):
    """A source and every file that it includes, in order."""
    included = re.findall(r'^#include "(.*)"', source.read_text(), re.MULTILINE)
    return [source, *(file for name in included for file in files(source.parent / name))]


def text(source):
    return "".join(file.read_text() for file in files(source))


def compile_one(arguments, made):
    source = next(Path(argument) for argument in arguments if argument.endswith((".cu", ".cpp")))
    with Path("calls").open("a") as calls:
        calls.write(f"{source.name}\n")
    options = " ".join(filter(re.compile(OPTIONS).fullmatch, arguments))
    seen = f"{options}\n{text(source)}"
    rule = " \\\n    ".join(map(str, files(source)))
    Path(arguments[arguments.index("-MF") + 1]).write_text(f"{made} : {rule}\n")
    if edited := os.environ.get("FAKE_EDIT"):
        Path(edited).write_text("edited\n")
    made.write_text(seen[: len(seen) // 2])
    if source.name == os.environ.get("FAKE_FAIL"):
        sys.exit("half way")
    while (awaited := os.environ.get("FAKE_WAIT")) and not Path(awaited).exists():
        time.sleep(0.01)
    made.write_text(seen)


def main(arguments):
    if "--version" in arguments:
        print(os.environ.get("FAKE_VERSION", "nvcc"))
        return
    made = Path(arguments[arguments.index("-o") + 1])
    if "-c" in arguments:
        compile_one(arguments, made)
    else:
        made.write_text("".join(Path(argument).read_text() for argument in arguments if argument.endswith(".o")))
        if os.environ.get("FAKE_FAIL") == "link":
            sys.exit("half way")


if __name__ == "__main__":
    main(sys.argv[1:])
