from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """The arithmetic model after a short warm-up: it answers in boxes, mostly wrongly."""
    from meds_megatron.embedded.arithmetic_model import WarmUp, make_arithmetic_model

    directory = tmp_path_factory.mktemp("model")
    make_arithmetic_model(directory, "shared", WarmUp(steps=250))
    return directory
