"""A client of an OpenAI-compatible endpoint: what it sends and repeats, and the errors of an endpoint that fails."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest

from packhorse.errors import UserError
from packhorse.evaluate.endpoint import ATTEMPTS, ChatReply, EndpointClient

URL = "http://model.example/v1"
CHAT = [{"role": "user", "content": "2 + 2?"}]
# The example of OpenAI's API reference, shortened.
ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "4"}, "logprobs": None, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
}


class Endpoint:
    """Responses in turn; the last one is repeated."""

    def __init__(self, *responses: httpx.Response | Exception, key: str | None = None) -> None:
        self.responses, self.requests, self.waits = list(responses), [], []
        self.client = EndpointClient(
            URL, "tuned", key, transport=httpx.MockTransport(self._answer), sleep=self.waits.append
        )

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        response = self.responses[min(len(self.requests), len(self.responses)) - 1]
        if isinstance(response, Exception):
            raise response
        return response


def ok(**message: object) -> httpx.Response:
    choice = ANSWER["choices"][0]  # type: ignore[index]
    return httpx.Response(200, json={**ANSWER, "choices": [{**choice, "message": {"role": "assistant", **message}}]})


def test_a_request_has_openais_form_and_the_most_likely_answer_is_requested() -> None:
    endpoint = Endpoint(httpx.Response(200, json=ANSWER), key="a-key")
    assert endpoint.client.chat(CHAT, max_tokens=5, seed=3) == ChatReply("4", ended=True)
    (request,) = endpoint.requests
    assert str(request.url) == f"{URL}/chat/completions"
    assert request.headers["Authorization"] == "Bearer a-key"
    assert json.loads(request.content) == {
        "model": "tuned", "messages": CHAT, "max_tokens": 5, "temperature": 0, "seed": 3
    }  # fmt: skip


def test_a_cut_answer_and_a_call_of_a_tool_are_read() -> None:
    cut = {**ANSWER, "choices": [{"message": {"content": "4 be"}, "finish_reason": "length"}]}
    assert Endpoint(httpx.Response(200, json=cut)).client.chat(CHAT, 2) == ChatReply("4 be", ended=False)
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    reply = Endpoint(ok(content=None, tool_calls=[call])).client.chat(CHAT, 9, [{"type": "function"}])
    assert reply == ChatReply("", ended=True, tool_calls=(call,))


@pytest.mark.parametrize(
    ("failure", "waits"),
    [
        (httpx.Response(429), [1.0]),
        (httpx.Response(429, headers={"Retry-After": "7"}), [7.0]),
        (httpx.Response(500, text="worker died"), [1.0]),
        (httpx.Response(503), [1.0]),
        (httpx.ConnectError("refused"), [1.0]),
        (httpx.RemoteProtocolError("Server disconnected"), [1.0]),
    ],
    ids=["429", "429-with-seconds", "500", "503", "no-connection", "disconnected"],
)
def test_a_request_is_repeated_where_that_helps(failure: httpx.Response | Exception, waits: list[float]) -> None:
    endpoint = Endpoint(failure, ok(content="4"))
    assert endpoint.client.chat(CHAT, 5).text == "4"
    assert endpoint.waits == waits


def test_the_endpoint_may_name_a_date_to_wait_for() -> None:
    at = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    endpoint = Endpoint(httpx.Response(503, headers={"Retry-After": at}), ok(content="4"))
    endpoint.client.chat(CHAT, 5)
    assert endpoint.waits == [pytest.approx(30, abs=2)]


@pytest.mark.parametrize(
    ("response", "num_requests", "words"),
    [
        (httpx.Response(500, text="CUDA error"), ATTEMPTS, ["HTTP 500: CUDA error", f"attempt {ATTEMPTS}"]),
        (httpx.Response(429, headers={"Retry-After": "86400"}), 1, ["HTTP 429", "attempt 1 "]),
        (httpx.ReadTimeout("timed out"), 1, ["ReadTimeout timed out"]),
        (httpx.Response(401, json={"error": {"message": "wrong key a-key"}}), 1, ["--api-key-env", "wrong key ***"]),
        (httpx.Response(404, json={"error": {"message": "no model tuned"}}), 1, ["no model tuned", f"{URL}/models"]),
        (httpx.Response(400, text="maximum context length is 4096"), 1, ["maximum context length is 4096"]),
        (httpx.Response(200, text="<html>Welcome</html>"), 1, ["<html>Welcome</html>", "choices[0].message.content"]),
        (httpx.Response(200, json={"choices": []}), 1, ["choices[0].message.content"]),
        (httpx.Response(200, json={"choices": [{"message": {"content": 4}}]}), 1, ["choices[0].message.content"]),
        (httpx.Response(200), 1, ["an empty body"]),
    ],
    ids=["500", "429-for-a-day", "silent", "401", "404", "400", "a-page", "no-choice", "no-text", "nothing"],
)
def test_an_endpoint_that_fails_ends_in_one_clear_error(
    response: httpx.Response | Exception, num_requests: int, words: list[str]
) -> None:
    endpoint = Endpoint(response, key="a-key")
    with pytest.raises(UserError) as raised:
        endpoint.client.chat(CHAT, 5)
    assert len(endpoint.requests) == num_requests
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert "a-key" not in str(raised.value).replace("--api-key-env", "")


def test_an_address_without_http_is_refused() -> None:
    with pytest.raises(UserError, match="localhost:8000/v1 is not the address"):
        EndpointClient("localhost:8000/v1", "tuned")


@pytest.fixture
def silent_server() -> Iterator[Callable[[], str]]:
    """A server that takes a request and closes the connection without a word."""

    class Silent(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    Thread(target=server.serve_forever, daemon=True).start()
    yield lambda: f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_real_server_that_says_nothing(silent_server: Callable[[], str]) -> None:
    waits: list[float] = []
    client = EndpointClient(silent_server(), "tuned", sleep=waits.append)
    with pytest.raises(UserError, match="Server disconnected"):
        client.chat(CHAT, 5)
    assert waits == [1, 2, 4, 8, 16]
    client.close()
