"""How torchrun started this process, and whether it has done so before."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Launch:
    """One command of torchrun, which starts its processes anew when one of them has died."""

    name: str | None  # the same in all its attempts, another one in another command
    attempt: int = 0
    attempts: int = 1

    @classmethod
    def of_environment(cls) -> Self:
        """As torchrun tells its processes; without torchrun one attempt without a name."""
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
        return cls(_name(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), 1 + restarts)

    def provenance(self) -> dict[str, str]:
        """What a run folder says of it, for a later attempt to know the run as its own."""
        return {} if self.attempts == 1 or self.name is None else {"launch": self.name}


def _name() -> str | None:
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if name == "none" and error_file is not None:
        # Machines that are listed by hand have no --rdzv-id unless told; but the first of them
        # keeps a folder, .../FOLDER/attempt_0/0/error.json.
        return Path(error_file).parts[-4]
    return name
