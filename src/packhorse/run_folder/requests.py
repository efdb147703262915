"""Files in the run folder by which anybody asks something of a run; the ranks look for them between two steps."""

from __future__ import annotations

from typing import Final

STOP_FILE: Final = "STOP"
"""Save and stop."""
CHECKPOINT_FILE: Final = "CHECKPOINT"
"""Save, and go on."""
