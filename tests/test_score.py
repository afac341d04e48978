"""
score.py: rewards, log-probabilities and verified answers, each against a slow way of computing the same.

Covers  rm on a Llama with a chat template (pad is the end of turn) and on a Bert that reads pairs of texts,
        both against one response at a time through the model's own forward. logp against float64 log_softmax
        of the full logits. verify by a table. Batches, merging by id, what has no score, agreement with the
        rewards before, resume, shards, records, locks, broken weights, token ids beyond the vocabulary.
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

import pytest
import torch
from conftest import REPO, make_policy, make_tokenizer, read_rows, write_rows

import score

KINDS = {"pairrm": "PairRM", "judge": "Judge", "category": "Category", "embed": "Embed"}


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
    score.main(args, getattr(script, KINDS.get(script.__name__, "SCORER"), None))
    return read_rows(tmp_path / out), json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(tmp_path, capsys, rows, *flags, **more):
    with pytest.raises(SystemExit) as exit_status:
        run(tmp_path, capsys, rows, *flags, **more)
    err = capsys.readouterr().err
    assert exit_status.value.code == 2 and "Traceback" not in err
    return err


def rewards(rows):
    return [one["reward"] for row in rows for one in row["responses"]]


@pytest.fixture(scope="module")
def llama_rm(tmp_path_factory):
    """A decoder reward model; its rewards are far apart and leave [0, 1]."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("llama_rm")
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        num_labels=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    LlamaForSequenceClassification(config).float().save_pretrained(folder)
    return str(folder)


def make_bert_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[UNK]",
    ] + "question good bad answer long a b c d 0 1 2 3 4 5 6 7 8 9 user assistant :".split()
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def bert_config(tokenizer, labels=1):
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=labels,
        initializer_range=0.5,
        pad_token_id=0,
    )


@pytest.fixture(scope="module")
def bert_rm(tmp_path_factory):
    from transformers import BertForSequenceClassification

    folder = tmp_path_factory.mktemp("bert_rm")
    tokenizer = make_bert_tokenizer(folder)
    torch.manual_seed(2)
    BertForSequenceClassification(bert_config(tokenizer)).float().save_pretrained(folder)
    return str(folder)


