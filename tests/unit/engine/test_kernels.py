"""The GPU kernels, unmodified, in Triton's interpreter on a CPU: right in every case, and each planted fault shows."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[3]
KERNELS = PROJECT / "workflow" / "scripts" / "esmflow" / "engine" / "kernels"
TOLERANCE = 1e-4

# What a careless change might do, as the text before and after, and the cases that must show it.
FAULTS = {
    "another epsilon": ("WIDTH + EPSILON)", "WIDTH + 0.1 * EPSILON)", "norm"),
    "no offset": ("    values += tl.load(offset + column, mask=used, other=0.0)\n", "", "norm"),
    "no mask for the width": ("tl.where(used, values - mean, 0.0)", "values - mean", "norm of 96"),
    "rotated the other way": ("first * c - second * s", "first * c + second * s", "rotation"),
    "one half without bias": (" + tl.load(bias + column + HALF)[None, :]", "", "rotation"),
    "no mask for the last tokens": ("used = (token < tokens)[:, None]", "used = (token >= 0)[:, None]", "rotation"),
    "normed without its mean": ("left - mean, 0.0)", "left, 0.0)", "normed"),
    "another epsilon in rotation": ("(2 * WIDTH) + EPSILON)", "(2 * WIDTH) + 0.1 * EPSILON)", "normed"),
    "no mask for the last pairs": ("tl.where(used, right - mean, 0.0)", "right - mean", "normed"),
    "keys with queries' weights": ("tl.load(weight + column,", "tl.load(weight + column % (2 * WIDTH),", "normed"),
    "normed, rotated the other way": ("(left * c - right * s)", "(left * c + right * s)", "normed"),
    "a gate without its sigmoid": ("gate / (1 + tl.exp(-gate)) * up", "gate * up", "gate"),
    "the gate for the rest": ("(2 * WIDTH) + WIDTH + column", "(2 * WIDTH) + column", "gate"),
    "no mask for the last keys": ('tl.where((row < keys_left)[None, :], scores, -float("inf"))', "scores", "attention"),
    "a sum that is not rescaled": ("total * shrink +", "total +", "attention"),
    "values that are not rescaled": ("mixed * shrink[:, None]", "mixed", "attention"),
    "the last keys left out": ("if whole < length:", "if whole > length:", "attention"),
    "a whole block left out": ("range(0, whole, KEYS)", "range(KEYS, whole, KEYS)", "attention"),
}
FAULTS_IN_8_BITS = {
    "rounded down": ("(127.0 / peak) + _ROUND) - _ROUND", "(127.0 / peak))", "rounded"),
    "a scale without the rotation's": ("127.0 * tl.sqrt(TURNED * 1.0)", "127.0", "rounded"),
    "no rounding offset": ("    values += tl.load(offset + column, mask=used, other=0.0)\n", "", "rounded norm"),
    "no mean": ("tl.where(firsts & used, values - mean, values)", "values", "rounded norm"),
    "a mean of padding too": ("(WIDTH // BLOCK)", "(PADDED // BLOCK)", "rounded norm"),
    "another epsilon in 8 bits": ("/ WIDTH + EPSILON)", "/ WIDTH + 0.5)", "rounded norm"),
    "the last rows left out": ("min(first + AT_ONCE, tokens)", "min(first + AT_ONCE, tokens - 1)", "rounded"),
    "the last depth left out": ("range(0, WIDTH, DEPTH)", "range(0, WIDTH - DEPTH, DEPTH)", "product"),
    "no bias": ("    result += tl.load(bias", "    result += 0 * tl.load(bias", "product"),
    "another gelu": ("0.0356774081 * result", "0.04 * result", "product with gelu"),
    "gate and what it gates exchanged": ("gate, up = tl.split", "up, gate = tl.split", "product with gate"),
    "another sigmoid": ("_tanh(0.5 * gate, COMPILED)", "_tanh(gate, COMPILED)", "product with gate"),
    "gated tiles one tile apart": ("        column = column // 2\n", "", "product with gate"),
    "the last columns left out": (
        "(right_scales + places, mask=places < columns,",
        "(right_scales + places, mask=places < columns - 2,",
        "product",
    ),
    "written over, not added": ("if ADD:", "if HALF > 0:", "sum"),
    "turned the other way": ("first * c - second * s, second", "first * c + second * s, second", "attention"),
    "values turned too": (
        "COLUMNS // 2) < columns // 3)[None, :]",
        "COLUMNS // 2) >= 0)[None, :]",
        "attention",
    ),
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> list[dict[str, float]]:
    """By case: of the kernels as they are, then with each fault."""
    if importlib.util.find_spec("triton") is None:
        if (platform.system(), platform.machine()) == ("Linux", "x86_64") and "CI" in os.environ:
            pytest.fail("triton is not installed, which the dev group names")
        pytest.skip("needs triton, which is there for Linux on x86-64 only")
    folder, copies = tmp_path_factory.mktemp("faulty"), []
    for kernels, faults in (("sixteen_bits", FAULTS), ("eight_bits", FAULTS_IN_8_BITS)):
        source = (KERNELS / f"{kernels}.py").read_text()
        for number, (before, after, _) in enumerate(faults.values()):
            assert source.count(before) >= 1, before
            copies.append(folder / f"{kernels}_{number}.py")
            copies[-1].write_text(source.replace(before, after))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(PROJECT / "workflow" / "scripts")}
    script = PROJECT / "tests" / "support" / "interpreted_kernels.py"
    done = subprocess.run([sys.executable, script, *copies], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_kernels_are_right_at_every_head_size_in_short_and_long_packs_with_tails(errors):
    assert len(errors[0]) == 4 + 2 * 8 + 2 + 2 + 2 * 7 + 3
    assert max(errors[0].values()) < TOLERANCE


ALL = {**FAULTS, **FAULTS_IN_8_BITS}


@pytest.mark.parametrize("fault", ALL)
def test_a_fault_shows_where_it_should(errors, fault):
    found, (_, _, where) = errors[1 + list(ALL).index(fault)], ALL[fault]
    shown = {case for case, error in found.items() if not error < TOLERANCE}
    assert any(case.startswith(where) for case in shown)
    # What has a product in it shows a wrong product too.
    assert fault in FAULTS_IN_8_BITS or all(case.startswith(where.split()[0]) for case in shown)
