"""
score.py: rewards, log-probabilities and verified answers, each against a slow way of computing the same.

Covers  rm on a Llama with a chat template (pad == end of turn) and on a Bert that reads pairs of texts, both against
        one response at a time through the model's own forward; logp against float64 log_softmax of the full logits;
        verify by a table; batching; merging by id; too long, missing heads, NaN; a second scorer and --primary; resume,
        shards, other arguments.
Run     python -m pytest tests/test_score.py
"""

import json
import math
from argparse import Namespace

import pytest
import score
import torch
from conftest import make_policy, make_tokenizer, read_rows, write_rows


def response(text, source="on", **more):
    return {"text": text, "source": source, "model": source, "finish": "stop", "tokens": None, "token_ids": None,
            "tokenizer": None,
            **more}


def prompt_row(number, *texts, **more):
    return {"id": f"p{number}", "prompt": [{"role": "user", "content": f"question {number}"}],
            "responses": [text if isinstance(text, dict) else response(text) for text in texts], **more}


def run(tmp_path, capsys, rows, *flags, out="scored.jsonl", name="in.jsonl"):
    """(rows of the output, the last line as JSON); `rows` are written to one file, or are paths already."""
    paths = rows if isinstance(rows[0], str) else [write_rows(tmp_path / name, rows)]
    score.main(score.parse_args(["--responses", *paths, "--out", str(tmp_path / out), *flags]))
    return read_rows(tmp_path / out), json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(tmp_path, capsys, rows, *flags, **more):
    with pytest.raises(SystemExit) as exit_status:
        run(tmp_path, capsys, rows, *flags, **more)
    err = capsys.readouterr().err
    assert exit_status.value.code == 2 and "Traceback" not in err
    return err


def rewards(rows):
    return [some["reward"] for row in rows for some in row["responses"]]


@pytest.fixture(scope="module")
def llama_rm(tmp_path_factory):
    """A decoder reward model; its rewards are far apart and leave [0, 1]."""
    from transformers import LlamaConfig, LlamaForSequenceClassification
    folder = tmp_path_factory.mktemp("llama_rm")
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=2,
                         num_key_value_heads=1, max_position_embeddings=256, num_labels=1,
                         bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                         initializer_range=0.3)
    LlamaForSequenceClassification(config).float().save_pretrained(folder)
    return str(folder)


def make_bert_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = ["[PAD]", "[CLS]", "[SEP]",
             "[UNK]"] + "question good bad answer long a b c d 0 1 2 3 4 5 6 7 8 9 user assistant :".split()
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                                                         special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
                                        unk_token="[UNK]", model_max_length=64,
                                        model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    tokenizer.save_pretrained(folder)
    return tokenizer


def bert_config(tokenizer, labels=1):
    from transformers import BertConfig
    return BertConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                      num_attention_heads=2,
                      max_position_embeddings=64, num_labels=labels, initializer_range=0.5, pad_token_id=0)


@pytest.fixture(scope="module")
def bert_rm(tmp_path_factory):
    from transformers import BertForSequenceClassification
    folder = tmp_path_factory.mktemp("bert_rm")
    tokenizer = make_bert_tokenizer(folder)
    torch.manual_seed(2)
    BertForSequenceClassification(bert_config(tokenizer)).float().save_pretrained(folder)
    return str(folder)


# texts of very different lengths in one batch; one holds the end-of-turn token itself, which is the padding token too
ROWS = [prompt_row(0, "short", "a much longer answer that goes on and on " * 2, "x"),
        prompt_row(1, "", "ends early<|im_end|>", "yes"), prompt_row(2, "é 日本 😀", "short", "short")]
RM = ["--scorer", "rm", "--backend", "hf", "--dtype", "float32"]
LOGP = ["--scorer", "logp", "--dtype", "float32"]


# ---- rm