# texts of very different lengths; one has the end-of-turn token itself, which is the padding token too
ROWS = [
    prompt_row(0, "short", "a much longer answer that goes on and on " * 2, "x"),
    prompt_row(1, "", "ends early<|im_end|>", "yes"),
    prompt_row(2, "é 日本 😀", "short", "short"),
]
RM = ["--scorer", "rm", "--backend", "hf", "--dtype", "float32"]
LOGP = ["--scorer", "logp", "--dtype", "float32"]


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
    from transformers import BertModel

    make_policy(tmp_path / "policy")
    BertModel(bert_config(make_bert_tokenizer(tmp_path / "bert"))).save_pretrained(tmp_path / "bert")
    no_classifier = "expected a ...ForSequenceClassification with one label, found "
    for folder, architecture, sentence in (
        ("policy", [], no_classifier + "LlamaForCausalLM"),
        ("bert", [], no_classifier + "BertModel"),
        ("policy", ["LlamaForSequenceClassification"], "the weights lack score.weight"),
        ("bert", ["BertForSequenceClassification"], "the weights lack classifier.bias, classifier.weight"),
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
    from transformers import BertForSequenceClassification

    folder = tmp_path / "two"
    BertForSequenceClassification(bert_config(make_bert_tokenizer(folder), labels=2)).save_pretrained(folder)
    err = refused(tmp_path, capsys, ROWS, *RM, "--model", str(folder))
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
    assert 'no response has a score: {"not finite": 1}' in err


def test_special_tokens_in_texts_are_counted(tmp_path, capsys, llama_rm):
    data = [prompt_row(0, "a<|im_end|>", "b"), {**prompt_row(1, "c"), "prompt": "say <|im_start|>"}]
    _, printed = run(tmp_path, capsys, data, *RM, "--model", llama_rm)
    assert printed["responses_with_special_tokens"] == 1 and printed["prompts_with_special_tokens"] == 1


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
    monkeypatch.setattr(score, "CHUNK", chunk)  # 7: chunks begin and end inside a response
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
    rows, printed = run(tmp_path, capsys, data, *LOGP, "--model", policy)
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
    mark, eot = score.fingerprint(tokenizer), tokenizer.eos_token_id
    sampled = [5, 258, 9, 200]  # whatever was sampled: the text does not give these ids back
    row = prompt_row(
        0,
        response("ab", token_ids=sampled, tokenizer=mark),
        response("ab", token_ids=sampled, tokenizer="another"),
        response("ab", token_ids=sampled, tokenizer=mark, finish="length"),
    )
    (scored,), _ = run(tmp_path, capsys, [row], *LOGP, "--model", policy)
    own = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert own != sampled
    expected = [slow(row, sampled + [eot]), slow(row, own + [eot]), slow(row, sampled)]
    assert [one["logp"] for one in scored["responses"]] == pytest.approx(expected, rel=1e-5)
    assert [one["logp_tokens"] for one in scored["responses"]] == [5, 3, 4]
    assert len({round(value, 3) for value in expected}) == 3


def test_logp_of_nothing_and_of_too_much(tmp_path, capsys, policy):
    row = prompt_row(0, "fine", response("", finish="length"), "a" * 600)
    (scored,), printed = run(tmp_path, capsys, [row], *LOGP, "--model", policy)
    assert [one["logp"] is None for one in scored["responses"]] == [False, True, True]
    assert printed["responses"] == 3 and sum(printed["without"].values()) == 2


def test_logp_leaves_rewards_alone(tmp_path, capsys, policy):
    row = prompt_row(
        0,
        response("a", reward=1.5, reward_error=None, scores={"rm": 1.5}),
        response("b", reward=None, reward_error="why"),
    )
    (scored,), _ = run(tmp_path, capsys, [row], *LOGP, "--model", policy)
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


def test_verify_table(tmp_path, capsys):
    data = [prompt_row(k, text, answer=answer) for k, (answer, text, _) in enumerate(ANSWERS)]
    rows, _ = run(tmp_path, capsys, data, "--scorer", "verify")
    for (answer, text, equal), value in zip(ANSWERS, rewards(rows)):
        assert value == float(equal), f"{text!r} against {answer!r}"
    assert all(type(value) is float for value in rewards(rows))


def test_a_prompt_without_answer_has_no_reward(tmp_path, capsys):
    rows, printed = run(
        tmp_path, capsys, [prompt_row(0, "4", answer="4"), prompt_row(1, "4")], "--scorer", "verify"
    )
    assert (
        rewards(rows) == [1.0, None] and rows[1]["responses"][0]["reward_error"] == "the prompt has no answer"
    )
    assert printed["without"] == {"the prompt has no answer": 1}
    assert "no response has a score" in refused(
        tmp_path, capsys, [prompt_row(0, "4")], "--scorer", "verify", out="none.jsonl"
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
    rows, printed = run(tmp_path, capsys, paths, "--scorer", "verify")
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
    err = refused(tmp_path, capsys, paths, "--scorer", "verify")
    assert f"{paths[1]}:1: the id p0 has another prompt in an earlier file" in err
    twice = [prompt_row(0, "a", answer="1"), prompt_row(1, "a", answer="1"), prompt_row(0, "b", answer="1")]
    assert "in.jsonl:3: the id p0 is twice in this file" in refused(
        tmp_path, capsys, twice, "--scorer", "verify"
    )
    assert not (tmp_path / "scored.jsonl").exists()


def test_unknown_keys_and_order_pass_through(tmp_path, capsys):
    data = [prompt_row(k, response(f"{k}", extra={"deep": [k]}), answer=str(k), note="né") for k in (3, 1, 2)]
    rows, _ = run(tmp_path, capsys, data, "--scorer", "verify")
    assert [row["id"] for row in rows] == ["p3", "p1", "p2"] and rows[0]["note"] == "né"
    assert rows[0]["responses"][0]["extra"] == {"deep": [3]} and rows[0]["prompt"] == data[0]["prompt"]


# ----- resume, shards


def many(count):
    return [prompt_row(k, "a" * (k % 5 + 1), f"text {k}", "é" * (k % 3)) for k in range(count)]


@pytest.mark.parametrize("scorer", ["rm", "logp"])
def test_a_torn_file_is_completed_byte_for_byte(tmp_path, capsys, llama_rm, policy, monkeypatch, scorer):
    monkeypatch.setattr(score.SCORERS[scorer], "window", 4)
    flags = [*RM, "--model", llama_rm] if scorer == "rm" else [*LOGP, "--model", policy]
    run(tmp_path, capsys, many(11), *flags)
    whole = (tmp_path / "scored.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length, kept in (
        (ends[5] + 17, 4),
        (ends[7], 8),
        (ends[0] - 1, 0),
        (0, 0),
        (len(whole) - 1, 8),
        (len(whole), 11),
    ):
        (tmp_path / "scored.jsonl").write_bytes(whole[:length])
        _, printed = run(tmp_path, capsys, many(11), *flags)
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
    run(tmp_path, capsys, data, "--scorer", "verify")
    (tmp_path / "in.jsonl").touch()
    before = (tmp_path / "scored.jsonl").read_bytes()
    err = refused(tmp_path, capsys, data, "--scorer", "verify", "--name", "other")
    assert "was made with other args: name was None and is 'other'; --overwrite starts anew" in err
    err = refused(tmp_path, capsys, [prompt_row(0, "4", "6", answer="4")], "--scorer", "verify")
    assert "was made with other inputs" in err and "in.jsonl" in err
    assert (tmp_path / "scored.jsonl").read_bytes() == before
    rows, _ = run(tmp_path, capsys, data, "--scorer", "verify", "--name", "other", "--overwrite")
    assert rows[0]["responses"][0]["scores"] == {"other": 1.0}


def test_the_record(tmp_path, capsys, llama_rm):
    run(tmp_path, capsys, [prompt_row(0, "4", "5", answer="4")], *RM, "--model", llama_rm)
    record = json.loads((tmp_path / "scored.meta.json").read_text())
    data = (tmp_path / "in.jsonl").read_bytes()
    assert record["inputs"] == {str(tmp_path / "in.jsonl"): hashlib.sha256(data).hexdigest()}
    assert record["args"]["scorer"] == "rm" and record["counts"]["responses"] == 2
    # two responses of one letter; every letter is a token, and so are the four marks
    assert record["counts"]["tokens_scored"] == 2 * len("(user.question 0).(assistant.4).")
    assert record["args"]["backend"] == "hf" and record["args"]["dtype"] == "float32"
    assert record["versions"]["torch"] == torch.__version__
    stat = os.stat(f"{llama_rm}/model.safetensors")
    assert record["models"][llama_rm]["model.safetensors"] == [stat.st_size, stat.st_mtime_ns]


def test_a_flag_that_would_do_nothing_is_refused(capsys):
    common = ["--responses", "x", "--out", "y"]
    for flags in (
        ["--scorer", "verify", "--model", "m"],
        ["--scorer", "verify", "--backend", "hf"],
        ["--scorer", "logp"],
        ["--scorer", "logp", "--model", "m", "--tensor-parallel", "2"],
        ["--scorer", "verify", "--dtype", "float32"],
        ["--scorer", "verify", "--max-length", "9"],
        ["--scorer", "logp", "--model", "m", "--backend", "vllm"],
        ["--scorer", "rm"],
        ["--scorer", "rm", "--model", "m", "--limit", "0"],
    ):
        with pytest.raises(SystemExit) as exit_status:
            score.parse_args([*common, *flags])
        assert exit_status.value.code == 2, flags
    capsys.readouterr()
    assert isinstance(score.parse_args([*common, "--scorer", "rm", "--model", "m"]), Namespace)


# ----- several scorers
def test_the_last_scorer_sets_the_reward(tmp_path, capsys, llama_rm):
    first, printed = run(tmp_path, capsys, [prompt_row(0, "4", "5", answer="4")], "--scorer", "verify")
    assert rewards(first) == [1.0, 0.0] and "agreement" not in printed
    paths = [str(tmp_path / "scored.jsonl")]
    second, printed = run(tmp_path, capsys, paths, *RM, "--model", llama_rm, "--name", "tiny", out="2.jsonl")
    values = rewards(second)
    assert values[0] != values[1]
    for one, value, right in zip(second[0]["responses"], values, (1.0, 0.0)):
        assert one["scores"] == {"verify": right, "tiny": value}
    assert second[0]["labeler"] == f"tiny:{llama_rm}"
    alike = int(values[0] > values[1])
    assert printed["agreement"] == {
        "share": float(alike),
        "pairs": 1,
        "alike": alike,
        "prompts_that_differ": 1 - alike,
    }
    third, _ = run(tmp_path, capsys, [str(tmp_path / "2.jsonl")], "--scorer", "verify", out="3.jsonl")
    assert rewards(third) == [1.0, 0.0] and third[0]["labeler"] == "verify"
    assert [sorted(one["scores"]) for one in third[0]["responses"]] == [["tiny", "verify"]] * 2


def test_agreement_of_hand_made_rewards(tmp_path, capsys):
    # verify gives 1 for the right answer. The rewards before order the pairs of p0 alike, alike and, with the
    # tie of the new ones, not at all; of p1 one pair alike and one the other way round. p2 lacks a reward of
    # two, p3's new rewards are equal, p4's old ones. The texts of p5 had no reward at all
    def old(text, reward):
        return response(text, reward=reward, reward_error=None)

    data = [
        prompt_row(0, old("1", 2.0), old("2", 1.0), old("3", -1.0), answer="1"),
        prompt_row(1, old("1", 0.0), old("2", -1.0), old("3", 5.0), answer="1"),
        prompt_row(2, old("1", None), old("2", 1.0), answer="1"),
        prompt_row(3, old("1", 1.0), old("1.0", 2.0), answer="1"),
        prompt_row(4, old("1", 1.0), old("2", 1.0), answer="1"),
        prompt_row(5, "1", "2", answer="1"),
    ]
    rows, printed = run(tmp_path, capsys, data, "--scorer", "verify")
    assert printed["agreement"] == {"share": 0.75, "pairs": 4, "alike": 3, "prompts_that_differ": 1}
    assert rewards(rows[:2]) == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]


def test_wins_and_cosine_of_others(tmp_path, capsys, policy):
    wins, cosine = [[None, 0.75], [0.25, None]], [[1, 0.5], [0.5, 1]]
    data = [prompt_row(0, "1", response("2", token_ids=[1, 2]), answer="1", wins=wins, cosine=cosine)]
    rows, _ = run(tmp_path, capsys, data, *LOGP, "--model", policy)
    assert rows[0]["wins"] == wins and rows[0]["cosine"] == cosine  # logp makes no reward
    assert rows[0]["responses"][1]["token_ids"] == [1, 2]
    rows, _ = run(tmp_path, capsys, data, "--scorer", "verify", out="verify.jsonl")
    assert "wins" not in rows[0] and rows[0]["cosine"] == cosine
    assert all("wins" not in one and "cosine" not in one for one in rows[0]["responses"])
    second = [prompt_row(0, response("3", "off"), wins=[[None]])]
    paths = [write_rows(tmp_path / "1.jsonl", data), write_rows(tmp_path / "2.jsonl", second)]
    rows, _ = run(tmp_path, capsys, paths, *LOGP, "--model", policy, out="merged.jsonl")
    assert rows[0]["wins"] == [[None, 0.75, None], [0.25, None, None], [None, None, None]]
    assert rows[0]["cosine"] == [[1, 0.5, None], [0.5, 1, None], [None, None, None]]


def test_logp_by_name_stands_beside_another(tmp_path, capsys, policy):
    other = make_policy(tmp_path / "other", seed=5)
    first, _ = run(tmp_path, capsys, ROWS, *LOGP, "--model", policy, out="1.jsonl")
    paths = [str(tmp_path / "1.jsonl")]
    second, _ = run(tmp_path, capsys, paths, *LOGP, "--model", other, "--name", "B", out="2.jsonl")
    alone, _ = run(tmp_path, capsys, ROWS, *LOGP, "--model", other, out="3.jsonl")
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
    for flags in ([*LOGP, "--model", policy], ["--scorer", "verify"]):
        err = refused(tmp_path, capsys, paths, *flags)
        assert "the rewards are of different labelers, a and b" in err
        assert not (tmp_path / "scored.jsonl").exists()
    rows, _ = run(tmp_path, capsys, paths[:1], "--scorer", "verify")
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


@pytest.mark.parametrize("scorer", ["rm", "logp"])
def test_weights_that_lack_a_tensor(tmp_path, capsys, llama_rm, policy, scorer):
    model, flags = (llama_rm, RM) if scorer == "rm" else (policy, LOGP)
    name = "model.layers.1.mlp.up_proj.weight"
    broken = without_tensor(model, tmp_path / "broken", name)
    err = refused(tmp_path, capsys, ROWS, *flags, "--model", broken)
    assert f"{broken}: the weights lack {name}" in err
    assert not (tmp_path / "scored.jsonl").exists() and not (tmp_path / "scored.meta.json").exists()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_numbers(tmp_path, capsys, policy, number):
    from safetensors.torch import load_file, save_file

    shutil.copytree(policy, tmp_path / "broken")
    path = tmp_path / "broken" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] = number
    save_file(weights, path, metadata={"format": "pt"})
    err = refused(tmp_path, capsys, ROWS, *LOGP, "--model", str(tmp_path / "broken"))
    assert f"{path}: the weights model.norm.weight are not all finite numbers" in err
    assert not (tmp_path / "scored.jsonl").exists() and not (tmp_path / "scored.meta.json").exists()


