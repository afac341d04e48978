"""
scorers/judge.py and category.py, against vLLM's own server and against a small server that misbehaves.

Covers  what a request holds. Verdicts, matrix and rewards against log-probabilities by transformers from the
        same weights. The drawn order, with and without --baseline; equal texts; no verdict; --judge-prompt.
        --max-requests, resume and kills by counted requests. 429, 401, 500, no server, an unknown model,
        nonsense; the key, which is written nowhere; where the server's address comes from; categories.
Run     python -m pytest tests/test_judge.py     (a minute: one server starts, if vllm is installed)
"""

import hashlib
import json
import math
import os
import random
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import combinations, permutations

import pytest
import test_score
import torch
from conftest import REPO, make_policy, read_rows, thinking, write_rows
from test_score import response, rewards

import score

sys.path.insert(0, str(REPO / "scorers"))
import category  # noqa: E402
import judge  # noqa: E402

run, refused = partial(test_score.run, script=judge), partial(test_score.refused, script=judge)
openai = pytest.importorskip("openai")

KEY = "sk-none-of-your-business"


# ----- a peer: a server of our own on this machine


@pytest.fixture
def quick(monkeypatch):
    """The client's waits between its tries, a hundredth of what they are."""
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.005)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.02)


@pytest.fixture
def peer(quick):
    """peer(answer) -> (flags, requests); answer(body, number of the request) gives (status, content)."""
    servers = []

    def start(answer):
        requests, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(requests)
                    requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
                status, content = answer(body, number)
                if status is None:  # hangs up
                    self.close_connection = True
                    return
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if content == "<html>" else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return ["--model", "tiny", "--base-url", f"http://127.0.0.1:{servers[-1].server_port}/v1"], requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def completion(tops, text="m"):
    """A chat completion; tops: [(token, probability), ...] of its first token, most likely first."""
    listed = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in tops]
    logprobs = (
        {"content": [{"token": text, "logprob": listed[0]["logprob"], "bytes": None, "top_logprobs": listed}]}
        if tops
        else None
    )
    choice = {
        "index": 0,
        "finish_reason": "length",
        "message": {"role": "assistant", "content": text},
        "logprobs": logprobs,
    }
    return 200, {"id": "x", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]}


def likes_the_first(body=None, number=None):
    return completion([("m", 0.75), ("M", 0.25)])


def is_swapped(instruction):
    """alpaca_eval's draw (ALPACA_LC.md 1): output_1 and output_2 change places."""
    return random.Random("is_switched_outputs" + instruction + "0").choices([False, True], k=1)[0]


STRAIGHT, SWAPPED = (
    [text for text in (f"instruction {k}" for k in range(200)) if is_swapped(text) == kind]
    for kind in (False, True)
)
head, _, rest = judge.PROMPT.partition("\n<|im_end|>\n<|im_start|>user\n")
SYSTEM, USER = head.removeprefix("<|im_start|>system\n"), rest.removesuffix("\n<|im_end|>")


def user_turn(instruction, first, second):
    """Our prompt with its three texts, put together from its pieces."""
    before, instruction_mark, after = USER.partition("{instruction}")
    middle, first_mark, after = after.partition("{output_1}")
    between, second_mark, end = after.partition("{output_2}")
    assert instruction_mark and first_mark and second_mark and "<|" not in SYSTEM + USER
    return before + instruction + middle + first + between + second + end


def ask(instruction, *responses, **more):
    return {
        "id": instruction,
        "prompt": instruction,
        "responses": [one if isinstance(one, dict) else response(one) for one in responses],
        **more,
    }


def base(text, **more):
    return response(text, "off", **{**more, "model": "base"})