def test_llama_rewards_are_those_of_one_response_at_a_time(tmp_path, capsys, llama_rm):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    rows, printed = run(tmp_path, capsys, ROWS, *RM, "--model", llama_rm)
    tokenizer = AutoTokenizer.from_pretrained(llama_rm)
    model = AutoModelForSequenceClassification.from_pretrained(llama_rm).eval()
    # no row is padded: the last token is the last one
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = None
    expected = []
    for row in ROWS:
        for some in row["responses"]:
            turns = row["prompt"] + [{"role": "assistant", "content": some["text"]}]
            ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False,
                            return_tensors="pt").input_ids
            with torch.no_grad():
                hidden = model.model(ids).last_hidden_state
                alone = model(ids).logits.item()  # the model's own pooling, of a batch of one
            assert alone == pytest.approx((hidden[0, -1] @ model.score.weight[0]).item(), abs=1e-5)
            expected.append(alone)
    assert rewards(rows) == pytest.approx(expected, abs=1e-4)
    assert max(expected) > 1 and min(expected) < 0  # a sigmoid would show
    assert all(some["scores"] == {"rm": some["reward"]} and some["reward_error"] is None for row in rows
               for some in row["responses"])
    assert printed["mean"]["on"] == pytest.approx(sum(expected) / len(expected), abs=1e-4) and printed["without"] == {}
    assert 0 <= printed["padding"] < 0.08


def test_padding_inside_a_batch_changes_no_reward(tmp_path, capsys, llama_rm):
    rows = [prompt_row(k, "a" * (100 + k % 7)) for k in range(14)]  # lengths within 8 %: they share batches
    together, printed = run(tmp_path, capsys, rows, *RM, "--model", llama_rm)
    assert 0 < printed["padding"] < 0.08
    alone, printed = run(tmp_path, capsys, rows, *RM, "--model", llama_rm, "--batch-tokens", "1", out="alone.jsonl")
    assert printed["padding"] == 0 and rewards(together) == pytest.approx(rewards(alone), abs=1e-4)


def test_bert_reads_pairs_of_texts(tmp_path, capsys, bert_rm):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    data = [prompt_row(0, "good", "bad " * 20, "answer 1 2"), prompt_row(1, "a b c d", "a b c", "a b c b")]
    rows, _ = run(tmp_path, capsys, data, *RM, "--model", bert_rm)
    tokenizer = AutoTokenizer.from_pretrained(bert_rm)
    model = AutoModelForSequenceClassification.from_pretrained(bert_rm).eval()
    expected, without_kinds = [], []
    for row in data:
        for some in row["responses"]:
            pair = tokenizer(row["prompt"][0]["content"], some["text"], return_tensors="pt")
            assert pair["token_type_ids"].sum() > 0
            with torch.no_grad():
                expected.append(model(**pair).logits.item())
                without_kinds.append(model(input_ids=pair["input_ids"]).logits.item())
    assert rewards(rows) == pytest.approx(expected, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(expected, without_kinds)) > 1e-2  # the kinds matter to this model


def relabelled(folder, *architecture):
    """The model in `folder` with a config that promises one label (and an architecture), whatever its weights are."""
    config = json.loads((folder / "config.json").read_text()) | {"id2label": {"0": "LABEL_0"},
                                                                 "label2id": {"LABEL_0": 0}}
    (folder / "config.json").write_text(json.dumps(config | ({"architectures": list(architecture)}
                                                             if architecture else {})))
    return str(folder)