def test_torn_weights(tmp_path, capsys, llama_rm):
    shutil.copytree(llama_rm, tmp_path / "torn")
    path = tmp_path / "torn" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    err = refused(tmp_path, capsys, ROWS, *RM, "--model", str(tmp_path / "torn"))
    assert f"{path}: " in err and not (tmp_path / "scored.jsonl").exists()


def test_broken_weights_lose_no_earlier_file(tmp_path, capsys, llama_rm):
    run(tmp_path, capsys, ROWS, *RM, "--model", llama_rm)
    before = (tmp_path / "scored.jsonl").read_bytes(), (tmp_path / "scored.meta.json").read_bytes()
    broken = without_tensor(llama_rm, tmp_path / "broken", "model.norm.weight")
    refused(tmp_path, capsys, ROWS, *RM, "--model", broken, "--overwrite")
    assert ((tmp_path / "scored.jsonl").read_bytes(), (tmp_path / "scored.meta.json").read_bytes()) == before


def test_token_ids_beyond_the_vocabulary(tmp_path, capsys, policy, reader):
    mark = score.fingerprint(reader[0])
    rows = [prompt_row(0, "a"), prompt_row(1, response("b", token_ids=[5, 259], tokenizer=mark))]
    err = refused(tmp_path, capsys, rows, *LOGP, "--model", policy)
    assert f"the row p1 has the token id 259, and the vocabulary of {policy} has 259" in err
    assert not (tmp_path / "scored.jsonl").exists()
    rows[1]["responses"][0]["token_ids"] = [5, 258]
    (_, last), _ = run(tmp_path, capsys, rows, *LOGP, "--model", policy)
    assert last["responses"][0]["logp_tokens"] == 3
    rows[1]["responses"][0] |= {"token_ids": [5, 259], "tokenizer": "another"}  # not used
    (_, last), _ = run(tmp_path, capsys, rows, *LOGP, "--model", policy, out="other.jsonl")
    assert last["responses"][0]["logp_tokens"] == 2


