"""``laco bench ops``, ``all``, ``compare``, ``tune`` and ``report``, at tiny size on the processor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from laco_kernels.bench import environment, warm
from laco_kernels.bench.campaign import Report
from laco_kernels.bench.results import FILE, Results
from laco_kernels.cli import app, measure
from laco_kernels.cli.publish import END, START
from laco_kernels.kernels import select
from tests.bench.rows import GPU, op_row


def laco(*arguments):
    return CliRunner(env={"COLUMNS": "80", "TERM": "dumb"}).invoke(app, [str(argument) for argument in arguments])


ROOT = Path(__file__).parents[1]
OPS = ("bench", "ops", "--tiny", "--device", "cpu", "--rounds", 2, "--variants", "eager,eager-conv,products")


def test_words_of_a_filter():
    name = "patch_merge aimv2-l-336 block grid=24x24 batch=16 hidden=4096 forward bfloat16"
    assert all(
        measure.matches(name, words) for words in ("", "merge 336", "batch=16 block", "-vec", "forward -backward -batch=1")
    )
    assert not any(measure.matches(name, words) for words in ("vec", "batch=1", "-merge", "forward -block"))


def test_bench_ops_prints_a_table_a_case_within_80_columns():
    done = laco(*OPS, "--filter", "strided_conv forward")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("strided_conv_gelu tiny-clip-l-336 6x6") for line in lines) == 2
    assert sum(line.startswith("eager-conv") and line.rstrip().endswith("yes") for line in lines) == 2
    assert "2 measured, 0 measured before, 0 left for lack of time, 0 failed" in done.stdout


def test_bench_ops_keeps_rows_and_prints_json(tmp_path):
    done = laco(*OPS, "--filter", "patch_merge siglip batch=1 hidden=16 both", "--out", tmp_path, "--json", "--commit", "v1")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    (folder,) = tmp_path.iterdir()
    results = Results.open(folder)
    rows = list(results.rows.values())
    assert [row.variant for row in rows] == ["eager", "eager-conv", "products"]
    assert [vars(row) for row in rows] == printed["rows"]
    assert {row.commit for row in rows} == {"v1"}
    assert rows[0].case["grid"] == [7, 7], "an odd grid stays odd"
    (block,) = results.environments.values()
    assert block["ceilings"]["tflops"] > 0
    assert block["torch"] == torch.__version__
    assert printed["file"] == str(folder / FILE)


@pytest.mark.parametrize("words", ["add_norm x+scale*delta batch=1", "gated_silu backward tokens=4", "quick_gelu batch=4"])
def test_bench_ops_measures_what_is_inside_an_encoder(words, tmp_path):
    done = laco(*OPS[:-1], "eager,compile", "--filter", words, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"{'activate' if 'quick' in words else words.split()[0]} tiny-")
    assert sum(line.startswith("compile ") and line.rstrip().endswith("yes") for line in lines) in (1, 2)
    (folder,) = tmp_path.iterdir()
    rows = list(Results.open(folder).rows.values())
    assert {row.variant for row in rows} == {"eager", "compile"}
    assert {row.suite for row in rows} == {"tiny"}


def test_bench_all_resumes(tmp_path):
    arguments = (
        "bench",
        "all",
        "--tiny",
        "--device",
        "cpu",
        "--rounds",
        1,
        "--seconds",
        0,
        "--out",
        tmp_path,
        "--commit",
        "v1",
    )
    first = laco(*arguments)
    assert first.exit_code == 0, first.output
    assert "compil" not in first.stderr, "not ahead on a processor"
    assert "11 measured, 0 measured before, 0 left" in first.stdout
    (folder,) = tmp_path.iterdir()
    rows = Results.open(folder).rows
    assert {row.suite for row in rows.values()} == {"tiny"}, "kept out of tables and reports"
    second = laco(*arguments)
    assert "0 measured, 11 measured before, 0 left" in second.stdout
    assert Results.open(folder).rows == rows
    third = laco(*arguments[:-1], "v2", "--budget", "0s")
    assert "0 measured, 0 measured before, 11 left for lack of time" in third.stdout


def test_bench_all_compiles_ahead_and_that_is_part_of_the_budget(monkeypatch):
    asked = []
    monkeypatch.setattr(warm, "warm", lambda *arguments: asked.append(arguments) or (5, 1))
    monkeypatch.setattr(measure.time, "monotonic", iter([0.0, 150.0]).__next__)
    monkeypatch.setattr(measure, "_run", lambda *arguments: asked.append(arguments) or Report())
    done = laco("bench", "all", "--tiny", "--device", "cpu", "--warm", 3, "--budget", "3m")
    assert done.exit_code == 0, done.output
    assert "compiling 8 units in 3 processes, 36 s at most" in done.stderr
    assert "compiled 5 of 8 units, 1 broke in 150 s" in done.stderr
    (jobs, count, _, seconds, _), (*_, budget) = asked
    assert (len(jobs), count, seconds, budget) == (8, 3, 36.0, 30.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ops", "--filter", "nothing like it"), "filter: got 'nothing like it', expected words of a case's name"),
        (("ops", "--variants", "eager,magic"), "variants: got 'magic', expected names among eager, eager-conv"),
        (("ops", "--dtype", "int8"), "dtype: got 'int8'"),
        (("ops", "--device", "tpu"), "device: got 'tpu'"),
        (("all", "--budget", "soon"), "budget: got 'soon', expected a time such as 8m, 90s or 1h"),
        (("all", "--out", "/proc/nowhere"), "out: got '/proc/nowhere'"),
        (("compare", "/nowhere", "/nowhere"), f"results: got '/nowhere', expected a folder with {FILE}"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    done = laco("bench", *arguments)
    assert done.exit_code == 2, done.output
    assert message.split(",")[0].replace("'", "") in done.stderr.replace("'", "")
    assert done.stderr.count("error:") == 1


def test_a_busy_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(environment, "other_processes", lambda: [41, 42])
    monkeypatch.setattr(measure, "parse_device", lambda _: torch.device("cuda"))
    done = laco("bench", "ops", "--tiny")
    assert done.exit_code == 2
    assert "device: got a GPU on which other processes compute (pid 41, 42)" in done.stderr
    assert "--allow-busy" in done.stderr


def test_a_damaged_results_file_is_named_before_anything_is_measured(tmp_path):
    laco(*OPS, "--filter", "strided_conv forward batch=1", "--out", tmp_path)
    (folder,) = tmp_path.iterdir()
    text = (folder / FILE).read_text()
    (folder / FILE).write_text(text[:-9])
    done = laco(*OPS, "--filter", "strided_conv forward batch=1", "--out", tmp_path)
    assert done.exit_code == 2
    assert "in line 4 of" in done.stderr
    assert (folder / FILE).read_text() == text[:-9]


def test_a_failed_check_is_exit_code_1_and_no_time(monkeypatch):
    from laco_kernels.bench import op_variants

    right = op_variants._convolution
    monkeypatch.setattr(op_variants, "_convolution", lambda *a: right(*a) * 1.001)
    done = laco(*OPS, "--filter", "strided_conv forward batch=1")
    assert done.exit_code == 1
    assert "no time: eager-conv" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("eager-conv")]
    assert line.split() == ["eager-conv", "-", "-", "-", "-", "-", "NO"]


def test_a_compiled_backward_pass_is_timed():
    done = laco(
        *OPS[:-1], "eager,compile", "--filter", "patch_merge tiny-aimv2-l-336 raster batch=4 hidden=16 backward", "--json"
    )
    (row,) = [row for row in json.loads(done.stdout)["rows"] if row["variant"] == "compile"]
    assert row["values"]["reason"] is None
    assert row["values"]["timings"]
    assert row["suite"] == "tiny"


@pytest.fixture
def gpu_results(tmp_path):
    folder = tmp_path / "results" / "nvidia-h200"
    results = Results.open(folder)
    name = results.begin(GPU)
    results.add([op_row("eager", 100, environment=name), op_row("triton", 50, environment=name)])
    return folder


def test_a_path_that_cannot_be_written_to_is_named_as_it_was_given(gpu_results, tmp_path):
    for arguments in (["tune", gpu_results, "--out", tmp_path / "no" / "x.json"], ["report", "--readme", tmp_path / "no.md"]):
        done = laco(*arguments)
        assert done.exit_code == 2
        assert f"path: got '{arguments[-1]}' (No such file or directory), expected" in done.output


def test_tune_writes_the_table_and_says_what_changed(gpu_results, tmp_path):
    file = tmp_path / "winners.json"
    dry = laco("tune", gpu_results.parent, "--out", file, "--dry-run")
    assert "up to 144 tokens: nothing -> triton" in " ".join(dry.stdout.split())
    assert not file.exists()
    assert laco("tune", gpu_results.parent, "--out", file).exit_code == 0
    assert json.loads(file.read_text())["NVIDIA H200"]["rows"][0]["impl"] == "triton"
    assert "nothing changed" in laco("tune", gpu_results.parent, "--out", file).stdout
    assert laco("tune", tmp_path / "nowhere").exit_code == 2
    assert select.winners() is not None


def test_compare_finds_a_regression(gpu_results, tmp_path):
    later = Results.open(tmp_path / "later")
    name = later.begin(GPU)
    later.add([op_row("eager", 100, environment=name), op_row("triton", 60, environment=name)])
    done = laco("bench", "compare", gpu_results, tmp_path / "later")
    assert done.exit_code == 1
    assert "SLOWER 0.833x" in done.stdout
    assert "2 rows, 1 slower, 0 missing; geometric mean 0.913x" in done.stdout
    (tmp_path / "fewer").mkdir()
    fewer = Results.open(tmp_path / "fewer")
    fewer.add([op_row("eager", 100, environment=fewer.begin(GPU))])
    gone = laco("bench", "compare", gpu_results, tmp_path / "fewer")
    assert (gone.exit_code, "MISSING triton" in gone.stdout) == (1, True)
    other = Results.open(tmp_path / "other")
    other.add([op_row("eager", 100, environment=other.begin({**GPU, "device": "NVIDIA A100"}))])
    assert "NVIDIA A100 against NVIDIA H200" in laco("bench", "compare", gpu_results, tmp_path / "other").stderr
    same = laco("bench", "compare", gpu_results / FILE, gpu_results, "--json")
    assert same.exit_code == 0
    assert [change["ratio"] for change in json.loads(same.stdout)] == [1.0, 1.0]


def test_the_suite_for_pytest_benchmark_runs_and_keeps_the_case(tmp_path):
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--tiny", "-k", "not compile", "-q", "-p", "no:cacheprovider"]
    quick = ["--benchmark-max-time=0.01", "--benchmark-min-rounds=2", f"--benchmark-json={file}"]
    # In one of several processes of a test run pytest-benchmark would not measure.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*command, *quick], cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout
    rows = json.loads(file.read_text())["benchmarks"]
    assert len(rows) == 9
    assert {row["extra_info"]["variant"] for row in rows} == {"eager", "eager-conv", "products"}
    assert {row["extra_info"]["ok"] for row in rows} == {True, None}


def test_report_writes_a_page_and_the_section_of_a_readme(gpu_results, tmp_path, monkeypatch):
    done = laco("report", gpu_results.parent, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "NVIDIA H200" in (tmp_path / "out" / "report.html").read_text()
    assert "NVIDIA H200" in (tmp_path / "out" / "report.md").read_text()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    assert laco("report", gpu_results.parent, "--readme", readme).exit_code == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{START}\n")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "old" not in text
    monkeypatch.chdir(tmp_path)
    for arguments in (("--readme",), ("--readme", "--out", "elsewhere")):
        readme.write_text(f"{START}\nold\n{END}\n")
        assert laco("report", gpu_results.parent, *arguments).exit_code == 0
        assert "NVIDIA H200" in readme.read_text()
    readme.write_text("no section")
    done = laco("report", gpu_results.parent, "--readme", readme)
    assert done.exit_code == 2
    assert readme.read_text() == "no section"
