"""
score.py, scorers/logp.py and verify.py: each against a slow way of computing the same.

Covers  rewards of a Llama with a chat template (pad is the end of turn) and of a Bert that reads pairs of
        texts, both against one response at a time through the model's own forward. logp against float64
        log_softmax of the full logits. verify by a table. Batches, merging by id, what has no score, resume,
        shards, records, locks, a finished run, rows of another run, a full disk, broken weights, token ids
        beyond the vocabulary.
Run     python -m pytest tests/test_score.py
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import REPO, make_policy, read_rows, write_rows
from models import make_bert, make_bert_tokenizer, tiny

import score
from loading import fingerprint

sys.path.insert(0, str(REPO / "scorers"))
import logp  # noqa: E402
import verify  # noqa: E402

KINDS = {
    "score": "RewardModel",
    "verify": "Verify",
    "logp": "LogProbability",
    "rm_vllm": "RewardModel",
    "pairrm": "PairRM",
    "judge": "Judge",
    "category": "Category",
    "embed": "Embed",
}


def response(text, source="on", **more):
    return {
        "text": text,
        "source": source,
        "model": source,
        "finish": "stop",
        "tokens": None,
        "token_ids": None,
        "tokenizer": None,
        **more,
    }


def prompt_row(number, *texts, **more):
    return {
        "id": f"p{number}",
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "responses": [text if isinstance(text, dict) else response(text) for text in texts],
        **more,
    }


def run(tmp_path, capsys, rows, *flags, script=score, out="scored.jsonl", name="in.jsonl"):
    """(rows of the output, the last line as JSON); `rows` are written to one file, or are paths already."""
    paths = rows if isinstance(rows[0], str) else [write_rows(tmp_path / name, rows)]
    args = script.parse_args(["--responses", *paths, "--out", str(tmp_path / out), *flags])
    score.main(args, getattr(script, KINDS[script.__name__]))
    return read_rows(tmp_path / out), json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(tmp_path, capsys, rows, *flags, **more):
    with pytest.raises(SystemExit) as exit_status:
        run(tmp_path, capsys, rows, *flags, **more)
    err = capsys.readouterr().err
    assert exit_status.value.code == 2 and "Traceback" not in err
    return err


run_logp, refused_logp = partial(run, script=logp), partial(refused, script=logp)
run_verify, refused_verify = partial(run, script=verify), partial(refused, script=verify)


def rewards(rows):
    return [one["reward"] for row in rows for one in row["responses"]]


@pytest.fixture(scope="module")
def llama_rm(tmp_path_factory):
    """A decoder reward model; its rewards are far apart and leave [0, 1]."""
    folder = tmp_path_factory.mktemp("llama_rm")
    return tiny(folder, "LlamaForSequenceClassification", seed=1, max_position_embeddings=256)


@pytest.fixture(scope="module")
def bert_rm(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert_rm"))


# texts of very different lengths; one has the end-of-turn token itself, which is the padding token too
ROWS = [
    prompt_row(0, "short", "a much longer answer that goes on and on " * 2, "x"),
    prompt_row(1, "", "ends early<|im_end|>", "yes"),
    prompt_row(2, "é 日本 😀", "short", "short"),
]
RM = LOGP = ["--dtype", "float32"]


# ----- rm


def test_llama_rewards_are_those_of_one_response_at_a_time(tmp_path, capsys, llama_rm):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows, printed = run(tmp_path, capsys, ROWS, *RM, "--model", llama_rm)
    tokenizer = AutoTokenizer.from_pretrained(llama_rm)
    model = AutoModelForSequenceClassification.from_pretrained(llama_rm).eval()
    # no row is padded: the last token is the last one
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = None
    expected = []
    for row in ROWS:
        for one in row["responses"]:
            turns = row["prompt"] + [{"role": "assistant", "content": one["text"]}]
            ids = tokenizer(
                tokenizer.apply_chat_template(turns, tokenize=False),
                add_special_tokens=False,
                return_tensors="pt",
            ).input_ids
            with torch.no_grad():
                hidden = model.model(ids).last_hidden_state
                alone = model(ids).logits.item()  # the model's own pooling, of a batch of one
            assert alone == pytest.approx((hidden[0, -1] @ model.score.weight[0]).item(), abs=1e-5)
            expected.append(alone)
    assert rewards(rows) == pytest.approx(expected, abs=1e-4)
    assert max(expected) > 1 and min(expected) < 0  # a sigmoid would show
    assert all(
        one["scores"] == {"rm": one["reward"]} and one["reward_error"] is None
        for row in rows
        for one in row["responses"]
    )
    assert (
        printed["mean"]["on"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
        and printed["without"] == {}
    )
    assert 0 <= printed["padding"] < 0.08


def test_padding_inside_a_batch_changes_no_reward(tmp_path, capsys, llama_rm):
    rows = [prompt_row(k, "a" * (100 + k % 7)) for k in range(14)]  # lengths within 8 %: they share batches
    together, printed = run(tmp_path, capsys, rows, *RM, "--model", llama_rm)
    assert 0 < printed["padding"] < 0.08
    alone, printed = run(
        tmp_path, capsys, rows, *RM, "--model", llama_rm, "--batch-tokens", "1", out="alone.jsonl"
    )
    assert printed["padding"] == 0 and rewards(together) == pytest.approx(rewards(alone), abs=1e-4)


def test_bert_reads_pairs_of_texts(tmp_path, capsys, bert_rm):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    data = [prompt_row(0, "good", "bad " * 20, "answer 1 2"), prompt_row(1, "a b c d", "a b c", "a b c b")]
    rows, _ = run(tmp_path, capsys, data, *RM, "--model", bert_rm)
    tokenizer = AutoTokenizer.from_pretrained(bert_rm)
    model = AutoModelForSequenceClassification.from_pretrained(bert_rm).eval()
    expected, without_kinds = [], []
    for row in data:
        for one in row["responses"]:
            pair = tokenizer(row["prompt"][0]["content"], one["text"], return_tensors="pt")
            assert pair["token_type_ids"].sum() > 0
            with torch.no_grad():
                expected.append(model(**pair).logits.item())
                without_kinds.append(model(input_ids=pair["input_ids"]).logits.item())
    assert rewards(rows) == pytest.approx(expected, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(expected, without_kinds)) > 1e-2  # the kinds matter to this model


def relabelled(folder, *architecture):
    """The model in `folder` with a config that promises one label, and an architecture."""
    config = json.loads((folder / "config.json").read_text()) | {
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    (folder / "config.json").write_text(
        json.dumps(config | ({"architectures": list(architecture)} if architecture else {}))
    )
    return str(folder)


def test_a_missing_head_is_fatal(tmp_path, capsys):
    make_policy(tmp_path / "policy")
    make_bert(tmp_path / "bert", "BertModel")
    no_classifier = "expected a ...ForSequenceClassification with one label, found "
    for folder, architecture, sentence in (
        ("policy", [], no_classifier + "LlamaForCausalLM"),
        ("bert", [], no_classifier + "BertModel"),
        ("policy", ["LlamaForSequenceClassification"], "missing weights: score.weight"),
        ("bert", ["BertForSequenceClassification"], "missing weights: classifier.bias, classifier.weight"),
    ):
        err = refused(tmp_path, capsys, ROWS, *RM, "--model", relabelled(tmp_path / folder, *architecture))
        assert f"{tmp_path / folder}: {sentence}" in err
        assert not (tmp_path / "scored.jsonl").exists() and not (tmp_path / "scored.meta.json").exists()


def test_a_missing_head_loses_no_earlier_file(tmp_path, capsys, llama_rm):
    run(tmp_path, capsys, ROWS, *RM, "--model", llama_rm)
    before = (tmp_path / "scored.jsonl").read_bytes()
    make_policy(tmp_path / "policy")
    headless = relabelled(tmp_path / "policy", "LlamaForSequenceClassification")
    refused(tmp_path, capsys, ROWS, *RM, "--model", headless, "--overwrite")
    assert (tmp_path / "scored.jsonl").read_bytes() == before


def test_two_labels_are_refused(tmp_path, capsys):
    folder = make_bert(tmp_path / "two", num_labels=2)
    err = refused(tmp_path, capsys, ROWS, *RM, "--model", folder)
    assert "one label" in err and "2" in err and not (tmp_path / "scored.jsonl").exists()


def test_too_long_is_never_cut(tmp_path, capsys, llama_rm):
    rows, printed = run(
        tmp_path, capsys, [prompt_row(0, "ab", "a" * 60)], *RM, "--model", llama_rm, "--max-length", "80"
    )
    short, long = rows[0]["responses"]
    assert isinstance(short["reward"], float) and short["reward_error"] is None
    assert (long["reward"], long["reward_error"], long["scores"]) == (
        None,
        "longer than 80 tokens",
        {"rm": None},
    )
    assert printed["without"] == {"longer than 80 tokens": 1} and long["text"] == "a" * 60
    # the limit is that of prompt, response and template together, to the token
    from transformers import AutoTokenizer

    turns = [*rows[0]["prompt"], {"role": "assistant", "content": "a" * 60}]
    length = len(
        AutoTokenizer.from_pretrained(llama_rm).apply_chat_template(turns, return_dict=True)["input_ids"]
    )
    for limit, fits in ((length, True), (length - 1, False)):
        rows, _ = run(
            tmp_path,
            capsys,
            [prompt_row(0, "ab", "a" * 60)],
            *RM,
            "--model",
            llama_rm,
            "--max-length",
            str(limit),
            out=f"{limit}.jsonl",
        )
        assert (rows[0]["responses"][1]["reward"] is not None) == fits
    assert "reads at most 256 tokens" in refused(
        tmp_path, capsys, ROWS, *RM, "--model", llama_rm, "--max-length", "300"
    )


def test_a_reward_that_is_not_finite(tmp_path, capsys, bert_rm):
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path / "overflows"
    model = AutoModelForSequenceClassification.from_pretrained(bert_rm)
    bad = make_bert_tokenizer(folder).convert_tokens_to_ids("bad")
    model.bert.embeddings.word_embeddings.weight.data[bad] = 3e38  # the sum in the layer norm is infinite
    model.save_pretrained(folder)
    row = {"id": "a", "prompt": "question", "responses": [response("good"), response("bad")]}
    rows, printed = run(tmp_path, capsys, [row], *RM, "--model", str(folder))
    fine, broken = rows[0]["responses"]
    assert math.isfinite(fine["reward"])
    assert (broken["reward"], broken["reward_error"], broken["scores"]) == (None, "not finite", {"rm": None})
    assert printed["without"] == {"not finite": 1} and printed["mean"] == {"on": fine["reward"]}
    row["responses"] = row["responses"][1:]
    err = refused(tmp_path, capsys, [row], *RM, "--model", str(folder), out="other.jsonl")
    assert f"{folder}: no score in the first 1 rows is a finite number; check its weights" in err
    assert not (tmp_path / "other.jsonl").exists() and not (tmp_path / "other.meta.json").exists()


def test_special_tokens_in_texts_are_counted(tmp_path, capsys, llama_rm):
    data = [prompt_row(0, "a<|im_end|>", "b"), {**prompt_row(1, "c"), "prompt": "say <|im_start|>"}]
    _, printed = run(tmp_path, capsys, data, *RM, "--model", llama_rm)
    assert printed["responses_with_special_tokens"] == 1 and printed["prompts_with_special_tokens"] == 1


REASONED = [
    response("<think>why not</think>\n\nshort", "on"),
    response("why not\n</think>\nshort", "on"),  # the prompt opened it
    response("<seed:think>why</seed:think>short", "on", final="short"),  # as generate.py cut it
    response("short", "off"),
]


@pytest.mark.parametrize("kind", ["llama_rm", "bert_rm"])
def test_rewards_are_of_answers_without_reasoning(tmp_path, capsys, kind, request):
    model = request.getfixturevalue(kind)
    empty = [response("<think>why"), response("why</think> \n"), response("<x>why", final="")]
    rows = [prompt_row(0, *REASONED, *empty, response("<think>why</think>long"))]
    rows, printed = run(tmp_path, capsys, rows, *RM, "--model", model)
    values = rewards(rows)
    assert values[0] == pytest.approx(values[3], abs=1e-5) and values[:4] == pytest.approx([values[0]] * 4)
    assert values[4:7] == [None] * 3 and (kind == "bert_rm" or abs(values[7] - values[0]) > 0.01)
    assert [one["reward_error"] for one in rows[0]["responses"][4:7]] == ["empty after its reasoning"] * 3
    assert printed["without"] == {"empty after its reasoning": 3}
    assert [one["text"] for one in rows[0]["responses"][:3]] == [one["text"] for one in REASONED[:3]]


def test_a_chat_that_the_template_rejects_has_no_reward(tmp_path, capsys, llama_rm):
    shutil.copytree(llama_rm, tmp_path / "rm")
    template = "{% for m in messages %}{% if m.content == 'mute' %}{{ raise_exception('no ' + m.role) }}"
    template += "{% endif %}{% endfor %}"
    path = tmp_path / "rm" / "chat_template.jinja"
    path.write_text(template + path.read_text())
    rows, printed = run(tmp_path, capsys, [prompt_row(0, "a", "mute")], *RM, "--model", str(tmp_path / "rm"))
    reason = "the chat template rejects it: no assistant"
    assert rewards(rows)[0] is not None and rewards(rows)[1] is None
    assert rows[0]["responses"][1]["reward_error"] == reason and printed["without"] == {reason: 1}


def test_files_of_two_dates_are_named(tmp_path, capsys):
    paths = [write_rows(tmp_path / f"{k}.jsonl", [prompt_row(k, "4", answer="4")]) for k in range(4)]
    for k, day in enumerate(("2026-01-05", None, "2026-01-06")):
        (tmp_path / f"{k}.meta.json").write_text(json.dumps({"args": {"date": day}}))
    for files, named in ((paths[:2], False), (paths[1:], False), (paths, True)):
        args = verify.parse_args(["--responses", *files, "--out", str(tmp_path / "out.jsonl"), "--overwrite"])
        score.main(args, verify.Verify)
        said = capsys.readouterr().err
        dates = {paths[0]: "2026-01-05", paths[1]: None, paths[2]: "2026-01-06"}
        sentence = f"the chat templates of these files saw different dates: {dates}\n"
        assert (sentence in said) == named and ("dates" in said) == named


# ----- logp


def slow_logp(model, prompt, completion):
    """Sum of float64 log_softmax of the full logits."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].double()
    return (
        logits.log_softmax(-1)[
            torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1), torch.tensor(completion)
        ]
        .sum()
        .item()
    )