def test_tensor_parallel_is_for_vllm(tmp_path, capsys, bert_rm):
    err = refused(tmp_path, capsys, ROWS, *RM, "--model", bert_rm, "--tensor-parallel", "2")
    assert "--tensor-parallel is for vllm" in err
    err = refused(tmp_path, capsys, ROWS, "--model", bert_rm, "--backend", "vllm")
    assert "vllm reads chats, not pairs of texts" in err


# ----- --out
def test_out_is_an_input(tmp_path, capsys):
    path = write_rows(tmp_path / "in.jsonl", [prompt_row(0, "4", answer="4")])
    before = (tmp_path / "in.jsonl").read_bytes()
    os.symlink(path, tmp_path / "link.jsonl")
    os.symlink(tmp_path, tmp_path / "folder")
    for out in ("in.jsonl", "link.jsonl", "folder/in.jsonl", "in.json"):  # in.json has the record of in.jsonl
        err = refused(tmp_path, capsys, [path], "--scorer", "verify", "--overwrite", out=out)
        assert "would replace an input or the record of one" in err
    os.symlink(tmp_path / "other.jsonl", tmp_path / "elsewhere.jsonl")  # a link to no input
    assert run(tmp_path, capsys, [path], "--scorer", "verify", out="elsewhere.jsonl")[1]["rows"] == 1
    assert (tmp_path / "in.jsonl").read_bytes() == before and (tmp_path / "other.jsonl").is_file()


