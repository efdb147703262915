"""What soft CUDA refuses, as a GPU does, in a process that has loaded it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REFUSED = {
    "operands on two devices": ("x + torch.ones(2, 8)", "same device|operands are on"),
    "operands on two GPUs": ("x + torch.ones(2, 8, device='cuda:1')", "same device|operands are on"),
    "a fused optimizer with moments of another type": (
        "torch._fused_adamw_([x], [x], [x.bfloat16()], [x], [], [torch.ones((), device='cuda')], lr=1.0, beta1=0.9, "
        "beta2=0.9, weight_decay=0.0, eps=1.0, amsgrad=False, maximize=False)",
        "same dtype",
    ),
    "attention in float32": ("attend(x, x, x)", "fp16 and bf16"),
    "attention with heads of 7 numbers": ("attend(h[..., :7], h[..., :7], h[..., :7])", "multiple of 8|contiguous"),
    "attention with values of another width": ("attend(h, h, h.repeat(1, 1, 2))", "one shape"),
    "attention with int64 ends": ("attend(h, h, h, ends.long())", "int32"),
    "attention with ends beyond the tokens": ("attend(h, h, h, ends + 1)", "AssertionError"),
}
PROGRAM = """
import re
import soft_device
soft_device.load()
import torch
x = torch.ones(2, 8, device="cuda")
h = torch.ones(2, 1, 8, device="cuda", dtype=torch.bfloat16)
ends = torch.tensor([0, 2], device="cuda", dtype=torch.int32)
def attend(q, k, v, ends=ends):
    return torch.ops.aten._flash_attention_forward(q, k, v, ends, ends, 2, 2, 0.0, True, False)
attend(h, h, h)
waits = []
soft_device.on_wait(waits.append)
pinned = torch.ones(2).pin_memory()
assert pinned.is_pinned() and not torch.ones(2).is_pinned()
pinned.to("cuda", non_blocking=True)
assert waits == [], waits
pinned.to("cuda"), x.sum().item(), x.cpu(), x[x > 0], x.nonzero()
assert waits[:3] == ["copy to the device", "aten::_local_scalar_dense", "copy to the host"], waits
assert "index with a mask" in waits or "aten::masked_select" in waits, waits
assert waits[-1] == "aten::nonzero", waits
for name, (code, message) in REFUSED.items():
    try:
        eval(code)
    except (RuntimeError, AssertionError) as error:
        assert re.search(message, repr(error)), (name, error)
    else:
        raise SystemExit(f"{name}: accepted")
print("done")
"""


@pytest.mark.usefixtures("cuda")
def test_the_device_reports_waits_and_refuses_what_a_gpu_refuses() -> None:
    program = PROGRAM.replace("import re\n", f"import re\nREFUSED = {REFUSED!r}\n", 1)
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stdout + done.stderr
