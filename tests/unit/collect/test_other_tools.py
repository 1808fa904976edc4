"""The tools that formats are made for open them, where their environment has been made."""

import pytest
import read_by_other_tools


@pytest.mark.skipif(
    not (read_by_other_tools.ENVIRONMENT / "complete").exists(),
    reason="needs scikit-bio, Scanpy and ProtSpace: python tests/stress/read_by_other_tools.py installs them",
)
def test_scikit_bio_scanpy_and_protspace_read_what_is_written_for_them(tmp_path, capsys):
    read_by_other_tools.check(read_by_other_tools.make_environment(read_by_other_tools.ENVIRONMENT), tmp_path)
    read = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert read == ["scikit-bio", "Scanpy", "ProtSpace"]