@pytest.fixture(scope="module")
def reader(policy):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)

    def slow(row, completion):
        text = (
            "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in row["prompt"])
            + "<|im_start|>assistant\n"
        )
        return slow_logp(model, tokenizer(text, add_special_tokens=False)["input_ids"], completion)

    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    return tokenizer, slow


@pytest.mark.parametrize("chunk", [512, 7])
def test_logp_is_the_float64_sum_over_full_logits(tmp_path, capsys, policy, reader, monkeypatch, chunk):
    monkeypatch.setattr(logp, "CHUNK", chunk)  # 7: chunks begin and end inside a response
    tokenizer, slow = reader
    eot = tokenizer.eos_token_id
    data = [
        prompt_row(0, "hello", response("cut he", finish="length"), response("imported", "off", finish=None)),
        prompt_row(1, "a longer response, é", "", "b" * 40),
        {
            "id": "two turns",
            "prompt": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "yes?"},
                {"role": "user", "content": "go"},
            ],
            "responses": [response("gone")],
        },
    ]
    rows, printed = run_logp(tmp_path, capsys, data, *LOGP, "--model", policy)
    for row in rows:
        for one in row["responses"]:
            ids = tokenizer(one["text"], add_special_tokens=False)["input_ids"] + [eot] * (
                one["finish"] != "length"
            )
            assert one["logp_tokens"] == len(ids)
            assert one["logp"] == pytest.approx(slow(row, ids), rel=1e-5, abs=1e-4)
            assert "reward" not in one and "scores" not in one
    assert printed["responses"] == 7 and printed["without"] == {}


