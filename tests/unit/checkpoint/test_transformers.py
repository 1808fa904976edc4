"""Models as transformers saves them are converted to what transformers itself computes, where it is installed."""

import pytest
import saved_by_transformers


@pytest.mark.parametrize("which", saved_by_transformers.PACKAGES)
def test_every_layout_gives_what_transformers_gives(which):
    if not saved_by_transformers.is_installed(which):
        pytest.skip("needs transformers: make test-tools installs it")
    result = saved_by_transformers.run(which)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("frequencies") == len(saved_by_transformers.CLASSES) * len(saved_by_transformers.LAYOUTS)
    assert result.stdout.count("learned positions") == 2
    assert which == "oldest" or result.stdout.count("ESM C, head") == 3
