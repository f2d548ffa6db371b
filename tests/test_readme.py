"""The README says nothing that is not so: its examples run, its numbers are those on record."""

import json
import re
import shlex
from pathlib import Path

import torch
import torch.nn.functional as F
import typer

import laco_kernels as lk
from laco_kernels.bench import page
from laco_kernels.bench.results import device_folders
from laco_kernels.cli import app
from laco_kernels.cli.publish import END, START
from laco_kernels.nn import COMPRESSORS
from laco_kernels.train.conversation import parse
from laco_kernels.train.recipe import load_recipe, packaged
from tests.hf.encoders import pixels, stock

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
    assert len(EXAMPLES) == 6
    names = run(EXAMPLES[5], {}, tmp_path, monkeypatch)
    assert names["y"].shape == (2, 145, 64)
    assert names["z"].shape == (2, 144, 64)
    assert names["v"].shape == (2, 144, 64)
    assert names["w"].shape == (2, 576, 64)


def test_the_compressors_example_runs_as_written(tmp_path, monkeypatch, capsys):
    names = run(EXAMPLES[3], {}, tmp_path, monkeypatch)
    assert names["tokens"].shape == (2, 144, 96)
    assert names["grid"] == (12, 12)
    assert capsys.readouterr().out == f"144 {sorted(COMPRESSORS)}\n"


def test_the_multimodal_models_example_runs_as_written(tmp_path, monkeypatch, capsys):
    names = run(EXAMPLES[4], {}, tmp_path, monkeypatch)
    assert capsys.readouterr().out == "ImageTokens(image_size=(384, 384), patches=(27, 27), tokens=196)\n"
    assert names["answer"].shape[1] <= names["inputs"]["input_ids"].shape[1] + 8
    assert lk.hf.check_processor(names["reloaded"], names["again"]).tokens == 196
    assert names["reloaded"].generate(**names["inputs"], max_new_tokens=8, do_sample=False).equal(names["answer"])


COMMANDS = re.findall(r"^(?:torchrun .* -m laco_kernels.cli|laco) (.*?)(?:  +#.*)?$", README, re.MULTILINE)
COMMANDS += re.findall(r"`laco ([a-z].*?)`", README)


def test_every_command_is_one(monkeypatch, tmp_path):
    assert len(COMMANDS) > 20
    for line in COMMANDS:
        command, words = typer.main.get_command(app), shlex.split(line.partition(" > ")[0])
        context = typer.Context(command)
        while hasattr(command, "commands"):
            name, words = words[0], words[1:]
            command = command.commands[name]
            context = typer.Context(command, parent=context, info_name=name)
        try:
            command.parse_args(context, list(words))
        except Exception as error:
            if words:  # without arguments it is a command's name
                raise AssertionError(line) from error
    monkeypatch.chdir(tmp_path)
    recipes = [shlex.split(line)[1:] for line in COMMANDS if line.startswith("train laco-")]
    for name, *rest in recipes:
        assert name in packaged()
        overrides = [rest[i + 1] for i, word in enumerate(rest) if word == "--set"]
        if "data.path" in str(overrides):
            load_recipe(name, overrides)
    for text in re.findall(r"--set ('[^']*'|[a-z][\w.]*=\w+)`", README):
        load_recipe("stf-finetune", ["data.path=data.json", *shlex.split(text)])


def test_the_conversation_is_one():
    (example,) = json.loads(re.search(r"```json\n(.*?)```", README, re.DOTALL)[1])
    messages, images = parse(example)
    assert images == ["kitchen.jpg"]
    assert [message["role"] for message in messages] == ["user", "assistant"]


def test_the_compressors_stand_where_the_table_says():
    table = README.partition("| where | `lk.nn.COMPRESSORS` |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([^`]+)`", line) for line in table.splitlines()[2:]]
    sorts = [set(), set(), set(), set()]
    for name, kind in COMPRESSORS.items():
        place = 3 if "before" in kind.places else 2 if "inside" not in kind.places else 1 if kind.reads_attention else 0
        sorts[place].add(name)
    assert [set(row) for row in rows] == sorts


def test_a_new_compressor_is_a_file_and_a_line(monkeypatch):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = {}
    exec(compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "max_pool.py", "exec", dont_inherit=True), names)
    monkeypatch.setitem(COMPRESSORS, "max_pool", names["MaxPool"])
    pool = lk.nn.build_compressor("max_pool", in_dim=8, prefix_tokens=1, residual=True)
    x = torch.randn(2, 16, 8)
    y, grid = pool(x, (5, 3))
    image = x[:, 1:].transpose(1, 2).unflatten(2, (5, 3))
    expected = F.max_pool2d(image, 2, ceil_mode=True) + F.avg_pool2d(image, 2, ceil_mode=True)
    assert grid == (3, 2)
    torch.testing.assert_close(y[:, 1:], expected.flatten(2).transpose(1, 2))
    model = lk.hf.compress(stock("clip", 5, dtype=torch.float32), compressor="max_pool", layer=2)
    assert model(pixels(5, dtype=torch.float32)).last_hidden_state.shape == (2, 10, 32)


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


def test_the_compressors_rows_are_the_recorded_ones():
    section = re.search(r"<!-- compressors-\S+ -->\n(.*?)<!-- end of compressors -->", README, re.DOTALL)[1]
    picture = re.search(r"!\[.*?\]\((benchmarks/results/\S+)\.png\)", section)[1]
    assert (ROOT / f"{picture}.png").is_file()
    recorded = (ROOT / f"{picture}.md").read_text()
    rows = [line for line in recorded.splitlines() if line.startswith("|")]
    wanted = [line for line in rows if not re.match(r"\| \S+ \| [3-9] \|", line)]
    assert [line for line in section.splitlines() if line.startswith("|")] == wanted
    assert {line.split()[1] for line in wanted if line.startswith("| ")} >= set(COMPRESSORS)
    assert re.search(r"^Measured on .*$", recorded, re.MULTILINE)[0] in section


def test_the_demo_learned_what_the_readme_says():
    record = (ROOT / "benchmarks/results/cpu-amd-epyc-2-threads/train-demo.md").read_text()
    recorded = re.findall(r"^\| (\S.*?) \| (.*%) \| (.*%) \| (.*%) \(.*\) \| \d+ \|$", record, re.MULTILINE)
    assert len(recorded) == 8
    for row in recorded:
        assert f"| {' | '.join(row)} |" in README


def test_the_study_found_what_the_readme_says():
    content = json.loads((ROOT / "benchmarks/results/cpu-amd-epyc-2-threads/study-tiny-tower-ratio2.json").read_text())
    short, long = (
        {(row["compressor"], row["residual"], row["depth"]): 100 * row["after"][i]["mean"] for row in content["rows"]}
        for i in range(2)
    )
    assert content["steps"] == [50, 400]
    assert content["seeds"] == 3
    laco = short["laco", "on", "1/4"]
    others = [laco - read for (name, residual, _), read in short.items() if name not in ("laco", None) and residual != "on"]
    assert [round(x) for x in (laco, laco - short["laco", "off", "1/4"], min(others), max(others))] == [51, 16, 21, 40]
    for name in ("laco", "pixel_shuffle"):
        assert round(long[name, "off", "1/4"] - long[name, "on", "1/4"]) == 5
    for reads in (short, long):
        for residual in ("on", "off"):
            by_depth = [reads["laco", residual, depth] for depth in ("1/12", "1/6", "1/4", "1/2", "1")]
            assert by_depth == sorted(by_depth)


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