def test_logp_keeps_sampled_ids_of_the_same_tokenizer(tmp_path, capsys, policy, reader):
    tokenizer, slow = reader
    vocabulary, eot = fingerprint(tokenizer), tokenizer.eos_token_id
    sampled = [5, 258, 9, 200]  # whatever was sampled: the text does not give these ids back
    row = prompt_row(
        0,
        response("ab", token_ids=sampled, tokenizer=vocabulary),
        response("ab", token_ids=sampled, tokenizer="another"),
        response("ab", token_ids=sampled, tokenizer=vocabulary, finish="length"),
    )
    (scored,), _ = run_logp(tmp_path, capsys, [row], *LOGP, "--model", policy)
    own = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert own != sampled
    expected = [slow(row, sampled + [eot]), slow(row, own + [eot]), slow(row, sampled)]
    assert [one["logp"] for one in scored["responses"]] == pytest.approx(expected, rel=1e-5)
    assert [one["logp_tokens"] for one in scored["responses"]] == [5, 3, 4]
    assert len({round(value, 3) for value in expected}) == 3


def test_logp_counts_special_tokens_in_texts_and_reads_them_as_tokens(tmp_path, capsys, policy, reader):
    tokenizer, slow = reader
    ids = tokenizer("a<|im_end|>b", add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id in ids
    sampled = response("a<|im_end|>b", token_ids=ids, tokenizer=fingerprint(tokenizer))
    row = prompt_row(0, response("a<|im_end|>b"), sampled, "b")
    (scored,), printed = run_logp(tmp_path, capsys, [row], *LOGP, "--model", policy)
    assert printed["responses_with_special_tokens"] == 1  # the sampled one is as it was
    expected = slow(row, [*ids, tokenizer.eos_token_id])
    assert [one["logp"] for one in scored["responses"][:2]] == pytest.approx([expected] * 2, rel=1e-5)


def test_logp_of_roles_that_the_template_rejects(tmp_path, capsys, policy):
    shutil.copytree(policy, tmp_path / "model")
    path = tmp_path / "model" / "chat_template.jinja"
    rejects = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    path.write_text(rejects + path.read_text())
    tool = {**prompt_row(1, "x", "y"), "prompt": [{"role": "tool", "content": "1"}, *prompt_row(1)["prompt"]]}
    flags = [*LOGP, "--model", str(tmp_path / "model")]
    rows, printed = run_logp(tmp_path, capsys, [prompt_row(0, "a"), tool], *flags)
    assert [one["logp"] is None for row in rows for one in row["responses"]] == [False, True, True]
    assert printed["responses_rejected_by_the_template"] == 2
    err = refused_logp(tmp_path, capsys, [tool], *flags, out="none.jsonl")
    assert "the row p1: the chat template rejects it: no tools" in err
    assert 'no response has a score: {"no value": 2}' in err


def test_logp_of_nothing_and_of_too_much(tmp_path, capsys, policy):
    row = prompt_row(0, "fine", response("", finish="length"), "a" * 600)
    (scored,), printed = run_logp(tmp_path, capsys, [row], *LOGP, "--model", policy)
    assert [one["logp"] is None for one in scored["responses"]] == [False, True, True]
    assert printed["responses"] == 3 and sum(printed["without"].values()) == 2


def test_logp_leaves_rewards_alone(tmp_path, capsys, policy):
    row = prompt_row(
        0,
        response("a", reward=1.5, reward_error=None, scores={"rm": 1.5}),
        response("b", reward=None, reward_error="why"),
    )
    (scored,), _ = run_logp(tmp_path, capsys, [row], *LOGP, "--model", policy)
    assert [(one["reward"], one["reward_error"]) for one in scored["responses"]] == [
        (1.5, None),
        (None, "why"),
    ]
    assert scored["responses"][0]["scores"] == {"rm": 1.5}


# ----- verify

ANSWERS = [  # reference, response, equal
    ("She has 2 * 9 = <<2*9=18>>18 eggs.\n#### 18", "So 9 + 9 = 18.\n#### 18", 1),
    ("#### 18", "The answer is 18.", 1),
    ("18", "first 17, then 18", 1),
    ("18", "first 18, then 17", 0),
    ("18", "#### 17 and not 18", 0),
    ("#### 5", "I get #### 4\n#### 5", 1),
    ("\\frac{1}{2}", "so \\boxed{\\frac{1}{2}}", 1),
    ("\\frac{1}{2}", "so \\boxed{\\frac{1}{3}}", 0),
    ("\\frac{1}{2}", "so \\boxed{2}", 0),
    ("so \\boxed{\\frac{1}{2}} QED 3", "\\boxed{\\frac{1}{2}}", 1),
    ("2^{n+{1}}", "\\boxed{0} no: \\boxed{2^{n + {1}}}.", 1),
    ("1,000", "it costs 1000.0", 1),
    ("1000", "it costs 1,000 dollars", 1),
    ("1/2", "x = 0.5", 1),
    ("0.5", "x = 1/2", 1),
    ("1/3", "x = 0.3333", 0),
    ("-3", "we get -3", 1),
    ("-3", "we get 3", 0),
    ("3", "we get -3", 0),
    ("5", "it is $5", 1),
    ("$5", "it is 5", 1),
    ("5", "it is $5.", 1),
    ("7", "The answer is 7.", 1),
    ("#### 7", "#### 7.", 1),
    ("7", "no number here", 0),
    ("7", "", 0),
    ("1", "\\boxed{1/0}", 0),
    ("Paris", "\\boxed{paris}", 1),
    ("70000", "#### 70,000", 1),
    ("12.50", "$12.5", 1),
    ("0", "0", 1),
    ("0.1", "1/10", 1),
    (18, "18", 1),
]


def test_verify_reads_what_follows_the_reasoning(tmp_path, capsys):
    """What was thought of but not given is no answer."""
    texts = [
        "<think>\n7\n</think>\n\n4",
        "<think>\n4\n</think>\n\n7",
        "4</think>",
        "<think> 4",
        "\\boxed{7}</think> 4",
    ]
    data = [
        prompt_row(0, *texts, response("7 4") | {"final": "7"}, response("4 7") | {"final": "4"}, answer="4")
    ]
    rows, _ = run_verify(tmp_path, capsys, data)
    assert rewards(rows) == [1, 0, 0, 0, 1, 0, 1]


def test_verify_table(tmp_path, capsys):
    data = [prompt_row(k, text, answer=answer) for k, (answer, text, _) in enumerate(ANSWERS)]
    rows, _ = run_verify(tmp_path, capsys, data)
    for (answer, text, equal), value in zip(ANSWERS, rewards(rows)):
        assert value == float(equal), f"{text!r} against {answer!r}"
    assert all(type(value) is float for value in rewards(rows))


def test_a_prompt_without_answer_has_no_reward(tmp_path, capsys):
    rows, printed = run_verify(tmp_path, capsys, [prompt_row(0, "4", answer="4"), prompt_row(1, "4")])
    assert (
        rewards(rows) == [1.0, None] and rows[1]["responses"][0]["reward_error"] == "the prompt has no answer"
    )
    assert printed["without"] == {"the prompt has no answer": 1}
    assert "no response has a score" in refused_verify(
        tmp_path, capsys, [prompt_row(0, "4")], out="none.jsonl"
    )


# ----- batching, merging, keys


def batches(lengths, budget):
    sequences = [[7] * length for length in lengths]
    counts = Counter()
    found = list(score.token_batches(sequences, Namespace(batch_tokens=budget), counts))
    assert counts["tokens_scored"] == sum(lengths)
    assert counts["tokens_padded"] == sum(ids.numel() for _, ids, _ in found)
    for batch, ids, mask in found:
        assert mask.sum(1).tolist() == [lengths[index] for index in batch]
        assert torch.equal(ids, 7 * mask) and ids.shape[1] == max(lengths[index] for index in batch)
    return [batch for batch, _, _ in found]


def test_token_batches():
    generator = torch.Generator().manual_seed(0)
    lengths = [*torch.randint(1, 300, (500,), generator=generator).tolist(), 5000]
    found = batches(lengths, 2048)
    assert sorted(index for batch in found for index in batch) == list(range(501))
    for batch in found:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= 2048  # a row alone may be longer than the budget
        assert longest <= 1.08 * min(lengths[index] for index in batch)
    assert batches([10] * 7, 30) == [[0, 1, 2], [3, 4, 5], [6]]
    assert batches([100, 109, 108], 10_000) == [[0, 2], [1]]


def test_files_are_merged_by_id(tmp_path, capsys):
    first = [
        prompt_row(k, f"a{k}", f"{k}", answer=str(k), category="x", wins=[[None, 0.75], [0.25, None]])
        for k in (0, 1)
    ]
    second = [
        prompt_row(k, response(f"b {k}", "off"), answer="ignored", more=k, cosine=[[1]]) for k in (2, 1)
    ]
    paths = [write_rows(tmp_path / "1.jsonl", first), write_rows(tmp_path / "2.jsonl", second)]
    rows, printed = run_verify(tmp_path, capsys, paths)
    assert (
        [row["id"] for row in rows] == ["p0", "p1", "p2"]
        and printed["rows"] == 3
        and printed["responses"] == 6
    )
    both = rows[1]
    assert [one["text"] for one in both["responses"]] == ["a1", "1", "b 1"]
    # the first file's word holds, the second's adds
    assert (both["answer"], both["category"], both["more"]) == ("1", "x", 1)
    assert "wins" not in both  # another scorer's
    assert both["cosine"] == [[None, None, None], [None, None, None], [None, None, 1]]
    assert rewards([both]) == [1.0, 1.0, 1.0]


def test_one_id_for_two_prompts_and_two_rows(tmp_path, capsys):
    other = {**prompt_row(0, "b", answer="1"), "prompt": "another question"}
    paths = [
        write_rows(tmp_path / "1.jsonl", [prompt_row(0, "a", answer="1")]),
        write_rows(tmp_path / "2.jsonl", [other]),
    ]
    err = refused_verify(tmp_path, capsys, paths)
    assert f"{paths[1]}:1: the id p0 has another prompt in an earlier file" in err
    twice = [prompt_row(0, "a", answer="1"), prompt_row(1, "a", answer="1"), prompt_row(0, "b", answer="1")]
    assert "in.jsonl:3: duplicate id p0 in this file" in refused_verify(tmp_path, capsys, twice)
    assert not (tmp_path / "scored.jsonl").exists()


def test_unknown_keys_and_order_pass_through(tmp_path, capsys):
    data = [prompt_row(k, response(f"{k}", extra={"deep": [k]}), answer=str(k), note="né") for k in (3, 1, 2)]
    rows, _ = run_verify(tmp_path, capsys, data)
    assert [row["id"] for row in rows] == ["p3", "p1", "p2"] and rows[0]["note"] == "né"
    assert rows[0]["responses"][0]["extra"] == {"deep": [3]} and rows[0]["prompt"] == data[0]["prompt"]


# ----- resume, shards


def many(count):
    return [prompt_row(k, "a" * (k % 5 + 1), f"text {k}", "é" * (k % 3)) for k in range(count)]


@pytest.mark.parametrize("script, scorer", [(score, "RewardModel"), (logp, "LogProbability")])
def test_a_torn_file_is_completed_byte_for_byte(
    tmp_path, capsys, llama_rm, policy, monkeypatch, script, scorer
):
    monkeypatch.setattr(getattr(script, scorer), "window", 4)
    flags = [*RM, "--model", llama_rm if script is score else policy]
    run(tmp_path, capsys, many(11), *flags, script=script)
    whole = (tmp_path / "scored.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length, kept in (
        (ends[5] + 17, 4),
        (ends[7], 8),
        (ends[0] - 1, 0),
        (0, 0),
        (len(whole) - 1, 8),
    ):
        (tmp_path / "scored.jsonl").write_bytes(whole[:length])
        _, printed = run(tmp_path, capsys, many(11), *flags, script=script)
        assert (tmp_path / "scored.jsonl").read_bytes() == whole and printed["resumed_rows"] == kept


def test_shards_limits_and_batches_change_nothing(tmp_path, capsys, llama_rm, monkeypatch):
    monkeypatch.setattr(score.RewardModel, "window", 4)
    flags = [*RM, "--model", llama_rm]
    whole, _ = run(tmp_path, capsys, many(11), *flags)
    parts = [
        run(tmp_path, capsys, many(11), *flags, "--shard", f"{i}/2", out=f"{i}.jsonl")[0] for i in range(2)
    ]
    assert len(parts[0]) == 7 and sorted(parts[0] + parts[1], key=lambda row: int(row["id"][1:])) == whole
    limited, _ = run(tmp_path, capsys, many(11), *flags, "--limit", "5", out="limited.jsonl")
    assert [row["id"] for row in limited] == [row["id"] for row in whole[:5]]
    assert rewards(limited) == pytest.approx(rewards(whole[:5]), abs=1e-5)
    reversed_rows, _ = run(
        tmp_path, capsys, many(11)[::-1], *flags, out="reversed.jsonl", name="reversed_in.jsonl"
    )
    assert rewards(reversed_rows[::-1]) == pytest.approx(rewards(whole), abs=1e-5)
    assert "expected I/N with 0 <= I < N" in refused(
        tmp_path, capsys, many(11), *flags, "--shard", "2/2", out="bad.jsonl"
    )


def test_another_run_is_refused(tmp_path, capsys, llama_rm):
    data = [prompt_row(0, "4", "5", answer="4")]
    run_verify(tmp_path, capsys, data)
    (tmp_path / "in.jsonl").touch()
    before = (tmp_path / "scored.jsonl").read_bytes()
    err = refused_verify(tmp_path, capsys, data, "--name", "other")
    assert "was written with name = None, not 'other'; use another --out, or --overwrite to start over" in err
    err = refused_verify(tmp_path, capsys, [prompt_row(0, "4", "6", answer="4")])
    assert f"was written with {tmp_path / 'in.jsonl'} = '" in err
    assert (tmp_path / "scored.jsonl").read_bytes() == before
    rows, _ = run_verify(tmp_path, capsys, data, "--name", "other", "--overwrite")
    assert rows[0]["responses"][0]["scores"] == {"other": 1.0}


def test_the_record(tmp_path, capsys, llama_rm):
    run(tmp_path, capsys, [prompt_row(0, "4", "5", answer="4")], *RM, "--model", llama_rm)
    record = json.loads((tmp_path / "scored.meta.json").read_text())
    data = (tmp_path / "in.jsonl").read_bytes()
    assert record["inputs"] == {str(tmp_path / "in.jsonl"): hashlib.sha256(data).hexdigest()}
    assert record["args"]["scorer"] == "rm" and record["counts"]["responses"] == 2
    # two responses of one letter; every letter is a token, and so are the four marks
    assert record["counts"]["tokens_scored"] == 2 * len("(user.question 0).(assistant.4).")
    assert record["args"]["dtype"] == "float32"
    assert record["versions"]["torch"] == torch.__version__
    stat = os.stat(f"{llama_rm}/model.safetensors")
    assert record["models"][llama_rm]["model.safetensors"] == [stat.st_size, stat.st_mtime_ns]


def test_a_flag_that_would_do_nothing_is_refused(capsys):
    common = ["--responses", "x", "--out", "y"]
    for script, flags, sentence in (
        (verify, ["--model", "m"], "unrecognized arguments: --model m"),
        (verify, ["--dtype", "float32"], "unrecognized arguments: --dtype float32"),
        (logp, [], "required: --model"),
        (logp, ["--model", "m", "--tensor-parallel", "2"], "unrecognized arguments: --tensor-parallel 2"),
        (score, [], "required: --model"),
        (score, ["--model", "m", "--scorer", "rm"], "unrecognized arguments: --scorer rm"),
        (
            score,
            ["--model", "m", "--limit", "0"],
            "--limit: expected a whole number of at least 1, found '0'",
        ),
        (score, ["--model", "m", "--batch-tokens", "-1"], "--batch-tokens: expected a whole number"),
    ):
        with pytest.raises(SystemExit) as exit_status:
            script.parse_args([*common, *flags])
        assert exit_status.value.code == 2 and sentence in capsys.readouterr().err, flags
    assert score.parse_args([*common, "--model", "m"]).batch_tokens == 8192


# ----- several scorers
def test_the_last_scorer_sets_the_reward(tmp_path, capsys, llama_rm):
    first, printed = run_verify(tmp_path, capsys, [prompt_row(0, "4", "5", answer="4")])
    assert rewards(first) == [1.0, 0.0] and printed["mean"] == {"on": 0.5}
    paths = [str(tmp_path / "scored.jsonl")]
    second, printed = run(tmp_path, capsys, paths, *RM, "--model", llama_rm, "--name", "tiny", out="2.jsonl")
    values = rewards(second)
    assert values[0] != values[1]
    for one, value, right in zip(second[0]["responses"], values, (1.0, 0.0)):
        assert one["scores"] == {"verify": right, "tiny": value}
    assert second[0]["labeler"] == f"tiny:{llama_rm}"
    third, _ = run_verify(tmp_path, capsys, [str(tmp_path / "2.jsonl")], out="3.jsonl")
    assert rewards(third) == [1.0, 0.0] and third[0]["labeler"] == "verify"
    assert [sorted(one["scores"]) for one in third[0]["responses"]] == [["tiny", "verify"]] * 2


def test_wins_and_cosine_of_others(tmp_path, capsys, policy):
    wins, cosine = [[None, 0.75], [0.25, None]], [[1, 0.5], [0.5, 1]]
    data = [prompt_row(0, "1", response("2", token_ids=[1, 2]), answer="1", wins=wins, cosine=cosine)]
    rows, _ = run_logp(tmp_path, capsys, data, *LOGP, "--model", policy)
    assert rows[0]["wins"] == wins and rows[0]["cosine"] == cosine  # logp makes no reward
    assert rows[0]["responses"][1]["token_ids"] == [1, 2]
    rows, _ = run_verify(tmp_path, capsys, data, out="verify.jsonl")
    assert "wins" not in rows[0] and rows[0]["cosine"] == cosine
    second = [prompt_row(0, response("3", "off"), wins=[[None]])]
    paths = [write_rows(tmp_path / "1.jsonl", data), write_rows(tmp_path / "2.jsonl", second)]
    rows, _ = run_logp(tmp_path, capsys, paths, *LOGP, "--model", policy, out="merged.jsonl")
    assert rows[0]["wins"] == [[None, 0.75, None], [0.25, None, None], [None, None, None]]
    assert rows[0]["cosine"] == [[1, 0.5, None], [0.5, 1, None], [None, None, None]]


def test_logp_by_name_stands_beside_another(tmp_path, capsys, policy):
    other = make_policy(tmp_path / "other", seed=5)
    first, _ = run_logp(tmp_path, capsys, ROWS, *LOGP, "--model", policy, out="1.jsonl")
    paths = [str(tmp_path / "1.jsonl")]
    second, _ = run_logp(tmp_path, capsys, paths, *LOGP, "--model", other, "--name", "B", out="2.jsonl")
    alone, _ = run_logp(tmp_path, capsys, ROWS, *LOGP, "--model", other, out="3.jsonl")
    for row, of_first, of_alone in zip(second, first, alone):
        for both, a, b in zip(row["responses"], of_first["responses"], of_alone["responses"]):
            assert both == a | {"logp_B": b["logp"], "logp_B_tokens": b["logp_tokens"]}
            assert both["logp"] != both["logp_B"]


def test_rewards_of_two_labelers(tmp_path, capsys, policy):
    def of(labeler, source):
        return [prompt_row(0, response("1", source, reward=1.0), answer="1", labeler=labeler)]

    paths = [
        write_rows(tmp_path / "1.jsonl", of("a", "on")),
        write_rows(tmp_path / "2.jsonl", of("b", "off")),
    ]
    for script, flags in ((logp, ["--model", policy]), (verify, [])):
        err = refused(tmp_path, capsys, paths, *flags, script=script)
        assert "rewards of different labelers: a and b" in err
        assert not (tmp_path / "scored.jsonl").exists()
    rows, _ = run_verify(tmp_path, capsys, paths[:1])
    assert rows[0]["labeler"] == "verify" and rewards(rows) == [1.0]


# ----- models that do not fit, and rows that do not fit the model
def without_tensor(folder, target, name):
    """A copy of a model's folder without one of its tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    weights = load_file(f"{target}/model.safetensors")
    del weights[name]
    save_file(weights, f"{target}/model.safetensors", metadata={"format": "pt"})
    return str(target)


@pytest.mark.parametrize("script", [score, logp])
def test_weights_that_lack_a_tensor(tmp_path, capsys, llama_rm, policy, script):
    name = "model.layers.1.mlp.up_proj.weight"
    broken = without_tensor(llama_rm if script is score else policy, tmp_path / "broken", name)
    err = refused(tmp_path, capsys, ROWS, *RM, "--model", broken, script=script)
    assert f"{broken}: missing weights: {name}" in err
    assert not (tmp_path / "scored.jsonl").exists() and not (tmp_path / "scored.meta.json").exists()


def with_number(folder, target, number):
    """A copy of a model's folder with NaN or infinity in the weights of its last norm."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    weights = load_file(f"{target}/model.safetensors")
    weights["model.norm.weight"][3] = number
    save_file(weights, f"{target}/model.safetensors", metadata={"format": "pt"})
    return str(target)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("script", [score, logp])
def test_weights_that_are_not_numbers(tmp_path, capsys, llama_rm, policy, script, number):
    model = llama_rm if script is score else policy
    broken = with_number(model, tmp_path / "broken", number)
    err = refused(tmp_path, capsys, ROWS, *RM, "--model", broken, script=script)
    assert f"{broken}: no score in the first 3 rows is a finite number; check its weights" in err
    assert not (tmp_path / "scored.jsonl").exists() and not (tmp_path / "scored.meta.json").exists()
    run(tmp_path, capsys, ROWS, *RM, "--model", model, script=script)
    before = (tmp_path / "scored.jsonl").read_bytes(), (tmp_path / "scored.meta.json").read_bytes()
    refused(tmp_path, capsys, ROWS, *RM, "--model", broken, "--overwrite", script=script)
    assert ((tmp_path / "scored.jsonl").read_bytes(), (tmp_path / "scored.meta.json").read_bytes()) == before


def test_torn_weights(tmp_path, capsys, llama_rm):
    shutil.copytree(llama_rm, tmp_path / "torn")
    path = tmp_path / "torn" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    err = refused(tmp_path, capsys, ROWS, *RM, "--model", str(tmp_path / "torn"))
    assert f": {tmp_path / 'torn'}: " in err and len(err.splitlines()) == 1
    assert not (tmp_path / "scored.jsonl").exists() and not (tmp_path / "scored.meta.json").exists()


def test_broken_weights_lose_no_earlier_file(tmp_path, capsys, llama_rm):
    run(tmp_path, capsys, ROWS, *RM, "--model", llama_rm)
    before = (tmp_path / "scored.jsonl").read_bytes(), (tmp_path / "scored.meta.json").read_bytes()
    broken = without_tensor(llama_rm, tmp_path / "broken", "model.norm.weight")
    refused(tmp_path, capsys, ROWS, *RM, "--model", broken, "--overwrite")
    assert ((tmp_path / "scored.jsonl").read_bytes(), (tmp_path / "scored.meta.json").read_bytes()) == before


def test_token_ids_beyond_the_vocabulary(tmp_path, capsys, policy, reader):
    vocabulary = fingerprint(reader[0])
    rows = [prompt_row(0, "a"), prompt_row(1, response("b", token_ids=[5, 259], tokenizer=vocabulary))]
    err = refused_logp(tmp_path, capsys, rows, *LOGP, "--model", policy)
    assert f"the row p1 has the token id 259, but the vocabulary of {policy} has 259" in err
    assert not (tmp_path / "scored.jsonl").exists()
    rows[1]["responses"][0]["token_ids"] = [5, 258]
    (_, last), _ = run_logp(tmp_path, capsys, rows, *LOGP, "--model", policy)
    assert last["responses"][0]["logp_tokens"] == 3
    rows[1]["responses"][0] |= {"token_ids": [5, 259], "tokenizer": "another"}  # not used
    (_, last), _ = run_logp(tmp_path, capsys, rows, *LOGP, "--model", policy, out="other.jsonl")
    assert last["responses"][0]["logp_tokens"] == 2


# ----- --out
def test_out_is_an_input(tmp_path, capsys):
    path = write_rows(tmp_path / "in.jsonl", [prompt_row(0, "4", answer="4")])
    before = (tmp_path / "in.jsonl").read_bytes()
    os.symlink(path, tmp_path / "link.jsonl")
    os.symlink(tmp_path, tmp_path / "folder")
    for out in ("in.jsonl", "link.jsonl", "folder/in.jsonl", "in.json"):  # in.json has the record of in.jsonl
        err = refused_verify(tmp_path, capsys, [path], "--overwrite", out=out)
        assert "this would overwrite an input file or its record" in err
    os.symlink(tmp_path / "other.jsonl", tmp_path / "elsewhere.jsonl")  # a link to no input
    assert run_verify(tmp_path, capsys, [path], out="elsewhere.jsonl")[1]["rows"] == 1
    assert (tmp_path / "in.jsonl").read_bytes() == before and (tmp_path / "other.jsonl").is_file()


def test_an_out_that_another_process_writes(tmp_path, capsys):
    data = [prompt_row(0, "4", answer="4")]
    with open(tmp_path / "scored.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        err = refused_verify(tmp_path, capsys, data)
        assert f"--out {tmp_path / 'scored.jsonl'}: another process is writing this file" in err
        err = refused_verify(tmp_path, capsys, data, "--overwrite")
        assert "another process is writing this file" in err
    rows, _ = run_verify(tmp_path, capsys, data)
    assert rewards(rows) == [1.0]


def test_a_running_process_holds_the_lock(tmp_path, capsys, monkeypatch):
    """Looked at while a window is scored: --out is locked, and its record is there before the first row."""
    data = [prompt_row(k, "4", answer="4") for k in range(3)]
    looks, honest = [], verify.Verify.score

    def look(scorer, rows, update):
        with open(tmp_path / "scored.jsonl", "rb") as file:
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            looks.append(len(file.read().splitlines()))
        if looks[-1]:
            record = json.loads((tmp_path / "scored.meta.json").read_text())
            assert record["args"]["scorer"] == "verify" and "counts" not in record
        honest(scorer, rows, update)

    monkeypatch.setattr(verify.Verify, "window", 1)
    monkeypatch.setattr(verify.Verify, "score", look)
    run_verify(tmp_path, capsys, data)
    assert looks == [0, 1, 2]
    assert json.loads((tmp_path / "scored.meta.json").read_text())["counts"]["rows"] == 3


def test_a_finished_run_does_nothing(tmp_path, capsys, monkeypatch):
    data = [prompt_row(k, "4", answer="4") for k in range(3)]
    _, first = run_verify(tmp_path, capsys, data)
    before = (tmp_path / "scored.jsonl").read_bytes(), (tmp_path / "scored.meta.json").read_bytes()
    monkeypatch.delattr(verify.Verify, "score")
    args = verify.parse_args(
        ["--responses", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "scored.jsonl")]
    )
    score.main(args, verify.Verify)
    out, err = capsys.readouterr()
    assert f"--out {tmp_path / 'scored.jsonl'} is complete; nothing was done" in err
    assert json.loads(out) | {"seconds": 0} == first | {"seconds": 0} and first["rows"] == 3
    assert ((tmp_path / "scored.jsonl").read_bytes(), (tmp_path / "scored.meta.json").read_bytes()) == before


def test_a_finished_run_without_a_score_is_refused_again(tmp_path, capsys):
    for _ in range(2):
        err = refused_verify(tmp_path, capsys, [prompt_row(0, "4")])
        assert 'no response has a score: {"the prompt has no answer": 1}' in err


def test_rows_of_another_run_in_out(tmp_path, capsys):
    data = [prompt_row(k, "4", answer="4") for k in range(3)]
    run_verify(tmp_path, capsys, data)
    path = tmp_path / "scored.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for number, foreign, sentence in (
        (1, '{"id": "x"}\n', "not the row that this run of 3 rows writes there"),
        (2, lines[0], "not the row that this run of 3 rows writes there"),
        (1, '{"a": 1}\n', "scored.jsonl:2: "),
        (3, lines[0], "not the row that this run of 3 rows writes there"),
    ):
        path.write_text("".join([*lines[:number], foreign, *lines[number + 1 :]]))
        before = path.read_bytes()
        err = refused_verify(tmp_path, capsys, data)
        assert sentence in err and str(path) in err and path.read_bytes() == before


