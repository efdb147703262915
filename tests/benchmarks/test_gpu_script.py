"""`make gpu` tried without a GPU: each part in tiny shapes on the CPU, and the driver with parts that fail or hang."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu"
LEAST_CASES = {
    "facts": 8,
    "training": 1,
    "memory": 1,
    "speed": 10,
    "quantized": 6,
    "checkpoint": 3,
    "decoding": 1,
    "numerics": 7,
    "out_of_memory": 2,
}
PARTS = {
    "sound": "def cases(setting):\n    yield 'one', lambda: {'GB/s': 1.5, 'ok': True}\n",
    "bare": "import library_that_is_absent\n",
    "fails": "import socket\n"
    "def measure():\n    raise RuntimeError(f'no route to {socket.gethostname()}, see {setting_file}')\n"
    "def cases(setting):\n    globals()['setting_file'] = __import__('setting').__file__\n"
    "    yield 'bad', measure\n    yield 'good', lambda: {'ms': 2.0}\n",
    "dies": "import os\ndef cases(setting):\n    yield 'one', lambda: {'ms': 1.0}\n    os._exit(3)\n",
    "hangs": "import subprocess, sys, time\ndef cases(setting):\n"
    "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "    yield 'one', lambda: {'pid': child.pid}\n    time.sleep(60)\n",
}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in ("src", "tests", "tests/gpu", "benchmarks", "benchmarks/gpu"):
        monkeypatch.syspath_prepend(ROOT / folder)
    spec = importlib.util.spec_from_file_location("gpu_main", SCRIPT / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_main", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parts(driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts that are made up."""
    for name, source in PARTS.items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(driver, "PART_SECONDS", dict.fromkeys(PARTS, 60) | {"hangs": 3})
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


def test_every_part_is_tried(driver: ModuleType) -> None:
    assert driver.PART_SECONDS.keys() == LEAST_CASES.keys()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # libraries' own, about each other
@pytest.mark.parametrize("part", LEAST_CASES)
def test_a_part_measures_on_the_cpu(part: str, driver: ModuleType, tmp_path: Path) -> None:
    from setting import Setting, run_part

    (tmp_path / "work").mkdir()
    run_part(part, Setting("cpu", tmp_path / "work", smoke=True), tmp_path / "rows.jsonl")
    rows = driver.read_rows(tmp_path / "rows.jsonl")
    assert [row for row in rows if "error" in row or "missing library" in row] == []
    assert len(rows) >= LEAST_CASES[part]
    assert [row for row in rows if any(value is False for value in row.values())] == [], (
        "a figure says that something does not hold"
    )


def test_parts_that_fail_cost_no_other_part(
    parts: None, driver: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpu_report import read_report

    file = tmp_path / "report.md"
    words = ["--device", "cpu", "--output", str(file), "--parts", "bare,fails,dies,hangs,sound"]
    assert driver.main(words) == 1
    text = file.read_text(encoding="utf-8")
    found = {each["part"]: each for each in read_report(file)["parts"]}
    assert found["bare"]["rows"][0]["missing library"] == "library_that_is_absent"
    bad, good = found["fails"]["rows"]
    assert "RuntimeError: no route to host, see packhorse/benchmarks/gpu/setting.py" in bad["error"]
    assert good["ms"] == 2.0
    assert "exit code 3" in found["dies"]["ending"]
    assert "limit of 3 s" in found["hangs"]["ending"]
    assert not is_alive(found["hangs"]["rows"][0]["pid"])
    assert found["sound"]["rows"][0]["GB/s"] == 1.5
    assert "| one | 1.5 | yes |" in text
    for private in (socket.gethostname(), str(ROOT), str(Path.home()) + "/"):
        assert private not in text


def test_the_run_ends_at_its_limit(parts: None, driver: ModuleType, tmp_path: Path) -> None:
    from gpu_report import read_report

    file = tmp_path / "report.md"
    words = ["--device", "cpu", "--output", str(file), "--parts", "hangs,sound", "--minutes", "0.03"]
    assert driver.main(words) == 1
    hangs, sound = read_report(file)["parts"]
    assert [row["case"] for row in hangs["rows"]] == ["one"]
    assert sound["ending"] == "not started: no time is left"
    assert json.dumps(sound["rows"]) == "[]"


OLDER_TORCH = """
import sys
from pathlib import Path
import torch
import torch.nn.functional as F
from torch.nn.modules import linear_cross_entropy_options as options
files = [Path(options.__file__).with_name(name) for name in ("linear_cross_entropy.py", Path(options.__file__).name)]
del torch.nn.LinearCrossEntropyOptions, F.linear_cross_entropy
folder = Path(sys.argv[1])
for file in files:
    (folder / file.name).write_text(file.read_text())
import older_torch
older_torch.complete(folder)
hidden, head = (torch.randn(shape, requires_grad=True) for shape in ((40, 8), (30, 8)))
labels = torch.randint(30, (40,))
expected = F.cross_entropy(hidden @ head.T, labels, reduction="none")
for reduction in ("none", "sum"):
    chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16)
    found = F.linear_cross_entropy(hidden, head, labels, reduction=reduction, options=chunks)
    torch.testing.assert_close(found, expected if reduction == "none" else expected.sum())
    gradients = [torch.autograd.grad(loss.sum(), (hidden, head), retain_graph=True) for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
"""


def test_an_older_torch_is_completed_by_files_of_a_newer_one(tmp_path: Path) -> None:
    words = [sys.executable, "-c", OLDER_TORCH, str(tmp_path)]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(SCRIPT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