def test_an_out_that_another_process_writes(tmp_path, capsys):
    data = [prompt_row(0, "4", answer="4")]
    with open(tmp_path / "scored.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        err = refused(tmp_path, capsys, data, "--scorer", "verify")
        assert f"--out {tmp_path / 'scored.jsonl'}: another process writes it" in err
        err = refused(tmp_path, capsys, data, "--scorer", "verify", "--overwrite")
        assert "another process writes it" in err
    rows, _ = run(tmp_path, capsys, data, "--scorer", "verify")
    assert rewards(rows) == [1.0]


def test_a_running_process_holds_the_lock(tmp_path, capsys, monkeypatch):
    """Looked at while a window is scored: the record is there before the first row, and --out is locked."""
    data = [prompt_row(k, "4", answer="4") for k in range(3)]
    looks, honest = [], score.Verify.score

    def look(scorer, rows, update):
        with open(tmp_path / "scored.jsonl", "rb") as file:
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            looks.append(len(file.read().splitlines()))
        record = json.loads((tmp_path / "scored.meta.json").read_text())
        assert record["args"]["scorer"] == "verify" and "counts" not in record
        honest(scorer, rows, update)

    monkeypatch.setattr(score.Verify, "window", 1)
    monkeypatch.setattr(score.Verify, "score", look)
    run(tmp_path, capsys, data, "--scorer", "verify")
    assert looks == [0, 1, 2]
    assert json.loads((tmp_path / "scored.meta.json").read_text())["counts"]["rows"] == 3


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
    assert f"was made with other models: {tmp_path / 'rm'} was " in err and "--overwrite starts anew" in err
    assert (tmp_path / "scored.jsonl").read_bytes() == part
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    run(tmp_path, capsys, ROWS, *flags)
    assert (tmp_path / "scored.jsonl").read_bytes() == whole


KILLED = """
import json, os, random, sys
import score
from transformers import AutoModelForSequenceClassification

score.RewardModel.window = 2
score.importlib.metadata.distributions = list  # slow, and the same each time
args = score.parse_args(sys.argv[1:])
model = score.load_model(AutoModelForSequenceClassification, args.model, None, "float32")
score.load_model = lambda *rest: model
make_record = score.make_record
NAMES = ("main", "open_output", "rows_done", "append_rows", "write_record")

def append_rows(file, rows):  # in three pieces, so that a kill leaves a part of a line
    text = "".join(json.dumps(row, ensure_ascii=False, default=list) + "\\n" for row in rows).encode()
    for start in range(0, len(text), len(text) // 3 + 1):
        file.write(text[start : start + len(text) // 3 + 1])
        file.flush()

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


# ----- the environment
METHOD = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}  # what a user has set stays


def test_the_environment_is_set_before_torch_is_imported():
    code = """
import builtins, os, sys
honest = builtins.__import__
def look(name, *rest):
    if name == "torch" and "torch" not in sys.modules:
        names = ("PYTORCH_NVML_BASED_CUDA_CHECK", "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_LOGGING_STREAM")
        print([os.environ.get(name) for name in names])
    return honest(name, *rest)
builtins.__import__ = look
import score
print("torch" in sys.modules)
"""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM", "PYTORCH"))}
    for folder, name, given, method in ((".", "score", {}, "spawn"), ("scorers", "embed", METHOD, "fork")):
        program = code.replace("import score", f"import {name}")
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=REPO / folder, env=env | given, capture_output=True, text=True)
        expected = f"['1', '{method}', 'ext://sys.stderr']"
        assert done.stdout.splitlines() == [expected, "True"], done.stderr[-500:]