def test_another_scorer_with_the_same_flags(tmp_path, capsys, policy):
    """Rows of score.py and those of logp.py have other keys: neither resumes the other."""
    relabelled = tmp_path / "rm"
    tiny(relabelled, "LlamaForSequenceClassification")
    run(tmp_path, capsys, ROWS, *RM, "--model", str(relabelled))
    err = refused_logp(tmp_path, capsys, ROWS, *RM, "--model", str(relabelled))
    assert "was written with scorer = 'rm', not 'logp'" in err


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import score, verify
verify.Verify.window = 8
args = verify.parse_args(sys.argv[3:])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
score.main(args, verify.Verify)
"""


def test_a_full_disk(tmp_path, capsys):
    """A file cannot grow beyond a limit: a sentence, and the same command goes on when it can."""
    data = write_rows(tmp_path / "in.jsonl", [prompt_row(k, "4" * 300, answer="4") for k in range(40)])
    run_verify(tmp_path, capsys, [data], out="whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for limit in (len(whole) // 3, len(whole) - 100):
        flags = ["--responses", data, "--out", str(tmp_path / "scored.jsonl")]
        command = [sys.executable, "-c", FULL, str(REPO / "scorers"), str(limit), *flags]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr[-2000:]
        assert "scored.jsonl cannot be written: " in done.stderr and "Traceback" not in done.stderr
        assert "run the same command again to resume" in done.stderr
        assert (tmp_path / "scored.jsonl").read_bytes() == whole[:limit]
    command[4] = str(2 * len(whole))
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert (tmp_path / "scored.jsonl").read_bytes() == whole
    assert json.loads(done.stdout.splitlines()[-1])["resumed_rows"] == 32


def test_a_model_that_was_trained_again_into_the_same_folder(tmp_path, capsys, llama_rm, monkeypatch):
    monkeypatch.setattr(score.RewardModel, "window", 2)
    shutil.copytree(llama_rm, tmp_path / "rm")
    flags = [*RM, "--model", str(tmp_path / "rm")]
    run(tmp_path, capsys, ROWS, *flags)
    whole = (tmp_path / "scored.jsonl").read_bytes()
    part = whole[: whole.index(b"\n") + 1]
    (tmp_path / "scored.jsonl").write_bytes(part)
    path = tmp_path / "rm" / "model.safetensors"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    err = refused(tmp_path, capsys, ROWS, *flags)
    assert f"was written with {tmp_path / 'rm'} = " in err and "--overwrite to start over" in err
    assert (tmp_path / "scored.jsonl").read_bytes() == part
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    run(tmp_path, capsys, ROWS, *flags)
    assert (tmp_path / "scored.jsonl").read_bytes() == whole


KILLED = """
import json, os, random, sys
import score
from transformers import AutoModelForSequenceClassification

