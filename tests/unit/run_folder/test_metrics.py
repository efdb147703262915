import json
import logging
import math
import subprocess
import sys

import pytest

from packhorse.errors import UserError
from packhorse.run_folder.metrics import MetricsFile, read_metrics


def written(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_each_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = MetricsFile(path, first_step=1)
    sink.log(1, {"train/loss": 2.5})
    assert written(path) == [{"step": 1, "train/loss": 2.5}]
    sink.log(2, {"train/loss": 2.0})
    assert written(path)[1] == {"step": 2, "train/loss": 2.0}
    sink.close()


def test_nan_and_infinity_are_valid_json_and_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = MetricsFile(path, first_step=1)
    sink.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    sink.close()
    assert written(path) == [{"step": 1, "a": "nan", "b": "inf", "c": "-inf"}]
    (figures,) = read_metrics(path)
    assert math.isnan(figures["a"])
    assert (figures["b"], figures["c"]) == (math.inf, -math.inf)


def test_resume_doubles_no_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, first_step=0)
    for step in range(6):
        first.log(step, {"train/supervised_tokens": 10 * step})
    first.close()
    second = MetricsFile(path, first_step=4)
    assert [line["step"] for line in written(path)] == [0, 1, 2, 3]
    second.log(4, {"train/supervised_tokens": 40})
    second.close()
    assert [line["step"] for line in written(path)] == [0, 1, 2, 3, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_is_taken_out_and_said(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/lo')
    assert [figures["step"] for figures in read_metrics(path)] == [1]
    with caplog.at_level(logging.WARNING):
        sink = MetricsFile(path, first_step=3)
    sink.log(3, {"train/loss": 1.0})
    sink.close()
    assert [line["step"] for line in written(path)] == [1, 3]
    assert "1 unreadable line" in caplog.text


def test_a_folder_that_takes_no_file_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="cannot be written") as caught:
        MetricsFile(tmp_path / "absent" / "metrics.jsonl", first_step=1)
    assert caught.value.mistakes[0].fix


def test_a_full_disk_is_a_users_mistake(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    sink = MetricsFile(path, first_step=1)
    with pytest.raises(UserError, match="No space left"):
        sink.log(1, {"train/loss": 1.0})
    with pytest.raises(UserError, match="No space left"):
        sink.close()


def test_reading_an_absent_file_gives_nothing(tmp_path):
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == []


def test_reading_metrics_does_not_import_torch():
    code = "import sys, packhorse.run_folder.metrics, packhorse.track.progress; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
