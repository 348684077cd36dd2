"""A parameter accepted and not honoured, a client that left and still keeps the model busy, a server open to others."""

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from talk_servers import Server, running
from talkers import END, save_talker

from cheaptrain.errors import PreflightError
from cheaptrain.talk import server as server_module
from cheaptrain.talk.answer import Answer
from cheaptrain.talk.server import is_loopback, listen, load_page, make_app, serve
from cheaptrain.talk.talker import load_talker

torch.set_num_threads(1)

SAID = "<b>12</b> é"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two checkpoints: `short` says SAID and ends, `endless` never does."""
    folder = tmp_path_factory.mktemp("served")
    short = load_talker("short", save_talker(folder / "short", ["<b>", "12", "</b>", " ", "Ã", "©", END], positions=64))
    endless = load_talker("endless", save_talker(folder / "endless", ["on", " and"], positions=10**6))
    with running(make_app([short, endless])) as server:
        yield server


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What became of each generation, in the order they ended, and the most that ran at once as `most`."""
    plain = server_module.answer
    lock = threading.Lock()
    ended: list[Any] = []
    busy: dict[str, int] = {}

    def spied(talker: Any, *rest: Any) -> Answer:
        with lock:
            busy[talker.name] = busy.get(talker.name, 0) + 1
            assert busy[talker.name] == 1, "two generations of one model at once"
        try:
            result = plain(talker, *rest)
        finally:
            with lock:
                busy[talker.name] -= 1
        ended.append(result)
        return result

    monkeypatch.setattr(server_module, "answer", spied)
    return ended


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, "waited a minute in vain"
        time.sleep(0.02)


