"""What a resumed run's monitor keeps of metrics.jsonl."""

import json
from pathlib import Path

import pytest

from ladder_vae.training.monitor import Monitor
from runtime.errors import UserError


def test_entries_of_steps_to_come_and_cut_ones_are_dropped(tmp_path: Path) -> None:
    """A killed run's last line may be cut just before its end; the next entry is whole again."""
    lines = ['{"step": 1, "a": 0.5}\n', '{"step": 3, "a": 0.25}\n', '{"step": 2, "a": 0.75}']
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    with Monitor(tmp_path, 2, None) as monitor:
        monitor.scalars(3, {"a": 1.0})
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["a"]) for entry in entries] == [(1, 0.5), (3, 1.0)]


@pytest.mark.parametrize("line", ["[1, 2]", "3", '{"loss": 1.0}', '{"step": ', "not JSON"])
def test_a_damaged_file_is_refused_and_left_alone(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{line}\n{{"step": 1}}\n')
    with pytest.raises(UserError) as refusal:
        Monitor(tmp_path, 2, None)
    assert f"{path} is damaged" in str(refusal.value)
    assert path.read_text() == f'{line}\n{{"step": 1}}\n'
