"""How results say where they were obtained."""

import pytest
import torch

from ladder_vae.runs import provenance
from ladder_vae.runs.provenance import machine

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "named"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "A processor with amx_bf16, 2 threads"),
        ({"amx_bf16": False, "avx512_bf16": True}, "A processor with avx512_bf16, 2 threads"),
        ({"amx_bf16": False, "avx512_bf16": False}, "A processor, 2 threads"),
    ],
)
def test_processors_of_one_name_differ_in_their_instructions(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], named: str
) -> None:
    monkeypatch.setattr(provenance, "_processor", lambda: "A processor")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert machine(CPU) == named
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert machine(CPU) == named.replace("2 threads", "1 thread")