def test_a_stream_and_one_piece_say_the_same_and_count_right(served: Server) -> None:
    request = {"model": "short", "messages": HI, "temperature": 0}
    status, whole = served.post(request)
    events = served.stream({**request, "stream": True, "stream_options": {"include_usage": True}})
    assert status == 200
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": SAID}
    assert whole["choices"][0]["finish_reason"] == "stop"
    prompt = len("user\nhi\nassistant\n") + 3  # a byte each but for the three markers
    assert whole["usage"] == {"prompt_tokens": prompt, "completion_tokens": 7, "total_tokens": prompt + 7}
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == SAID
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]][-2:] == [None, "stop"]
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_an_answer_that_is_cut_is_finished_by_length(served: Server, limit: str) -> None:
    cut = served.post({"model": "short", "messages": HI, "temperature": 0, limit: 2})[1]
    assert cut["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "<b>12"},
        "logprobs": None,
        "finish_reason": "length",
    }
    assert cut["usage"]["completion_tokens"] == 2
    stopped = served.post({"model": "short", "messages": HI, "temperature": 0, "stop": ["2</"]})[1]["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("<b>1", "stop")


def test_a_seed_is_honoured(served: Server) -> None:
    def drawn(seed: int) -> str:
        request = {"model": "endless", "messages": HI, "temperature": 2, "max_tokens": 30, "seed": seed}
        return str(served.post(request)[1]["choices"][0]["message"]["content"])

    assert drawn(1) == drawn(1)


@pytest.mark.parametrize(
    ("change", "param", "told"),
    [
        ({"presence_penalty": 0.5, "tools": []}, "presence_penalty", r"presence_penalty: .*; tools: "),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "not both"),
        ({"n": 2}, "n", "1"),
        ({"stop": []}, "stop", "one to four"),
        ({"stop": ["a", ""]}, "stop", "empty"),
        ({"stop": "abcde" * 0}, "stop", "empty"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages.0.content", "is empty"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role", "'assistant'"),
        ({"messages": [*HI, {"role": "assistant", "content": "a"}]}, "messages", "last one must be the user's"),
        ({"messages": [*HI, {"role": "system", "content": "a"}]}, "messages", "comes first"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "type text"),
        ({"model": None}, "model", "name one of short, endless"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    served: Server, change: dict[str, Any], param: str, told: str
) -> None:
    status, body = served.post({"model": "short", "messages": HI, **change})
    assert status == 400
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == param
    assert re.search(told, body["error"]["message"])


def test_a_prompt_too_long_is_refused_with_the_number_of_positions(served: Server) -> None:
    status, body = served.post({"model": "short", "messages": [{"role": "user", "content": "long " * 50_000}]})
    assert status == 400
    assert body["error"]["code"] == "context_length_exceeded"
    assert "250,019 tokens" in body["error"]["message"] and "64 positions" in body["error"]["message"]


def test_unknown_models_paths_hosts_and_kinds_of_content_are_refused(served: Server) -> None:
    status, body = served.post({"model": "other", "messages": HI})
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert "short, endless" in body["error"]["message"]
    assert served.get("/nothing")[0] == 404
    assert served.get("/health", host="evil.example")[0] == 400
    assert served.get("/health") == (200, b'{"status":"ok"}')
    assert served.raw(b"{}", "text/plain")[0] == 415  # what another site's page could send without asking
    for broken in (b"", b"{", b"[]", b"\xff", b'{"messages": "\\ud800"}', b'{"temperature": NaN}'):
        status, answer = served.raw(broken, "application/json")
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert served.raw(b" " * (9 * 2**20), "application/json")[0] == 413


def test_models_are_listed_in_the_order_they_were_named(served: Server) -> None:
    status, body = served.get("/v1/models")
    assert status == 200
    assert [(m["id"], m["positions"], m["chat_template"]) for m in json.loads(body)["data"]] == [
        ("short", 64, True),
        ("endless", 10**6, True),
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_model_for_the_next_in_line(
    served: Server, answers: list[Any], stream: bool
) -> None:
    endless = {"model": "endless", "messages": HI, "stream": stream}
    first, second = served.open(endless), served.open(endless)
    if stream:
        while b" and" not in first.recv(4096):
            pass
    else:
        time.sleep(0.5)
    second.close()  # still in line: it never begins
    time.sleep(0.5)
    first.close()
    wait_for(lambda: bool(answers))
    status, body = served.post({**endless, "stream": False, "max_tokens": 3, "temperature": 0})
    assert (status, body["choices"][0]["message"]["content"]) == (200, "on and and")
    assert [(a.ending, a.new_tokens < 10**5) for a in answers] == [("cancelled", True), ("length", True)]


def test_requests_for_one_model_wait_for_each_other(served: Server, answers: list[Any]) -> None:
    request = {"model": "endless", "messages": HI, "max_tokens": 40, "temperature": 0}
    got: list[int] = []
    threads = [threading.Thread(target=lambda: got.append(served.post(request)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [200] * 4
    assert [answer.new_tokens for answer in answers] == [40] * 4


def test_a_failure_of_the_model_reaches_the_client(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(talker: Any, ids: Any, sampling: Any, give: Callable[[str], None], cancelled: Any) -> Answer:
        give("so far")
        raise RuntimeError("out of memory")

    monkeypatch.setattr(server_module, "answer", broken)
    request = {"model": "short", "messages": HI}
    status, body = served.post(request)
    assert (status, body["error"]["message"]) == (500, "RuntimeError: out of memory")
    events = served.stream({**request, "stream": True})
    assert json.loads(events[-2])["choices"][0]["delta"] == {"content": "so far"}
    assert json.loads(events[-1])["error"]["type"] == "server_error"


def test_the_openai_client_works(served: Server) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["short", "endless"]
        asked = {"model": "short", "messages": HI, "temperature": 0}
        said = client.chat.completions.create(**asked)
        assert (said.choices[0].message.content, said.choices[0].finish_reason) == (SAID, "stop")
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAID
        with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
            client.chat.completions.create(**asked, frequency_penalty=1)


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(PreflightError, match="in use"):
        serve(str(tmp_path / "nothing"), None, "127.0.0.1", taken.getsockname()[1], Console(quiet=True))
    with pytest.raises(PreflightError, match=r"host\.invalid"):
        listen("host.invalid", 0)


def test_only_loopback_addresses_count_as_loopback() -> None:
    hosts = {"127.0.0.1": True, "::1": True, "localhost": True, "127.3.2.1": True}
    assert {host: is_loopback(host) for host in hosts} == hosts
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", ""))


def test_the_page_names_no_other_address_and_may_not_reach_one(served: Server) -> None:
    page, headers = load_page()
    assert not re.findall(r"https?://|//[a-z]|@import|url\(", page.replace("// ", ""))
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    connection.request("GET", "/")
    reply = connection.getresponse()
    assert reply.headers["Content-Security-Policy"] == policy
    assert reply.read().decode() == page
    connection.close()
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", served.port), timeout=2):
        pass  # bound to the one address it was given
