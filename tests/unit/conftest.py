"""What several unit tests share: a model of a few thousand random weights, made once."""

from pathlib import Path

import pytest

from tests.tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the model and its tokenizer; tests that change it copy it first."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


TENSORS = (
    len(HEADER := b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}').to_bytes(8, "little") + HEADER + bytes(4)
)
"""A file of one tensor, as safetensors has it."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's directory with four published versions of `ple`."""
    (tmp_path / "config.yaml").touch()
    for version in range(1, 5):
        directory = tmp_path / "policies" / "ple" / f"v{version:06d}"
        directory.mkdir(parents=True)
        (directory / "proof.json").write_text('{"probe_logps": [-1.0]}')
        (directory / "adapter_model.safetensors").write_bytes(TENSORS)
    return tmp_path