def test_what_a_request_holds(tmp_path, capsys, peer, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    flags, requests = peer(likes_the_first)
    turns = [
        {"role": "system", "content": "be nice"},
        {"role": "user", "content": "hi {output_1}"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "go"},
    ]
    as_text = "system: be nice\nuser: hi {output_1}\nassistant: yes?\nuser: go"
    texts = ["{output_2} and {instruction}", "b \\1 \\g<0>"]
    rows, printed = run(
        tmp_path, capsys, [{**ask("turns", *texts), "prompt": turns}, ask(STRAIGHT[0], *texts)], *flags
    )
    assert len(requests) == 2 and printed["requests"] == 2
    for request in requests:
        assert (
            request["path"] == "/v1/chat/completions"
            and request["key"] == f"Bearer {KEY}"
            and request["model"] == "tiny"
        )
        assert (request["max_tokens"], request["temperature"], request["logprobs"]) == (
            1,
            1,
            True,
        ) and request["top_logprobs"] >= 5
        assert "n" not in request and [turn["role"] for turn in request["messages"]] == ["system", "user"]
        assert request["messages"][0]["content"] == SYSTEM
    found = {request["messages"][1]["content"] for request in requests}
    assert found == {
        user_turn(as_text, *(texts[::-1] if is_swapped(as_text) else texts)),
        user_turn(STRAIGHT[0], *texts),
    }
    written = (
        (tmp_path / "scored.jsonl").read_text()
        + (tmp_path / "scored.meta.json").read_text()
        + json.dumps(printed)
    )
    assert (
        KEY not in written
        and json.loads((tmp_path / "scored.meta.json").read_text())["args"]["base_url"] == flags[-1]
    )


def test_the_order_is_drawn_per_prompt(tmp_path, capsys, peer):
    flags, requests = peer(likes_the_first)
    instructions = STRAIGHT[:3] + SWAPPED[:3]
    rows, printed = run(
        tmp_path,
        capsys,
        [ask(instruction, "a", "b", response("c", "off")) for instruction in instructions],
        *flags,
    )
    assert printed["requests"] == len(requests) == 18
    for row in rows:
        p = 0.25 if row["id"] in SWAPPED else 0.75  # the first of a pair stands second where swapped
        expected = [[None, p, p], [1 - p, None, p], [1 - p, 1 - p, None]]
        assert row["wins"] == [
            [None if value is None else pytest.approx(value, abs=1e-12) for value in line]
            for line in expected
        ]
        assert rewards([row]) == pytest.approx([p, 0.5, 1 - p], abs=1e-12)
        assert all(
            one["scores"] == {"judge": one["reward"]} and one["reward_error"] is None
            for one in row["responses"]
        )
        assert row["labeler"] == "judge:tiny"
    assert (
        printed["mean"]["on"] == pytest.approx((3 * (0.75 + 0.5) + 3 * (0.25 + 0.5)) / 12)
        and printed["without"] == {}
    )


def test_with_a_baseline_it_stands_first_where_not_swapped(tmp_path, capsys, peer):
    flags, requests = peer(likes_the_first)
    rows = [
        ask(instruction, *one)
        for instruction, one in (
            (STRAIGHT[0], [base("base"), response("a"), response("b")]),
            (STRAIGHT[1], [response("a"), response("b"), base("base")]),
            (SWAPPED[0], [base("base"), response("a"), response("b")]),
            (SWAPPED[1], [response("a"), response("b"), base("base")]),
        )
    ]
    scored, printed = run(tmp_path, capsys, rows, *flags, "--baseline", "base")
    assert printed["requests"] == len(requests) == 8  # a and b do not meet
    for row in scored:
        order = [one["text"] for one in row["responses"]]
        a, b, of_base = order.index("a"), order.index("b"), order.index("base")
        p = (
            0.25 if row["id"] in STRAIGHT else 0.75
        )  # for the model: the baseline stands first where not swapped
        assert row["wins"][a][b] is row["wins"][b][a] is row["wins"][a][a] is None
        assert [row["wins"][k][of_base] for k in (a, b)] == pytest.approx([p, p])
        assert [row["wins"][of_base][k] for k in (a, b)] == pytest.approx([1 - p, 1 - p])
        assert [row["responses"][k]["reward"] for k in (a, b, of_base)] == pytest.approx([p, p, 1 - p])
    seen = {request["messages"][1]["content"] for request in requests}
    assert {
        user_turn(STRAIGHT[0], "base", "a"),
        user_turn(STRAIGHT[1], "base", "b"),
        user_turn(SWAPPED[0], "a", "base"),
        user_turn(SWAPPED[1], "b", "base"),
    } <= seen
    err = refused(tmp_path, capsys, rows, *flags, "--baseline", "gpt-4", out="none.jsonl")
    assert (
        "no response is of the model 'gpt-4'; there are base, on" in err
        and not (tmp_path / "none.jsonl").exists()
    )


def test_a_baseline_stands_first_whoever_else_wrote_its_text(tmp_path, capsys, peer):
    flags, requests = peer(likes_the_first)
    rows = [
        ask(STRAIGHT[0], response("y"), response("x"), base("x")),
        ask(STRAIGHT[1], base("x"), base("y"), response("y")),
    ]
    run(tmp_path, capsys, rows, *flags, "--baseline", "base")
    assert {request["messages"][1]["content"] for request in requests} == {
        user_turn(text, "x", "y") for text in STRAIGHT[:2]
    }


def test_a_response_that_names_no_model_meets_the_baseline(tmp_path, capsys, peer):
    flags, _ = peer(likes_the_first)
    (row,), _ = run(
        tmp_path,
        capsys,
        [ask(STRAIGHT[0], base("x"), {"text": "y", "source": "on"})],
        *flags,
        "--baseline",
        "base",
    )
    assert rewards([row]) == pytest.approx([0.75, 0.25])


def test_rows_without_the_baseline_have_nothing_to_be_compared_with(tmp_path, capsys, peer):
    flags, requests = peer(likes_the_first)
    rows = [ask(f"question {k}", base("base"), "a") for k in range(100)]
    for more in (
        [ask("alone", "a", "b"), ask("also alone", base("base"))],
        [ask("one", "a"), ask("two", "b")],
    ):
        err = refused(tmp_path, capsys, rows[:4] + more, *flags, "--baseline", "base")
        assert "2 of 6 prompts have no response of base or none to compare with it, over 1 %" in err
        assert (
            not requests and not (tmp_path / "scored.jsonl").exists()
        )  # nothing was asked, nothing is written
    scored, printed = run(
        tmp_path, capsys, rows + [ask("alone", base("base"))], *flags, "--baseline", "base"
    )  # 1 of 101
    assert (
        scored[100]["wins"] == [[None]]
        and scored[100]["responses"][0]["reward_error"] == "nothing to compare with"
    )
    assert printed["without"] == {"nothing to compare with": 1} and len(requests) == 100


def test_missing_verdicts_are_counted_against_those_asked_for(tmp_path, capsys, peer):
    """2 of 100 answers are no verdict: over 1 % of the 100 compared, though 1 % of the file's 200."""
    flags, _ = peer(
        lambda body, number: completion([("x", 0.9)]) if number in (3, 7) else likes_the_first(body, number)
    )
    rows = [ask(f"question {k}", base("base"), f"answer {k}") for k in range(100)]
    err = refused(tmp_path, capsys, rows, *flags, "--baseline", "base")
    assert "2 of 100 responses have no verdict, over 1 %: {'neither m nor M" in err


def test_a_judge_sees_no_reasoning(tmp_path, capsys, peer):
    """A request has the answers alone; equal answers after other thoughts tie, and no request is sent."""
    flags, requests = peer(likes_the_first)
    a, b, empty = thinking(response("a b"), 0), thinking(response("c"), 2), response("<think>\nI was cut")
    rows = [
        ask(STRAIGHT[0], a, b),
        ask(STRAIGHT[1], thinking(response("c"), 1), b),
        ask(STRAIGHT[2], empty, b),
    ]
    scored, printed = run(tmp_path, capsys, rows, *flags)
    assert printed["requests"] == len(requests) == 2
    seen = {request["messages"][1]["content"] for request in requests}
    assert seen == {user_turn(STRAIGHT[0], "a b", "c"), user_turn(STRAIGHT[2], "", "c")}
    assert rewards(scored) == pytest.approx([0.75, 0.25, 0.5, 0.5, 0.75, 0.25])
    assert [one["text"] for one in scored[0]["responses"]] == [a["text"], b["text"]]  # as they were


def test_equal_texts_are_a_tie_that_nobody_is_asked_for(tmp_path, capsys, peer):
    flags, requests = peer(likes_the_first)
    data = [ask(STRAIGHT[0], "x", "y", response("x", "off")), ask(STRAIGHT[1], "x", "x")]
    rows, printed = run(tmp_path, capsys, data, *flags)
    assert printed["requests"] == len(requests) == 2
    assert rows[0]["wins"] == [[None, 0.75, 0.5], [0.25, None, 0.75], [0.5, 0.25, None]]
    assert rewards(rows) == [0.625, 0.5, 0.375, 0.5, 0.5] and rows[1]["wins"] == [[None, 0.5], [0.5, None]]


@pytest.mark.parametrize(
    "tops, p",
    [
        ([("m", 0.6), ("M", 0.2)], 0.75),
        ([("M", 0.3), ("x", 0.2), ("m", 0.1)], 0.25),
        ([("m", 0.5), ("x", 0.3)], 1.0),
        ([("M", 0.01)], 0.0),
        ([(" m", 0.2), ("m", 0.1), ("M", 0.1)], 0.5),
        ([("mm", 0.5), ("m", 0.2), ("M", 0.2), ("MM", 0.1)], 0.5),
    ],
)
def test_a_verdict_from_log_probabilities(tmp_path, capsys, peer, tops, p):
    flags, _ = peer(lambda body, number: completion(tops))
    rows, _ = run(tmp_path, capsys, [ask(STRAIGHT[0], "a", "b"), ask(SWAPPED[0], "a", "b")], *flags)
    assert rewards(rows) == pytest.approx([p, 1 - p, 1 - p, p], abs=1e-12)


def test_the_five_likeliest_do_not_depend_on_what_was_sampled(tmp_path, capsys, peer):
    tops = [("a", 0.3), ("b", 0.2), ("m", 0.15), ("d", 0.12), ("M", 0.05), ("e", 0.04)]

    def as_vllm_does(body, number):  # samples z, which is not among the likeliest
        return completion([("z", 0.001), *tops][: body["top_logprobs"]], "z")

    def samples_the_sixth(body, number):
        return completion(
            [("M", 0.001), ("a", 0.3), ("b", 0.2), ("c", 0.15), ("d", 0.12), ("m", 0.05)][
                : body["top_logprobs"]
            ],
            "M",
        )

    for name, answer, p in (("z", as_vllm_does, 0.75), ("M", samples_the_sixth, 1.0)):
        flags, _ = peer(answer)
        rows, _ = run(tmp_path, capsys, [ask(STRAIGHT[0], "a", "b")], *flags, out=f"{name}.jsonl")
        assert rewards(rows) == pytest.approx([p, 1 - p], abs=1e-12)


def test_the_judge_prompt(tmp_path, capsys, peer):
    flags, requests = peer(likes_the_first)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(
        "<|im_start|>system\nchoose\n<|im_end|>\n"
        "<|im_start|>user\n{output_1} {instruction} {output_2}\n<|im_end|>\n"
    )
    data = [ask(STRAIGHT[0], "a", "b"), ask(SWAPPED[0], "a", "b")]
    rows, _ = run(tmp_path, capsys, data, *flags, "--judge-prompt", str(prompt))
    assert rewards(rows) == [0.75, 0.25, 0.25, 0.75]
    messages = [request["messages"] for request in requests]
    system = {"role": "system", "content": "choose"}
    assert [system, {"role": "user", "content": f"a {STRAIGHT[0]} b"}] in messages
    assert [system, {"role": "user", "content": f"b {SWAPPED[0]} a"}] in messages
    digest = hashlib.sha256(prompt.read_bytes()).hexdigest()[:8]
    assert rows[0]["labeler"] == f"judge:tiny:prompt.txt@{digest}"
    prompt.write_text("{instruction}: {output_1} or {output_2}?")  # another prompt is another run
    err = refused(tmp_path, capsys, data, *flags, "--judge-prompt", str(prompt))
    assert f"was written with {prompt} = '" in err
    plain = ["--judge-prompt", str(prompt)]
    run(tmp_path, capsys, data[:1], *flags, *plain, out="plain.jsonl", name="plain_in.jsonl")
    assert requests[-1]["messages"] == [{"role": "user", "content": f"{STRAIGHT[0]}: a or b?"}]
    err = refused(tmp_path, capsys, data, *flags, "--judge-prompt", "none.txt", out="none.jsonl")
    assert "--judge-prompt none.txt cannot be read: " in err
    prompt.write_bytes("{instruction}: {output_1} \xe4 {output_2}?".encode("latin-1"))
    err = refused(tmp_path, capsys, data, *flags, "--judge-prompt", str(prompt), out="none.jsonl")
    assert f"--judge-prompt {prompt} cannot be read: " in err and not (tmp_path / "none.jsonl").exists()


def test_a_judge_prompt_without_its_places(tmp_path, capsys, peer):
    flags, requests = peer(likes_the_first)
    (tmp_path / "prompt.txt").write_text("{instruction}: {output_1} or {output2}?")
    err = refused(
        tmp_path, capsys, [ask(STRAIGHT[0], "a", "b")], *flags, "--judge-prompt", str(tmp_path / "prompt.txt")
    )
    assert "{output_2}" in err and not requests and not (tmp_path / "scored.jsonl").exists()


def test_429_twice_is_not_the_end(tmp_path, capsys, peer):
    flags, requests = peer(
        lambda body, number: (429, {"error": {"message": "slow down"}}) if number < 2 else likes_the_first()
    )
    rows, printed = run(tmp_path, capsys, [ask(STRAIGHT[0], "a", "b")], *flags)
    assert len(requests) == 3 and printed["requests"] == 1 and rewards(rows) == [0.75, 0.25]


@pytest.mark.parametrize(
    "status, kind, tries",
    [
        (429, "RateLimitError", 18),
        (500, "InternalServerError", 18),
        (401, "AuthenticationError", 1),
        (403, "PermissionDeniedError", 1),
        (404, "NotFoundError", 1),
    ],
)
def test_a_server_that_refuses_for_good(tmp_path, capsys, peer, monkeypatch, status, kind, tries):
    monkeypatch.setattr(judge.Judge, "window", 2)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    data = [ask(text, "a", "b") for text in STRAIGHT[:3]]
    broken = [True]

    def answer(body, number):
        if broken[0] and STRAIGHT[2] + "\n" in body["messages"][1]["content"]:
            return status, {"error": {"message": "no more of this"}}
        return likes_the_first()

    flags, requests = peer(answer)
    err = refused(tmp_path, capsys, data, *flags)
    assert (
        f"{flags[-1]}: {kind}: " in err
        and "no more of this" in err
        and "Traceback" not in err
        and KEY not in err
    )
    assert (
        len(requests) == 2 + tries and len(read_rows(tmp_path / "scored.jsonl")) == 2
    )  # the first window stays
    broken[0] = False
    rows, printed = run(tmp_path, capsys, data, *flags)
    assert printed["requests"] == 1 and printed["resumed_rows"] == 2 and rewards(rows) == [0.75, 0.25] * 3


@pytest.mark.parametrize("status", [400, 401])
def test_a_key_that_the_server_repeats(tmp_path, capsys, peer, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    flags, _ = peer(
        lambda body, number: (
            likes_the_first()
            if STRAIGHT[0] + "\n" in body["messages"][1]["content"]
            else (status, {"error": {"message": f"the key {KEY} is not good enough"}})
        )
    )
    try:
        run(tmp_path, capsys, [ask(STRAIGHT[0], "a", "b"), ask(STRAIGHT[1], "a", "b")], *flags)
    except SystemExit:
        pass
    captured = capsys.readouterr()
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert KEY not in captured.err + captured.out + written
    assert ("the key ..." in written) == (status == 400) and ("the key ..." in captured.err) == (
        status == 401
    )


def test_no_server_there(tmp_path, capsys, quick):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    err = refused(tmp_path, capsys, [ask(STRAIGHT[0], "a", "b")], "--model", "tiny", "--base-url", url)
    assert f"{url}: no answer in 6 tries (" in err and "; check the server, then run the same" in err
    assert not (tmp_path / "scored.jsonl").exists()


@pytest.fixture
def hangs_up():
    """hangs_up(after) -> (flags, times of requests): a server that closes connections without an answer.

    It answers the first `after` requests.
    """
    servers = []

    def start(after=0):
        requests, lock = [], threading.Lock()

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                length = 0
                for line in iter(self.rfile.readline, b"\r\n"):
                    name, _, value = line.decode().partition(":")
                    length = int(value) if name.lower() == "content-length" else length
                self.rfile.read(length)
                with lock:
                    requests.append(time.monotonic())
                    number = len(requests)
                if number <= after:
                    data = json.dumps(likes_the_first()[1]).encode()
                    head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
                    self.wfile.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

        class Server(socketserver.ThreadingTCPServer):
            request_queue_size = 64

        servers.append(Server(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{servers[-1].server_address[1]}/v1"
        return ["--model", "tiny", "--base-url", url], requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_that_closes_connections(tmp_path, capsys, hangs_up):
    """At a user's speed: 192 questions, and one sentence within 25 seconds of the first."""
    flags, requests = hangs_up()
    data = [ask(text, "a", "b", "c", "d") for text in STRAIGHT[:32]]  # 192 questions in a window
    started = time.monotonic()
    err = refused(tmp_path, capsys, data, *flags)
    assert time.monotonic() - started < 25 and 4 <= len(requests) / 32 <= 7
    (sentence,) = [line for line in err.splitlines() if flags[-1] in line]
    assert f"{flags[-1]}: no answer in 6 tries (" in sentence
    assert sentence.endswith("; check the server, then " + judge.RESUME)
    assert not (tmp_path / "scored.jsonl").exists() and not (tmp_path / "scored.meta.json").exists()


def test_a_server_that_closes_connections_midway(tmp_path, capsys, hangs_up, quick, monkeypatch):
    monkeypatch.setattr(judge.Judge, "window", 2)
    data = [ask(text, "a", "b") for text in STRAIGHT[:6]]
    flags, requests = hangs_up(after=4)
    err = refused(tmp_path, capsys, data, *flags)
    assert "no answer in 6 tries" in err and len(read_rows(tmp_path / "scored.jsonl")) == 4
    assert 4 + 6 <= len(requests) <= 4 + 2 * 6


def test_a_connection_that_is_lost_once(tmp_path, capsys, peer):
    """What is lost is asked for again: the answers are those of a server that answers at once."""
    flags, requests = peer(lambda body, number: likes_the_first() if number % 3 else (None, ""))
    rows, printed = run(tmp_path, capsys, [ask(text, "a", "b") for text in STRAIGHT[:4]], *flags)
    assert rewards(rows) == [0.75, 0.25] * 4 and printed["requests"] == 4 < len(requests)


def choices(**change):
    """likes_the_first's answer with its choice changed."""
    content = likes_the_first()[1]
    content["choices"][0].update(change)
    return content


NOTHING = {"content": [{"token": "m", "logprob": -1.0, "bytes": None, "top_logprobs": []}]}
NONSENSE = {  # content of a 200, and the beginning of the reason
    "no choices": ({**choices(), "choices": []}, "an answer of another shape than a chat completion's"),
    "null choices": ({**choices(), "choices": None}, "an answer of another shape than a chat completion's"),
    "an object of nothing": ({}, "an answer of another shape than a chat completion's"),
    "an empty choice": ({**choices(), "choices": [{}]}, "no log-probabilities in the server's answer"),
    "null logprobs": (choices(logprobs=None), "no log-probabilities in the server's answer"),
    "null content": (choices(logprobs={"content": None}), "no log-probabilities in the server's answer"),
    "empty content": (choices(logprobs={"content": []}), "no log-probabilities in the server's answer"),
    "an empty list": (choices(logprobs=NOTHING), "neither m nor M among the five most likely first tokens"),
    "other tokens": (
        completion([("A", 0.5), ("B", 0.5)])[1],
        "neither m nor M among the five most likely first tokens",
    ),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_an_answer_without_a_verdict(tmp_path, capsys, peer, name):
    content, reason = NONSENSE[name]
    flags, _ = peer(
        lambda body, number: (
            (200, content) if "strange" in body["messages"][1]["content"] else likes_the_first()
        )
    )
    rows, printed = run(
        tmp_path, capsys, [ask(STRAIGHT[0], "a", "b", "strange"), ask(STRAIGHT[1], "a", "strange")], *flags
    )
    assert rows[0]["wins"] == [[None, 0.75, None], [0.25, None, None], [None, None, None]]
    assert rows[1]["wins"] == [[None, None], [None, None]]
    assert rewards(rows) == [0.75, 0.25, None, None, None]  # the mean over what there is
    errors = [one["reward_error"] for row in rows for one in row["responses"]]
    assert errors[:2] == [None, None] and all(error.startswith(reason) for error in errors[2:])
    assert list(printed["without"].values()) == [3] and printed["requests"] == 4
    flags, _ = peer(lambda body, number: (200, content))
    err = refused(
        tmp_path, capsys, [ask(text, "a", "b", "c", "d") for text in STRAIGHT[:2]], *flags, out="none.jsonl"
    )
    assert f"tiny: none of 12 answers could be read: {reason}" in err
    err = refused(tmp_path, capsys, [ask(text, "a", "b") for text in STRAIGHT[:2]], *flags, out="few.jsonl")
    assert "few.jsonl: no response has a score" in err and reason in err  # too few to say so of all


@pytest.mark.parametrize(
    "content",
    [
        "{nonsense",
        "<html>",
        "[]",
        '"text"',
        "null",
        {"choices": [None]},
        choices(logprobs={"content": [{"token": "m", "logprob": -1.0}]}),
        choices(logprobs={"content": [{"token": "m", "top_logprobs": [{"token": "m", "logprob": None}]}]}),
    ],
    ids=["cut JSON", "html", "list", "text", "null", "null choice", "no list", "null logprob"],
)
def test_an_answer_of_another_shape(tmp_path, capsys, peer, content):
    flags, _ = peer(
        lambda body, number: (
            (200, content) if "strange" in body["messages"][1]["content"] else likes_the_first()
        )
    )
    try:
        rows, printed = run(tmp_path, capsys, [ask(STRAIGHT[0], "a", "b", "strange")], *flags)
        assert rewards(rows) == [0.75, 0.25, None] and sum(printed["without"].values()) == 1
    except SystemExit as error:  # one sentence would do, too
        assert error.code == 2 and flags[-1] in capsys.readouterr().err


def test_one_pair_without_a_verdict_in_a_window_of_its_own(tmp_path, capsys, peer, monkeypatch):
    monkeypatch.setattr(judge.Judge, "window", 2)
    flags, _ = peer(
        lambda body, number: (
            (400, {"error": {"message": "too long"}})
            if "strange" in body["messages"][1]["content"]
            else likes_the_first()
        )
    )
    data = [ask(STRAIGHT[0], "a", "b"), ask(STRAIGHT[1], "a", "b"), ask(STRAIGHT[2], "a", "strange")]
    rows, printed = run(tmp_path, capsys, data, *flags)
    assert rewards(rows) == [0.75, 0.25, 0.75, 0.25, None, None] and sum(printed["without"].values()) == 2


def test_refused_pairs_are_counted(tmp_path, capsys, peer):
    flags, requests = peer(
        lambda body, number: (
            (400, {"error": {"message": "the context is 2048 tokens"}})
            if "strange" in body["messages"][1]["content"]
            else likes_the_first()
        )
    )
    rows, printed = run(tmp_path, capsys, [ask(STRAIGHT[0], "a", "b", "strange")], *flags)
    assert rewards(rows) == [0.75, 0.25, None] and len(requests) == printed["requests"] == 3
    ((reason, count),) = printed["without"].items()
    assert (
        reason.startswith("refused by the server: ") and "the context is 2048 tokens" in reason and count == 1
    )


def test_a_key_is_needed_for_openai(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for more in ([], ["--base-url", "https://api.openai.com/v1"]):
        err = refused(tmp_path, capsys, [ask(STRAIGHT[0], "a", "b")], "--model", "gpt-4-1106-preview", *more)
        assert "https://api.openai.com/v1 needs a key in the environment variable OPENAI_API_KEY" in err
        assert os.listdir(tmp_path) == ["in.jsonl"]


def test_max_requests_stops_before_a_window_and_goes_on(tmp_path, capsys, peer, monkeypatch):
    monkeypatch.setattr(judge.Judge, "window", 2)
    flags, requests = peer(likes_the_first)
    data = [
        ask(text, "a", "b", response("c", "off")) for text in STRAIGHT[:3] + SWAPPED[:2]
    ]  # 3 requests a row, 6 a window
    run(tmp_path, capsys, data, *flags, out="whole.jsonl")
    assert len(requests) == 15
    for budget, rows, asked in (
        (11, 2, 6),
        (5, 2, 6),
        (6, 4, 12),
        (3, 5, 15),
    ):  # what this run may ask for; what stands after it
        arguments = [
            "--responses",
            str(tmp_path / "in.jsonl"),
            "--out",
            str(tmp_path / "parts.jsonl"),
            *flags,
            "--max-requests",
            str(budget),
        ]
        if rows < 5:
            with pytest.raises(SystemExit) as stopped:
                score.main(judge.parse_args(arguments), judge.Judge)
            assert (
                f"--max-requests {budget}: " in stopped.value.code
                and "run the same command again to resume" in stopped.value.code
            )  # exit status 1
            capsys.readouterr()
        else:
            score.main(judge.parse_args(arguments), judge.Judge)
            printed = json.loads(capsys.readouterr().out)
            assert printed["requests"] == 3 and printed["resumed_rows"] == 4 and printed["rows"] == 5
        assert len(requests) == 15 + asked and len(read_rows(tmp_path / "parts.jsonl")) == rows
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_torn_file_asks_only_for_what_is_missing(tmp_path, capsys, peer, monkeypatch):
    monkeypatch.setattr(judge.Judge, "window", 2)
    flags, requests = peer(likes_the_first)
    data = [ask(text, "a", "b") for text in STRAIGHT[:3] + SWAPPED[:2]]
    run(tmp_path, capsys, data, *flags)
    whole = (tmp_path / "scored.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length, kept in (
        (ends[2] + 17, 2),
        (ends[3], 4),
        (ends[0] - 1, 0),
        (len(whole) - 1, 4),
    ):
        (tmp_path / "scored.jsonl").write_bytes(whole[:length])
        before = len(requests)
        _, printed = run(tmp_path, capsys, data, *flags)
        assert (tmp_path / "scored.jsonl").read_bytes() == whole and printed["resumed_rows"] == kept
        assert len(requests) - before == 5 - kept == printed["requests"]
    before = len(requests)
    _, printed = run(tmp_path, capsys, data, *flags)  # it is complete: nobody is asked
    assert len(requests) == before and printed["resumed_rows"] == 4


def test_judge_after_a_reward_model(tmp_path, capsys, peer):
    flags, _ = peer(likes_the_first)

    def of(text, reward):
        return response(text, reward=reward, reward_error=None, scores={"rm": reward})

    data = [{**ask(STRAIGHT[0], of("a", 1.0), of("b", 2.0)), "labeler": "rm:x", "wins": None}]
    (row,), _ = run(tmp_path, capsys, data, *flags, "--name", "gpt")
    assert rewards([row]) == [0.75, 0.25] and row["labeler"] == "gpt:tiny"
    assert row["wins"] == [[None, 0.75], [0.25, None]]
    assert [one["scores"] for one in row["responses"]] == [{"rm": 1.0, "gpt": 0.75}, {"rm": 2.0, "gpt": 0.25}]


KILLED = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
import judge
judge.Judge.window, lock = 4, threading.Lock()
honest, answered = judge.Server.answer, []

def answer(server, *rest):  # kill -9 when so many answers came
    result = honest(server, *rest)
    with lock:
        answered.append(1)
        if len(answered) == int(sys.argv[2]):
            os.kill(os.getpid(), 9)
    return result

judge.Server.answer = answer
judge.score.main(judge.parse_args(sys.argv[3:]), judge.Judge)
"""


def test_what_was_paid_for_is_asked_again_for_one_window_at_most(tmp_path, capsys, peer):
    flags, requests = peer(likes_the_first)
    data = [ask(f"instruction {k}", "a", "b", "c") for k in range(10)]  # 3 requests a row, 12 a window of 4
    paths = ["--responses", write_rows(tmp_path / "in.jsonl", data), "--out", str(tmp_path / "scored.jsonl")]

    def start(last):
        command = [sys.executable, "-c", KILLED, str(REPO / "scorers"), str(last), *paths, *flags]
        before = len(requests)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
        return done.returncode, len(requests) - before

    asked = 0
    for last, rows in ((5, 0), (29, 8)):
        status, count = start(last)
        asked += count
        assert status == -signal.SIGKILL and last <= count <= 12 * (rows // 4 + 1)
        path = tmp_path / "scored.jsonl"
        assert path.read_bytes().count(b"\n") == rows
    status, count = start(0)
    assert status == 0 and count == 6 and asked + count <= 30 + 2 * 12
    result, _ = run(tmp_path, capsys, data, *flags, out="whole.jsonl")
    assert (tmp_path / "scored.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    record = json.loads((tmp_path / "scored.meta.json").read_text())
    assert record["counts"]["resumed_rows"] == 8 and record["counts"]["requests"] == 6


def test_the_window_is_of_32_rows():
    assert judge.Judge.window == category.Category.window == 32


def test_where_the_server_is(tmp_path, capsys, peer, monkeypatch):
    flags, requests = peer(likes_the_first)
    data = [ask(STRAIGHT[0], "a", "b")]
    monkeypatch.setenv("OPENAI_BASE_URL", flags[-1])
    run(tmp_path, capsys, data, "--model", "tiny")
    assert len(requests) == 1
    record = json.loads((tmp_path / "scored.meta.json").read_text())
    assert record["args"]["base_url"] == flags[-1]
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    run(tmp_path, capsys, data, *flags, out="flag.jsonl")  # the flag goes first
    assert len(requests) == 2
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    assert judge.parse_args(["--responses", "x", "--out", "y", "--model", "m"]).base_url == judge.OPENAI
    with pytest.raises(SystemExit):
        judge.parse_args(["--responses", "x", "--out", "y", "--model", "m", "--base-url", "http://a:b@c"])
    assert "--base-url must contain no password" in capsys.readouterr().err


# ----- category


def test_category(tmp_path, capsys, peer):
    answers = {
        "one": ["1"],
        "two": [" 8.\n"],
        "again": ["a poem", "9"],
        "never": ["0", "17"],
        "comma": ["2"],
        "sixteen": ["16"],
    }
    asked = {name: 0 for name in answers}

    def answer(body, number):
        (name,) = (name for name in answers if f"[request]\nsay {name}\n" in body["messages"][-1]["content"])
        asked[name] += 1
        return completion([], answers[name][asked[name] - 1])

    flags, requests = peer(answer)
    data = [
        {
            "id": name,
            "prompt": f"say {name}",
            "responses": [response("x", reward=1.0, reward_error=None)],
            "labeler": "rm:x",
        }
        for name in answers
    ]
    rows, printed = test_score.run(tmp_path, capsys, data, *flags, script=category)
    assert [row["category"] for row in rows] == [
        "linguistics",
        "coding",
        "assisting or creative writing",
        "other",
        "factual information (general or professional), history or common practices",
        "other",
    ]
    assert printed["requests"] == len(requests) == 8 and printed["unreadable"] == 1
    assert asked == {name: len(of) for name, of in answers.items()}
    assert printed["categories"]["other"] == 2 and sum(printed["categories"].values()) == 6
    assert [{key: value for key, value in row.items() if key != "category"} for row in rows] == [
        {**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in data
    ]
    for request in requests:
        assert request["temperature"] == 0 and "logprobs" not in request and len(request["messages"]) == 1
        listed = request["messages"][0]["content"]
        assert (
            all(f"{k}. {label}\n" in listed for k, label in enumerate(category.CATEGORIES, 1))
            and len(category.CATEGORIES) == 16
        )


def test_category_whose_answers_cannot_be_read(tmp_path, capsys, peer):
    flags, requests = peer(lambda body, number: completion([], "a poem"))
    data = [ask(f"say {k}", "x") for k in range(8)]
    err = test_score.refused(tmp_path, capsys, data, *flags, script=category)
    assert "tiny: none of 8 answers could be read: no number of the list" in err
    assert len(requests) == 16 and not (tmp_path / "scored.jsonl").exists()
    rows, printed = test_score.run(tmp_path, capsys, data[:7], *flags, script=category, out="few.jsonl")
    assert printed["categories"] == {"other": 7} and printed["unreadable"] == 7


def test_max_requests_of_category_leaves_room_for_the_second_question(tmp_path, capsys, peer, monkeypatch):
    monkeypatch.setattr(category.Category, "window", 2)
    answers = iter(["a poem", "8", "8", "8", "8", "8"])
    flags, requests = peer(lambda body, number: completion([], next(answers)))
    data = [ask(f"say {k}", "x") for k in range(5)]
    with pytest.raises(SystemExit) as stopped:
        test_score.run(tmp_path, capsys, data, *flags, "--max-requests", "2", script=category)
    assert "--max-requests 2: 3 were sent, and the next window needs 2" in stopped.value.code
    assert [row["category"] for row in read_rows(tmp_path / "scored.jsonl")] == ["coding"] * 2
    _, printed = test_score.run(tmp_path, capsys, data, *flags, "--max-requests", "3", script=category)
    assert printed["resumed_rows"] == 2 and printed["requests"] == 3 and len(requests) == 6


# ----- a real server


def rendered(instruction, first, second):
    """The prompt that the server's model reads."""
    return (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{user_turn(instruction, first, second)}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def real_rows():
    words = "why how what where tell me the a red big sun moon tree cook rice sing write code list"
    words = f"{words} name two ten cats dogs".split()
    rng = random.Random(0)
    say = lambda count: " ".join(rng.choice(words) for _ in range(count))  # noqa: E731
    rows = [
        ask(
            f"{say(4)} {k}",
            say(rng.randint(1, 12)),
            response(say(rng.randint(1, 12)), "off"),
            base(say(rng.randint(1, 12))),
        )
        for k in range(12)
    ]
    rows[3]["responses"][2]["text"] = rows[3]["responses"][0]["text"]  # the baseline's is one of ours
    rows[4]["responses"][0]["text"] = "{output_2} {instruction} é 日本"
    return rows


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """(folder of a chat model, {(instruction, first, second): probability of m against M, or None}).

    By transformers, from the model's weights. The head's rows of `m` and `M` are fitted to logits drawn for
    these prompts, so that each is often, but not always, among the five likeliest tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_policy(
        tmp_path_factory.mktemp("judge"), tie=False, hidden=128, spread=0.12
    )  # vLLM's CPU attention wants heads of 64
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    model.config.max_position_embeddings = tokenizer.model_max_length = 2048
    asked = [
        (row["prompt"], a["text"], b["text"])
        for row in real_rows()
        for a, b in permutations(row["responses"], 2)
    ]
    with torch.no_grad():
        ids = [
            tokenizer(rendered(*one), add_special_tokens=False, return_tensors="pt").input_ids
            for one in asked
        ]
        states = torch.cat([model.model(one).last_hidden_state[:, -1] for one in ids])  # (N, d)
        drawn = 1.3 + torch.randn(len(asked), 2, generator=torch.Generator().manual_seed(0))
        model.lm_head.weight *= 0.5 / (states @ model.lm_head.weight.T).std()
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(["m", "M"])] = (
            torch.linalg.pinv(states, rtol=1e-3) @ drawn
        ).T
        logps = (states @ model.lm_head.weight.T).double().log_softmax(-1)  # (N, V)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    verdicts = {}
    for one, logp in zip(asked, logps):
        assert (
            logp.topk(6).values[4] - logp.topk(6).values[5] > 1e-4
        )  # another kernel's rounding moves nothing in or out
        top = {
            tokenizer.decode([token]): math.exp(value)
            for value, token in zip(*(part.tolist() for part in logp.topk(5)))
        }
        m, both = top.get("m", 0.0), top.get("m", 0.0) + top.get("M", 0.0)
        verdicts[one] = m / both if both else None
    return folder, verdicts


@pytest.fixture(scope="module")
def server(oracle, tmp_path_factory):
    """Flags for a judge behind vLLM's own server, which runs as long as this module's tests."""
    if not find_spec("vllm"):
        pytest.skip("vllm is not installed: no server for the judge")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{os.cpu_count() - 1}",
        "OMP_NUM_THREADS": str(os.cpu_count()),
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vllm.entrypoints.openai.api_server",
                "--model",
                oracle[0],
                "--served-model-name",
                "tiny",
                "--dtype",
                "float32",
                "--enforce-eager",
                "--max-model-len",
                "2048",
                "--port",
                str(port),
            ],
            stdout=file,
            stderr=file,
            env=env,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            raise AssertionError(log.read_text()[-3000:])
        yield ["--model", "tiny", "--base-url", f"http://127.0.0.1:{port}/v1"]
    finally:
        for stop in (signal.SIGTERM, signal.SIGKILL):  # the server and its engine: a session of their own
            try:
                os.killpg(process.pid, stop)
                process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def expected_wins(row, verdicts, baseline=None):
    """wins of a row: the baseline is output_1 before alpaca_eval's draw."""
    responses = row["responses"]
    wins = [[None] * len(responses) for _ in responses]
    for i, j in combinations(range(len(responses)), 2):
        one, other = responses[i], responses[j]
        if baseline and (one["model"] == baseline) == (other["model"] == baseline):
            continue
        later = bool(baseline) and other["model"] == baseline
        first, second = (j, i) if later != is_swapped(row["prompt"]) else (i, j)
        p = 0.5
        if one["text"] != other["text"]:
            p = verdicts[row["prompt"], responses[first]["text"], responses[second]["text"]]
        wins[first][second], wins[second][first] = p, None if p is None else 1 - p
    return wins


def same_wins(rows, expected):
    """Wins and rewards are the expected ones, to what float32 leaves of a softmax; what has none says why."""
    for row, wins in zip(rows, expected):
        for mine, theirs in zip(row["wins"], wins):
            assert mine == [None if value is None else pytest.approx(value, abs=2e-3) for value in theirs]
        for one, line in zip(row["responses"], row["wins"]):
            values = [value for value in line if value is not None]
            assert one["reward"] == (pytest.approx(sum(values) / len(values)) if values else None)
            assert (one["reward_error"] is None) == bool(values)
        for i, j in permutations(range(len(wins)), 2):
            if row["wins"][i][j] is not None:
                assert row["wins"][i][j] + row["wins"][j][i] == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.vllm
def test_verdicts_of_a_real_judge(tmp_path, capsys, oracle, server):
    data, verdicts = real_rows(), oracle[1]
    rows, printed = run(tmp_path, capsys, data, *server)
    expected = [expected_wins(row, verdicts) for row in data]
    same_wins(rows, expected)
    assert printed["requests"] == 12 * 3 - 1  # equal texts in row 3
    values = [value for row in expected for line in row for value in line if value is not None]
    assert (
        sum(value in (0, 1) for value in values) > 3 and sum(0.05 < value < 0.95 for value in values) > 10
    )  # one of the two, or both
    missing = sum(row[i][j] is None for row in expected for i in range(3) for j in range(3) if i != j)
    assert 0 < missing < 30  # and sometimes neither
    lone = sum(all(value is None for value in line) for row in expected for line in row)
    assert printed["without"] == (
        {"neither m nor M among the five most likely first tokens": lone} if lone else {}
    )
    assert {is_swapped(row["prompt"]) for row in data} == {False, True}


@pytest.mark.slow
@pytest.mark.vllm
def test_a_real_judge_with_a_baseline(tmp_path, capsys, oracle, server):
    # rows in which every pair has a verdict, since more than 1 % without one is an error here
    data = [
        row
        for row in real_rows()
        if None not in (line[2] for line in expected_wins(row, oracle[1], "base")[:2])
    ]
    rows, printed = run(tmp_path, capsys, data, *server, "--baseline", "base")
    same_wins(rows, [expected_wins(row, oracle[1], "base") for row in data])
    assert len(data) > 3 and {is_swapped(row["prompt"]) for row in data} == {False, True}
    assert printed["requests"] == 2 * len(data) - sum(
        row["responses"][2]["text"] == row["responses"][0]["text"] for row in data
    )
    assert all(row["wins"][0][1] is None and row["labeler"] == "judge:tiny:base" for row in rows)


@pytest.mark.slow
@pytest.mark.vllm
def test_a_real_judge_goes_on_to_the_same_bytes(tmp_path, capsys, server, monkeypatch):
    monkeypatch.setattr(judge.Judge, "window", 4)
    data = real_rows()
    run(tmp_path, capsys, data, *server, out="whole.jsonl")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, capsys, data, *server, "--max-requests", "20")
    assert "--max-requests 20: 11 were sent, and the next window needs 12" in stopped.value.code
    assert len(read_rows(tmp_path / "scored.jsonl")) == 4
    rows, printed = run(tmp_path, capsys, data, *server, "--max-requests", "24")
    assert printed["requests"] == 24 and printed["resumed_rows"] == 4
    assert [row["id"] for row in rows] == [row["id"] for row in data]
    for mine, theirs in zip(rewards(rows), rewards(read_rows(tmp_path / "whole.jsonl"))):
        assert mine == (theirs if theirs is None else pytest.approx(theirs, abs=1e-3))


@pytest.mark.slow
@pytest.mark.vllm
def test_what_a_real_server_refuses(tmp_path, capsys, server):
    data = real_rows()[:2] + [ask("too much", "a" * 2000, "b")]
    rows, printed = run(tmp_path, capsys, data, *server)
    for one in rows[2]["responses"]:
        assert one["reward_error"].startswith("refused by the server: ") and "2048" in one["reward_error"]
    assert rewards(rows[2:]) == [None, None] and printed["responses"] == 8
    err = refused(tmp_path, capsys, data, *server, "--model", "unknown", out="none.jsonl")
    assert (
        f"{server[-1]}: NotFoundError: " in err
        and "unknown" in err
        and not (tmp_path / "none.jsonl").exists()
    )
