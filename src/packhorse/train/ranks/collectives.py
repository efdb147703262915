"""The last collectives of this process, as torch's flight recorder keeps them: which one a hang stands in.

The recorder is on by default (TORCH_FR_BUFFER_SIZE). Its JSON form is asked for: the other one is a pickle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d

from packhorse.durable import replace_file

RECORDERS = {"nccl": "_dump_nccl_trace_json", "gloo": "_dump_fr_trace_json"}
"""Backend to what reads its recorder; that of NCCL stands only in a torch that was built with it."""


def write_collectives(path: Path) -> None:
    """Writes what each recorder holds, by backend, with the latest collective last."""
    found: dict[str, Any] = {}
    for backend, name in RECORDERS.items():
        read = getattr(_distributed_c10d, name, None)
        if read is not None:
            found[backend] = json.loads(read(True, False))  # collectives too, and not only those under way
    replace_file(path, json.dumps(found) + "\n", on_disk=False)