score.RewardModel.window = 2
args = score.parse_args(sys.argv[1:])
model = score.load_model(AutoModelForSequenceClassification, args.model, None, "float32")
score.load_model = lambda *rest: model
make_record = score.make_record
NAMES = ("main", "score_rows", "open_output", "begin_output", "keep_rows", "append_rows", "write_record")

def append_rows(file, rows):  # in three pieces, so that a kill leaves a part of a line
    text = "".join(json.dumps(row, ensure_ascii=False, default=list) + "\\n" for row in rows).encode()
    for start in range(0, len(text), len(text) // 3 + 1):
        file.write(text[start : start + len(text) // 3 + 1])

score.append_rows = append_rows

def start(out, last, names=NAMES):
    # score.main in a process of its own; kill -9 at the last-th line of these functions
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    lines = 0
    def trace(frame, event, arg):
        nonlocal lines
        if frame.f_code.co_name not in names:
            return None
        lines += event == "line"
        if lines == last:
            os.kill(os.getpid(), 9)
        return trace
    def made(*rest):
        record = make_record(*rest)
        sys._getframe(1).f_trace = trace
        sys.settrace(trace)
        return record
    score.make_record = made
    args.out = out
    status = 2
    try:
        score.main(args)
        status = 0
    finally:
        sys.settrace(None)
        open("lines", "w").write(str(lines))
        os._exit(status)

random.seed(0)
results = [[start("whole.jsonl", None), False]]
total = int(open("lines").read())
for k in range(int(os.environ["KILLS"])):
    if results[-1][0] == 0 and os.path.exists("scored.jsonl"):  # the last run was not killed: anew
        os.remove("scored.jsonl")
    if k % 2:  # anywhere, or while rows are written
        status = start("scored.jsonl", random.randrange(1, total))
    else:
        status = start("scored.jsonl", random.randrange(1, 40), ("append_rows",))
    content = open("scored.jsonl", "rb").read() if os.path.exists("scored.jsonl") else b""
    results.append([status, bool(content) and not content.endswith(b"\\n")])
results.append([start("scored.jsonl", None), False])
print(json.dumps(results))
"""


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, llama_rm):
    """kill -9 at random lines, one run after the other: the same bytes at last, and no start is refused."""
    data = write_rows(tmp_path / "in.jsonl", many(12))
    (tmp_path / "kill.py").write_text(KILLED)
    env = {"KILLS": "12", **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    flags = [*RM, "--model", llama_rm, "--responses", data, "--out", "out"]
    command = [sys.executable, "kill.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    statuses = [status for status, _ in results]
    assert set(statuses) == {0, signal.SIGKILL} and statuses[0] == statuses[-1] == 0, done.stderr[-2000:]
    assert statuses.count(signal.SIGKILL) >= 6 and any(torn for _, torn in results), results
    assert (tmp_path / "scored.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# ----- the command line
def test_flags_are_read_before_torch_is_imported():
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('score.py', run_name='__main__')"
    for flags, status, sentence in (
        (["--help"], 0, "--responses FILE"),
        (["--limit", "0"], 2, "--limit: expected a whole number of at least 1, found '0'"),
    ):
        command = [sys.executable, "-c", code, *flags]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        assert done.returncode == status and sentence in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
