"""An evaluated run made by hand, and a judge on this machine that answers as a test says."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

import pyarrow as pa
from pyarrow import parquet

from packhorse.evaluate.metrics.text import EXACT
from packhorse.evaluate.results import Comparison
from packhorse.evaluate.verdict import adjusted
from packhorse.plan.run_plan import RunPlan
from run_report_cases import line_of, write_run


def write_evaluated(folder: Path, pairs: Sequence[tuple[str, str]], clusters: Sequence[int] | None = None) -> RunPlan:
    """Write a finished run whose evaluation has these base and tuned answers; no answer is an exact match."""
    plan = write_run(folder, "r", "finished")
    run = Path(plan.run_folder)
    at = range(len(pairs))
    columns = {
        "set": ["validation"] * len(pairs),
        "document": list(at),
        "cluster": list(clusters or at),
        "key": [f"{row:064x}" for row in at],
        "messages": [json.dumps([{"role": "user", "content": f"question {row}"}]) for row in at],
        "expected": ["42"] * len(pairs),
        "base/answer": [base for base, _ in pairs],
        "tuned/answer": [tuned for _, tuned in pairs],
        "base/exact_match": [0.0] * len(pairs),
        "tuned/exact_match": [0.0] * len(pairs),
    }
    (run / "evaluation").mkdir()
    parquet.write_table(pa.table(columns), run / "evaluation" / "rows.parquet")
    lines = adjusted([line_of((EXACT, columns["base/exact_match"], columns["tuned/exact_match"]))])
    (run / "evaluation.json").write_text(Comparison(lines=lines, samples=()).model_dump_json(), encoding="utf-8")
    return plan


def read_result(plan: RunPlan) -> Comparison:
    return Comparison.model_validate_json((Path(plan.run_folder) / "evaluation.json").read_text(encoding="utf-8"))


@dataclass
class JudgeServer:
    """Requests so far, with their headers and bodies."""

    url: str
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[dict[str, object]] = field(default_factory=list)

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]  # type: ignore[index]


Answer = tuple[int, dict[str, str], bytes]


def said(text: str | None, prompt_tokens: int = 100, completion_tokens: int = 10) -> Answer:
    """Answer of an endpoint in OpenAI's form."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage}).encode()


@contextmanager
def judge_server(answer: Callable[[str, int], Answer]) -> Iterator[JudgeServer]:
    """Serve `answer(prompt, number of the request)`; requests are answered in parallel."""
    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                found.headers.append(dict(self.headers))
                found.bodies.append(body | {"path": self.path})
                number = len(found.bodies)
            status, headers, content = answer(body["messages"][0]["content"], number)
            try:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the client did not wait
                pass

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found = JudgeServer(f"http://127.0.0.1:{server.server_port}/v1")
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def shown_answers(prompt: str) -> tuple[str, str]:
    """The two answers of a built-in pairwise prompt, A and B."""
    first, second = (
        prompt.partition(f"<answer_{name}>\n")[2].partition(f"\n</answer_{name}>")[0] for name in ("a", "b")
    )
    return first, second
