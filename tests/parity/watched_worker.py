"""What the launch runs in place of launch/train.py: the worker itself, with the frozen weights hashed around training.

accelerate launch --config_file … tests/parity/watched_worker.py RUN/plan.json   ->  RUN/frozen-R.json per rank
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main() -> int:
    plan_file = Path(sys.argv[1])
    os.environ.update(json.loads(plan_file.read_text(encoding="utf-8"))["env"])
    import torch
    from torch import nn
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from packhorse.train import worker
    from packhorse.train.ranks.signals import StopRequest

    def tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Frozen weights as this rank stores them, and the constants that 4-bit ones are read with."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass may have left some of them whole
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                yield name, parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
        for name, module in model.named_modules():
            state = getattr(module, "quant_state", None) or getattr(
                getattr(module, "weight", None), "quant_state", None
            )
            if state is not None:
                packed = state.as_dict(packed=False)
                yield from ((f"{name}/{key}", part) for key, part in packed.items() if isinstance(part, torch.Tensor))

    def hashes(run: Any) -> dict[str, str]:
        held = (
            (name, part.detach().to("cpu", copy=True).view(-1).view(torch.uint8))
            for name, part in tensors(run.engine.model)
        )
        return {name: hashlib.sha256(part.numpy().tobytes()).hexdigest() for name, part in held}

    trains = worker.train

    def watched(run: Any, state: Any) -> Any:
        before = hashes(run)
        done = trains(run, state)
        record = {"before": before, "after": hashes(run)}
        (plan_file.parent / f"frozen-{run.rank}.json").write_text(json.dumps(record), encoding="utf-8")
        return done

    worker.train = watched
    return worker.run_worker(plan_file, StopRequest())


if __name__ == "__main__":
    sys.exit(main())
