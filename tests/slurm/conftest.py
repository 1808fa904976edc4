"""A Slurm for the tests of the cluster profiles, or the reason why there is none."""

from __future__ import annotations

import pytest
from one_node_slurm import one_node_slurm, why_no_slurm


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A running Slurm of one node with four pretend GPUs."""
    if reason := why_no_slurm():
        pytest.skip(reason)
    with one_node_slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running
