"""What several unit tests share: a model of a few thousand random weights, made once."""

from pathlib import Path

import pytest

from tests.tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the model and its tokenizer; tests that change it copy it first."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's directory with four published versions of `ple`."""
    (tmp_path / "config.yaml").touch()
    for version in range(1, 5):
        directory = tmp_path / "policies" / "ple" / f"v{version:06d}"
        directory.mkdir(parents=True)
        (directory / "proof.json").write_text('{"probe_logps": [-1.0]}')
    return tmp_path
