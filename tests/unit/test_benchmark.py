import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "engine.py"


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
    assert {line["case"] for line in content["ratios"]} == {"smoke-viral", "job", "startup"}
