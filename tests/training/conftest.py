"""What tests of training share."""

import sys

import pytest
import torch


@pytest.fixture
def adamax_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Adamax keep its numbers on the device (`capturable`) on the CPU too."""
    module = sys.modules[torch.optim.Adamax.__module__]
    monkeypatch.setattr(
        module, "_get_capturable_supported_devices", lambda supports_xla=True: ["cpu"]
    )
