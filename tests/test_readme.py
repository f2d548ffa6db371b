"""The README says nothing that is not so: its examples run, its numbers are those on record."""

import re
from pathlib import Path

import torch

from laco_kernels.bench import page
from laco_kernels.bench.results import device_folders
from laco_kernels.cli.publish import END, START

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code, names, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_encoders_examples_run_as_written(tmp_path, monkeypatch, capsys):
    names = run(EXAMPLES[0], {}, tmp_path, monkeypatch)
    assert capsys.readouterr().out.split("\n")[:2] == ["torch.Size([1, 576, 1024])", "torch.Size([1, 144, 1024])"]
    state = names["compressed"].state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in names["reloaded"].state_dict().items())
    run(EXAMPLES[1], names, tmp_path, monkeypatch)
    assert "norm in one pass: 24" in capsys.readouterr().out


def test_the_connectors_example_runs_as_written(tmp_path, monkeypatch, capsys):
    run(EXAMPLES[2], {}, tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip() in EXAMPLES[2]


def test_the_operators_example_runs_as_written(tmp_path, monkeypatch):
    assert len(EXAMPLES) == 4
    names = run(EXAMPLES[3], {}, tmp_path, monkeypatch)
    assert names["y"].shape == (2, 145, 64)
    assert names["z"].shape == (2, 144, 64)
    assert names["v"].shape == (2, 144, 64)
    assert names["w"].shape == (2, 576, 64)


def test_the_table_is_the_recorded_one():
    section = re.search(r"<!-- (vec-\S+) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    picture = re.search(r"!\[.*?\]\((benchmarks/results/\S+)\.png\)", section[2])
    assert picture[1].rpartition("/")[2].startswith(section[1])
    assert (ROOT / f"{picture[1]}.png").is_file()
    recorded = (ROOT / f"{picture[1]}.md").read_text()
    rows = [line for line in recorded.splitlines() if line.startswith("|")]
    assert len(rows) == 7
    assert [line for line in section[2].splitlines() if line.startswith("|")] == rows
    machine = re.search(r"^Measured on .*$", recorded, re.MULTILINE)[0]
    assert machine in section[2]


def test_the_performance_section_is_the_one_that_laco_report_writes():
    section = README.partition(f"{START}\n")[2].partition(f"\n{END}")[0]
    assert section == page.readme_section(device_folders(ROOT / "benchmarks" / "results")), "run `laco report --readme`"


def test_the_encoders_times_are_those_on_record():
    recorded = {}
    for line in (ROOT / "benchmarks" / "results" / "nvidia-h200" / "encoders.txt").read_text().splitlines():
        found = re.match(r"(\S+) (\d+) (train)? ?\s*(\S+) (\S+) ([\d.]+) ms ([\d.]+)x mode ([\d.]+)x .* ok True", line)
        if found:
            name, batch, step, depth, mode, *numbers = found.groups()
            recorded[name, batch, bool(step), depth, mode] = numbers
    table = README.partition("### Faster encoders")[2].partition("### Operators")[0]
    columns = [(depth, mode) for mode in ("eager", "fused", "fused+graphs") for depth in ("1", "1/4")]
    rows = [re.match(r"\| (\S+), (\d+) \| (.*) \|$", line) for line in table.splitlines() if re.match(r"\| \S+, \d", line)]
    assert len(rows) == 5
    for row in rows:
        for (depth, mode), cell in zip(columns, row[3].split(" | "), strict=True):
            time, ratio, _ = recorded[row[1], row[2], False, depth, mode]
            assert cell == time + (f" ({ratio}x)" if (depth, mode) != columns[0] else "")
    steps = {
        name: [recorded[name, "16", True, depth, "fused"][2] for depth in ("1/4", "1")]
        for name, *_ in recorded
        if name != "clip-l-336"
    }
    text = " ".join(table.split())
    assert "took {}x at @1/4 and {}x at @1 for AIMv2".format(*steps["aimv2-l-336"]) in text
    assert (
        "for SigLIP {}x and {}x, for InternViT {}x and {}x".format(*steps["siglip-so400m-384"], *steps["internvit-300m-448"])
        in text
    )
