"""What several unit tests share: a model of a few thousand random weights, made once."""

from pathlib import Path

import pytest

from tests.tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the model and its tokenizer; tests that change it copy it first."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