def test_a_missing_head_is_fatal(tmp_path, capsys):
    from transformers import BertModel
    make_policy(tmp_path / "policy")
    BertModel(bert_config(make_bert_tokenizer(tmp_path / "bert"))).save_pretrained(tmp_path / "bert")
    no_classifier = "expected a ...ForSequenceClassification with one label, found "
    for folder, architecture, sentence in (("policy", [], no_classifier + "LlamaForCausalLM"),
                                           ("bert", [], no_classifier + "BertModel"),
                                           ("policy",
                                            ["LlamaForSequenceClassification"], "the weights hold no reward head"),
                                           ("bert",
                                            ["BertForSequenceClassification"], "the weights hold no reward head")):
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
    rows, printed = run(tmp_path, capsys, [prompt_row(0, "ab", "a" * 60)], *RM, "--model", llama_rm, "--max-length",
                        "80")
    short, long = rows[0]["responses"]
    assert isinstance(short["reward"], float) and short["reward_error"] is None
    assert (long["reward"], long["reward_error"], long["scores"]) == (None, "longer than 80 tokens", {"rm": None})
    assert printed["without"] == {"longer than 80 tokens": 1} and long["text"] == "a" * 60
    # the limit is that of prompt, response and template together, to the token
    from transformers import AutoTokenizer
    turns = [*rows[0]["prompt"], {"role": "assistant", "content": "a" * 60}]
    length = len(AutoTokenizer.from_pretrained(llama_rm).apply_chat_template(turns, return_dict=True)["input_ids"])
    for limit, fits in ((length, True), (length - 1, False)):
        rows, _ = run(tmp_path, capsys, [prompt_row(0, "ab", "a" * 60)], *RM, "--model", llama_rm, "--max-length",
                      str(limit),
                      out=f"{limit}.jsonl")
        assert (rows[0]["responses"][1]["reward"] is not None) == fits
    assert "reads at most 256 tokens" in refused(tmp_path, capsys, ROWS, *RM, "--model", llama_rm, "--max-length",
                                                 "300")


def test_a_model_that_gives_nan(tmp_path, capsys, llama_rm):
    from transformers import AutoModelForSequenceClassification
    folder = tmp_path / "nan"
    model = AutoModelForSequenceClassification.from_pretrained(llama_rm)
    tokenizer = make_tokenizer(folder)
    model.model.embed_tokens.weight.data[tokenizer.convert_tokens_to_ids("q")] = math.nan  # the letter q
    model.save_pretrained(folder)
    row = {"id": "a", "prompt": "why", "responses": [response("fine"), response("quite")]}
    rows, printed = run(tmp_path, capsys, [row], *RM, "--model", str(folder))
    fine, broken = rows[0]["responses"]
    assert math.isfinite(fine["reward"]) and (broken["reward"], broken["reward_error"]) == (None, "not finite")
    assert printed["without"] == {"not finite": 1}
    assert "no response has a score" in refused(tmp_path, capsys, ROWS, *RM, "--model", str(folder), out="other.jsonl")


def test_equal_texts_are_scored_once(tmp_path, capsys, llama_rm, monkeypatch):
    seen = []
    monkeypatch.setattr(score, "batches_by_tokens", lambda lengths, budget: seen.append(len(lengths))
                        or [[i] for i in range(len(lengths))])
    rows, _ = run(tmp_path, capsys, [prompt_row(0, "a", "b", "a"), prompt_row(1, "a", "a", "a")], *RM, "--model",
                  llama_rm)
    assert seen == [3]  # a and b of p0, a of p1
    values = rewards(rows)
    assert values[0] == values[2] != values[1] and values[3] == values[4] == values[5] != values[0]


# ---- logp

