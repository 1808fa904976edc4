import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "engine.py"
COLLECTING = BENCHMARK.with_name("collecting.py")


def test_the_benchmark_runs_on_any_machine_and_fills_its_table(tmp_path):
    written = tmp_path / "figures.json"
    run = subprocess.run(
        [sys.executable, str(BENCHMARK), "--smoke", "--json", str(written)], capture_output=True, text=True, check=True
    )
    assert "| smoke-viral | over fair-esm autocast |" in run.stdout
    content = json.loads(written.read_text())
    assert content["where"]["torch"]
    assert content["figures"]["smoke-viral"]["packed"] > 0
    assert content["figures"]["startup"]["packed, first pack"] > 0
    assert content["figures"]["smoke-ESMC-viral"]["packed"] > 0
    assert {line["case"] for line in content["ratios"]} == {"smoke-viral", "smoke-ESMC-viral", "job", "startup"}


def test_the_benchmark_of_collecting_measures_every_format_and_leaves_nothing_behind(tmp_path):
    written, work = tmp_path / "figures.json", tmp_path / "work"
    work.mkdir()
    command = [sys.executable, str(COLLECTING), "--smoke", "--only", "npy", "esm", "--folder", str(work)]
    run = subprocess.run([*command, "--json", str(written)], capture_output=True, text=True, check=True)
    lines = {line["format"]: line for line in json.loads(written.read_text())}
    assert lines.keys() == {"tables", "npy", "esm"}
    assert "| 2,000 | npy |" in run.stdout
    # The vectors, as fp16.
    assert 1.28e6 < lines["npy"]["vector_bytes"] < 1.5e6
    assert lines["tables"]["vector_bytes"] == 0
    assert all(line["peak_bytes"] > 50e6 and min(line["dd"]) > 0 for line in lines.values())
    assert not list(work.iterdir())


def test_the_planning_benchmark_measures_a_parse_and_a_plan_of_the_same_records(tmp_path):
    command = [sys.executable, str(BENCHMARK.with_name("planning.py")), "--smoke", "--folder", str(tmp_path)]
    written = tmp_path / "figures.json"
    run = subprocess.run([*command, "--json", str(written)], capture_output=True, text=True, check=True)
    assert "| 2,000 |" in run.stdout
    (size,) = json.loads(written.read_text())["sizes"]
    parsed, planned = size["parse"], size["plan"]
    assert parsed["records"] == planned["records"] == 2000
    assert planned["rejected"] > 0
    assert planned["duplicates"] > 50
    assert min(parsed["cpu_seconds"], planned["cpu_seconds"], planned["peak_memory_bytes"]) > 0
    # Everything that was made is deleted.
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_the_profile_compares_sums_in_16_bits_and_in_fp32_on_any_machine():
    command = [sys.executable, str(BENCHMARK.with_name("profile_engine.py")), "smoke", "--sums", "--budget", "500"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split(" | ") for line in run.stdout.splitlines()[2:]]
    assert [(row[0].strip("| "), row[1]) for row in rows] == [
        (precision, allowed) for precision in ("fp16", "bf16") for allowed in ("allowed", "not") * 2
    ]
    assert all(float(row[3]) > 0.999 and float(row[4].rstrip(" |")) > 0.999 for row in rows)


def test_precisions_are_compared_with_the_first_of_them_on_any_machine(tmp_path):
    command = [sys.executable, str(BENCHMARK.with_name("precisions.py")), "smoke", "--proteins", "10"]
    written = tmp_path / "figures.json"
    command += ["--precisions", "fp32", "int8", "--json", str(written)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| int8 |" in run.stdout
    exact, rounded = json.loads(written.read_text())["figures"]["smoke"].values()
    assert "pooled min" not in exact
    assert 0.99 < rounded["residue min"] < rounded["residue 1%"] < 1
    assert 0.999 < rounded["pooled min"] < rounded["pooled mean"] < 1
    assert min(rounded["load, s"], rounded["aa/s"], exact["aa/s"]) > 0