def slow_logp(model, prompt, completion):
    """Sum of float64 log_softmax of the full logits."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].double()
    return logits.log_softmax(-1)[torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1),
                                  torch.tensor(completion)].sum().item()


@pytest.fixture(scope="module")
def reader(policy):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(policy)

    def slow(row, completion):
        text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n"
                       for turn in row["prompt"]) + "<|im_start|>assistant\n"
        return slow_logp(model, tokenizer(text, add_special_tokens=False)["input_ids"], completion)
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    return tokenizer, slow


@pytest.mark.parametrize("chunk", [512, 7])
def test_logp_is_the_float64_sum_over_full_logits(tmp_path, capsys, policy, reader, monkeypatch, chunk):
    monkeypatch.setattr(score, "CHUNK", chunk)  # 7: chunks begin and end inside a response
    tokenizer, slow = reader
    eot = tokenizer.eos_token_id
    data = [prompt_row(0, "hello", response("cut he", finish="length"), response("imported", "off", finish=None)),
            prompt_row(1, "a longer response, é", "", "b" * 40),
            {"id": "two turns", "prompt": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"},
                                           {"role": "user", "content": "go"}], "responses": [response("gone")]}]
    rows, printed = run(tmp_path, capsys, data, *LOGP, "--model", policy)
    for row in rows:
        for some in row["responses"]:
            ids = tokenizer(some["text"], add_special_tokens=False)["input_ids"] + [eot] * (some["finish"] != "length")
            assert some["logp_tokens"] == len(ids)
            assert some["logp"] == pytest.approx(slow(row, ids), rel=1e-5, abs=1e-4)
            assert "reward" not in some and "scores" not in some
    assert printed["responses"] == 7 and printed["without"] == {}


def test_logp_keeps_sampled_ids_of_the_same_tokenizer(tmp_path, capsys, policy, reader):
    tokenizer, slow = reader
    mark, eot = score.fingerprint(tokenizer), tokenizer.eos_token_id
    sampled = [5, 258, 9, 200]  # whatever was sampled: the text does not give these ids back
    row = prompt_row(0, response("ab", token_ids=sampled, tokenizer=mark),
                     response("ab", token_ids=sampled, tokenizer="another"),
                     response("ab", token_ids=sampled, tokenizer=mark, finish="length"))
    (scored,), _ = run(tmp_path, capsys, [row], *LOGP, "--model", policy)
    own = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert own != sampled
    expected = [slow(row, sampled + [eot]), slow(row, own + [eot]), slow(row, sampled)]
    assert [some["logp"] for some in scored["responses"]] == pytest.approx(expected, rel=1e-5)
    assert [some["logp_tokens"] for some in scored["responses"]] == [5, 3, 4]
    assert len({round(value, 3) for value in expected}) == 3


def test_logp_of_nothing_and_of_too_much(tmp_path, capsys, policy):
    row = prompt_row(0, "fine", response("", finish="length"), "a" * 600)
    (scored,), printed = run(tmp_path, capsys, [row], *LOGP, "--model", policy)
    assert [some["logp"] is None for some in scored["responses"]] == [False, True, True]
    assert printed["responses"] == 3 and sum(printed["without"].values()) == 2


def test_logp_leaves_rewards_alone(tmp_path, capsys, policy):
    row = prompt_row(0, response("a", reward=1.5, reward_error=None, scores={"rm": 1.5}),
                     response("b", reward=None, reward_error="why"))
    (scored,), _ = run(tmp_path, capsys, [row], *LOGP, "--model", policy)
    assert [(some["reward"], some["reward_error"]) for some in scored["responses"]] == [(1.5, None), (None, "why")]
    assert scored["responses"][0]["scores"] == {"rm": 1.5}


# ---- verify

ANSWERS = [  # reference, response, equal
    ("She has 2 * 9 = <<2*9=18>>18 eggs.\n#### 18", "So 9 + 9 = 18.\n#### 18", 1), ("#### 18", "The answer is 18.", 1),
    ("18", "first 17, then 18", 1), ("18", "first 18, then 17", 0), ("18", "#### 17 and not 18", 0),
           ("#### 5", "I get #### 4\n#### 5", 1),
    ("\\frac{1}{2}", "so \\boxed{\\frac{1}{2}}", 1), ("\\frac{1}{2}", "so \\boxed{\\frac{1}{3}}", 0),
    ("\\frac{1}{2}", "so \\boxed{2}", 0), ("so \\boxed{\\frac{1}{2}} QED 3", "\\boxed{\\frac{1}{2}}", 1),
    ("2^{n+{1}}", "\\boxed{0} no: \\boxed{2^{n + {1}}}.", 1), ("1,000", "it costs 1000.0", 1),
           ("1000", "it costs 1,000 dollars", 1),
    ("1/2", "x = 0.5", 1), ("0.5", "x = 1/2", 1), ("1/3", "x = 0.3333", 0), ("-3", "we get -3", 1),
           ("-3", "we get 3", 0), ("3", "we get -3", 0),
    ("5", "it is $5", 1), ("$5", "it is 5", 1), ("5", "it is $5.", 1), ("7", "The answer is 7.", 1),
           ("#### 7", "#### 7.", 1),
    ("7", "no number here", 0), ("7", "", 0), ("1", "\\boxed{1/0}", 0), ("Paris", "\\boxed{paris}", 1),
           ("70000", "#### 70,000", 1),
    ("12.50", "$12.5", 1), ("0", "0", 1), ("0.1", "1/10", 1), (18, "18", 1),
]


def test_verify_table(tmp_path, capsys):
    data = [prompt_row(k, text, answer=answer) for k, (answer, text, _) in enumerate(ANSWERS)]
    rows, _ = run(tmp_path, capsys, data, "--scorer", "verify")
    for (answer, text, equal), value in zip(ANSWERS, rewards(rows)):
        assert value == float(equal), f"{text!r} against {answer!r}"
    assert all(type(value) is float for value in rewards(rows))


def test_a_prompt_without_answer_has_no_reward(tmp_path, capsys):
    rows, printed = run(tmp_path, capsys, [prompt_row(0, "4", answer="4"), prompt_row(1, "4")], "--scorer", "verify")
    assert rewards(rows) == [1.0, None] and rows[1]["responses"][0]["reward_error"] == "the prompt carries no answer"
    assert printed["without"] == {"the prompt carries no answer": 1}
    assert "no response has a score" in refused(tmp_path, capsys, [prompt_row(0, "4")], "--scorer", "verify",
                                                out="none.jsonl")


# ---- batching, merging, keys

def test_batches_by_tokens():
    lengths = [int(length)
               for length in torch.randint(1, 300, (500,), generator=torch.Generator().manual_seed(0))] + [5000]
    batches = score.batches_by_tokens(lengths, 2048)
    assert sorted(i for batch in batches for i in batch) == list(range(501))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= 2048  # one row alone may be longer than the budget
        assert longest <= 1.08 * min(lengths[i] for i in batch)
    assert score.batches_by_tokens([10] * 7, 30) == [[0, 1, 2], [3, 4, 5], [6]]
    assert score.batches_by_tokens([100, 109, 108], 10_000) == [[0, 2], [1]]


def test_files_are_merged_by_id(tmp_path, capsys):
    first = [prompt_row(k, f"a{k}", f"{k}", answer=str(k), category="x", wins=[[None, 0.75], [0.25, None]])
             for k in (0, 1)]
    second = [prompt_row(k, response(f"b {k}", "off"), answer="ignored", more=k, cosine=[[1]]) for k in (2, 1)]
    paths = [write_rows(tmp_path / "1.jsonl", first), write_rows(tmp_path / "2.jsonl", second)]
    rows, printed = run(tmp_path, capsys, paths, "--scorer", "verify")
    assert [row["id"] for row in rows] == ["p0", "p1", "p2"] and printed["rows"] == 3 and printed["responses"] == 6
    both = rows[1]
    assert [some["text"] for some in both["responses"]] == ["a1", "1", "b 1"]
    # the first file's word holds, the second's adds
    assert (both["answer"], both["category"], both["more"]) == ("1", "x", 1)
    assert both["wins"] == [[None, 0.75, None], [0.25, None, None], [None, None, None]]
    assert both["cosine"] == [[None, None, None], [None, None, None], [None, None, 1]]
    assert rewards([both]) == [1.0, 1.0, 1.0]


def test_one_id_for_two_prompts_and_two_rows(tmp_path, capsys):
    other = {**prompt_row(0, "b", answer="1"), "prompt": "another question"}
    paths = [write_rows(tmp_path / "1.jsonl", [prompt_row(0, "a", answer="1")]),
             write_rows(tmp_path / "2.jsonl", [other])]
    err = refused(tmp_path, capsys, paths, "--scorer", "verify")
    assert f"{paths[1]}:1: the id p0 stands for another prompt in {paths[0]}" in err
    twice = [prompt_row(0, "a", answer="1"), prompt_row(1, "a", answer="1"), prompt_row(0, "b", answer="1")]
    assert "in.jsonl:3: the id p0 stands twice in the file" in refused(tmp_path, capsys, twice, "--scorer", "verify")
    assert not (tmp_path / "scored.jsonl").exists()


def test_a_second_scorer_adds_and_primary_replaces(tmp_path, capsys, llama_rm):
    first, _ = run(tmp_path, capsys, [prompt_row(0, "4", "5", answer="4")], "--scorer", "verify", out="1.jsonl")
    assert rewards(first) == [1.0, 0.0]
    second, printed = run(tmp_path, capsys, [str(tmp_path / "1.jsonl")], *RM, "--model", llama_rm, "--name", "tiny",
                          out="2.jsonl")
    assert rewards(second) == [1.0, 0.0]
    assert [sorted(some["scores"]) for some in second[0]["responses"]] == [["tiny", "verify"]] * 2
    values = [some["scores"]["tiny"] for some in second[0]["responses"]]
    assert printed["mean"]["on"] == pytest.approx(sum(values) / 2)
    third, _ = run(tmp_path, capsys, [str(tmp_path / "1.jsonl")], *RM, "--model", llama_rm, "--name", "tiny",
                   "--primary", out="3.jsonl")
    assert rewards(third) == values and [some["scores"]["verify"] for some in third[0]["responses"]] == [1.0, 0.0]


def test_rewards_in_some_responses_only_are_refused(tmp_path, capsys):
    paths = [str(tmp_path / "1.jsonl"), write_rows(tmp_path / "2.jsonl", [prompt_row(0, "5")])]
    run(tmp_path, capsys, [prompt_row(0, "4", answer="4")], "--scorer", "verify", out="1.jsonl")
    err = refused(tmp_path, capsys, paths, "--scorer", "verify", "--name", "again")
    assert "1 responses have a reward" in err and "1 " in err.partition("have a reward")[2] and "--primary" in err
    rows, _ = run(tmp_path, capsys, paths, "--scorer", "verify", "--primary")
    assert rewards(rows) == [1.0, 0.0]


def test_unknown_keys_and_order_pass_through(tmp_path, capsys):
    data = [prompt_row(k, response(f"{k}", extra={"deep": [k]}), answer=str(k), note="né") for k in (3, 1, 2)]
    rows, _ = run(tmp_path, capsys, data, "--scorer", "verify")
    assert [row["id"] for row in rows] == ["p3", "p1", "p2"] and rows[0]["note"] == "né"
    assert rows[0]["responses"][0]["extra"] == {"deep": [3]} and rows[0]["prompt"] == data[0]["prompt"]


# ---- resume, shards

def many(count):
    return [prompt_row(k, "a" * (k % 5 + 1), f"text {k}", "é" * (k % 3)) for k in range(count)]


@pytest.mark.parametrize("scorer", ["rm", "logp"])
def test_a_torn_file_is_completed_byte_for_byte(tmp_path, capsys, llama_rm, policy, monkeypatch, scorer):
    monkeypatch.setattr(score, "WINDOW", 4)
    flags = [*RM, "--model", llama_rm] if scorer == "rm" else [*LOGP, "--model", policy]
    run(tmp_path, capsys, many(11), *flags)
    whole = (tmp_path / "scored.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length, kept in ((ends[5] + 17, 4), (ends[7], 8), (ends[0] - 1, 0), (0, 0), (len(whole) - 1, 8),
                         (len(whole), 11)):
        (tmp_path / "scored.jsonl").write_bytes(whole[:length])
        _, printed = run(tmp_path, capsys, many(11), *flags)
        assert (tmp_path / "scored.jsonl").read_bytes() == whole and printed["resumed_rows"] == kept


def test_shards_limits_and_batches_change_nothing(tmp_path, capsys, llama_rm, monkeypatch):
    monkeypatch.setattr(score, "WINDOW", 4)
    flags = [*RM, "--model", llama_rm]
    whole, _ = run(tmp_path, capsys, many(11), *flags)
    parts = [run(tmp_path, capsys, many(11), *flags, "--shard", f"{i}/2", out=f"{i}.jsonl")[0] for i in range(2)]
    assert len(parts[0]) == 7 and sorted(parts[0] + parts[1], key=lambda row: int(row["id"][1:])) == whole
    limited, _ = run(tmp_path, capsys, many(11), *flags, "--limit", "5", out="limited.jsonl")
    assert [row["id"] for row in limited] == [row["id"] for row in whole[:5]]
    assert rewards(limited) == pytest.approx(rewards(whole[:5]), abs=1e-5)
    reversed_rows, _ = run(tmp_path, capsys, many(11)[::-1], *flags, out="reversed.jsonl", name="reversed_in.jsonl")
    assert rewards(reversed_rows[::-1]) == pytest.approx(rewards(whole), abs=1e-5)
    assert "expected I/N with 0 <= I < N" in refused(tmp_path, capsys, many(11), *flags, "--shard", "2/2",
                                                     out="bad.jsonl")


def test_another_run_is_refused(tmp_path, capsys, llama_rm):
    data = [prompt_row(0, "4", "5", answer="4")]
    run(tmp_path, capsys, data, "--scorer", "verify")
    before = (tmp_path / "scored.jsonl").read_bytes()
    err = refused(tmp_path, capsys, data, "--scorer", "verify", "--name", "other")
    assert "belongs to a run with other args: name was 'verify' and is 'other'; --overwrite starts anew" in err
    err = refused(tmp_path, capsys, [prompt_row(0, "4", "6", answer="4")], "--scorer", "verify")
    assert "belongs to a run with other inputs" in err and "in.jsonl" in err
    assert (tmp_path / "scored.jsonl").read_bytes() == before
    rows, _ = run(tmp_path, capsys, data, "--scorer", "verify", "--name", "other", "--overwrite")
    assert rows[0]["responses"][0]["scores"] == {"other": 1.0}


def test_meta_file(tmp_path, capsys):
    import hashlib
    run(tmp_path, capsys, [prompt_row(0, "4", "5", answer="4")], "--scorer", "verify")
    meta = json.loads((tmp_path / "scored.meta.json").read_text())
    data = (tmp_path / "in.jsonl").read_bytes()
    assert meta["inputs"] == {str(tmp_path / "in.jsonl"): hashlib.sha256(data).hexdigest()}
    assert meta["args"]["scorer"] == "verify" and meta["counts"]["responses"] == 2
    assert meta["versions"]["torch"] == torch.__version__


def test_a_flag_that_would_do_nothing_is_refused(capsys):
    common = ["--responses", "x", "--out", "y"]
    for flags in (["--scorer", "verify", "--model", "m"], ["--scorer", "verify", "--backend", "hf"],
                  ["--scorer", "logp"],
                  ["--scorer", "logp", "--model", "m", "--primary"],
                  ["--scorer", "logp", "--model", "m", "--name", "n"],
                  ["--scorer", "logp", "--model", "m", "--backend", "vllm"], ["--scorer", "rm"],
                  ["--scorer", "rm", "--model", "m", "--limit", "0"]):
        with pytest.raises(SystemExit) as exit_status:
            score.parse_args([*common, *flags])
        assert exit_status.value.code == 2, flags
    capsys.readouterr()
    assert isinstance(score.parse_args([*common, "--scorer", "rm", "--model", "m"]), Namespace)
