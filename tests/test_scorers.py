"""
pairrm.py and embed.py on a CPU with tiny random models, each against a slow way of computing the same.

Covers  pairrm against one pair at a time in float64: texts, ids, cuts, markers, both orders, matrix, ties,
        batches, resume, a folder that is no PairRM, several tasks. embed of a causal model and of an encoder
        with each pooling. rm on a Gemma-2, whose attention is capped and whose template has no system role.
        Scorers of different scripts, one after the other.
Run     python -m pytest tests/test_scorers.py
"""

import json
import math
import os
import subprocess
import sys
from functools import partial
from itertools import permutations

import pytest
import torch
from conftest import REPO, read_rows, run_script, thinking, write_rows
from models import make_bert, make_gemma
from test_score import (  # noqa: F401
    llama_rm,
    prompt_row,
    refused,
    response,
    rewards,
    run,
    with_number,
    without_tensor,
)

from loading import fingerprint

sys.path.insert(0, str(REPO / "scorers"))
import embed  # noqa: E402
import pairrm as pairrm_script  # noqa: E402

run_pairrm, refused_pairrm = partial(run, script=pairrm_script), partial(refused, script=pairrm_script)
run_embed, refused_embed = partial(run, script=embed), partial(refused, script=embed)

MARKERS = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]
OPENING = "Finish the following coversation in each i-th turn by filling in <Response i> with your response."


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


# ----- pairrm


def make_pairrm(folder, tasks=1, markers=MARKERS, prefix="pretrained_model."):
    """PairRM's layout with random weights: a small deberta-v2 over bytes, and the head."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import DebertaV2Config, DebertaV2Model, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        additional_special_tokens=markers,
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        relative_attention=True,
        position_buckets=64,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
        initializer_range=0.6,
    )
    model, head = (
        DebertaV2Model(config),
        {
            "1.weight": torch.randn(32, 64) / 4,
            "1.bias": torch.randn(32) / 4,
            "4.weight": torch.randn(tasks, 32) / 2,
            "4.bias": torch.randn(tasks),
        },
    )
    marks = model.embeddings.word_embeddings.weight.data[
        -len(markers) :
    ]  # the text matters more than its marker
    marks[2] = marks[1] + 0.15 * torch.randn(32)
    config.save_pretrained(folder)
    save_file(
        {
            **{prefix + name: tensor.contiguous() for name, tensor in model.state_dict().items()},
            **{f"head_layer.{name}": tensor for name, tensor in head.items()},
        },
        folder / "model.safetensors",
    )
    return str(folder)


@pytest.fixture(scope="module")
def pairrm(tmp_path_factory):
    return make_pairrm(tmp_path_factory.mktemp("models") / "pairrm")


def slow_logit(folder, limits=(1224, 2048)):
    """logit(source, first, second) of one pair alone, in float64."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer, DebertaV2Model

    weights = {name: tensor.double() for name, tensor in load_file(f"{folder}/model.safetensors").items()}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = DebertaV2Model(AutoConfig.from_pretrained(folder)).double().eval()
    model.load_state_dict(
        {
            name.removeprefix("pretrained_model."): tensor
            for name, tensor in weights.items()
            if "head_layer" not in name
        }
    )

    def logit(source, first, second):
        ids = tokenizer(MARKERS[0] + source, truncation=True, max_length=limits[0])["input_ids"]
        room = (limits[1] - len(ids)) // 2
        for text in (MARKERS[1] + first, MARKERS[2] + second):
            ids = ids + tokenizer(text, truncation=True, max_length=room)["input_ids"]
        assert (
            [ids.count(token) for token in (1, 2)] == [3, 3] and ids[0] == 1 and ids[-1] == 2
        )  # [CLS] ... [SEP], three times
        h_source, h_first, h_second = (
            hidden(ids)[ids.index(token)] for token in tokenizer.convert_tokens_to_ids(MARKERS[:3])
        )
        return (value(h_source, h_first) - value(h_source, h_second)).mean().item()

    def hidden(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).last_hidden_state[0]

    def value(source, candidate):
        inner = torch.tanh(
            weights["head_layer.1.weight"] @ torch.cat([source, candidate]) + weights["head_layer.1.bias"]
        )
        return weights["head_layer.4.weight"] @ inner + weights["head_layer.4.bias"]

    return logit


def expected_matrix(logit, source, candidates):
    """(wins, rewards) of different candidates, by their definitions in pairrm.py."""
    half = {
        (i, j): (logit(source, candidates[i], candidates[j]) - logit(source, candidates[j], candidates[i]))
        / 2
        for i, j in permutations(range(len(candidates)), 2)
    }
    size = range(len(candidates))
    return (
        [[None if i == j else sigmoid(half[i, j]) for j in size] for i in size],
        [sum(half[i, j] for j in size if j != i) / (len(candidates) - 1) for i in size],
    )


def same_matrix(matrix, expected, tolerance=1e-5):
    assert len(matrix) == len(expected)
    for mine, theirs in zip(matrix, expected):
        assert mine == [None if value is None else pytest.approx(value, abs=tolerance) for value in theirs]


HELLO = OPENING + "USER: hello\nAssistant: <Response 1>"
TEXTS = ["hi", "go away!", "hi there you, é 日本"]


def hello(*texts, **more):
    return {
        "id": "p0",
        "prompt": "hello",
        "responses": [text if isinstance(text, dict) else response(text) for text in texts],
        **more,
    }


def test_pairrm_strings():
    conversation = pairrm_script.conversation
    source = (
        "Finish the following coversation in each i-th turn by filling in <Response i> with your response."
        "USER: hello\nAssistant: <Response 1>"
    )
    user = lambda text: {"role": "user", "content": text}  # noqa: E731
    assert conversation([user("hello")], "hi") == (source, "<Response 1>: hi")
    assert conversation([user("hello")], "") == (source, "<Response 1>: ")
    turns = [user("a?"), {"role": "assistant", "content": "b"}, user("c")]
    expected = OPENING + "USER: a?\nAssistant: <Response 1>\nUSER: c\nAssistant: <Response 2>"
    assert conversation(turns, "x") == (expected, "<Response 1>: b\n<Response 2>: x")
    with_system = [{"role": "system", "content": "be nice"}, *turns]
    assert conversation(with_system, "x") == (
        expected.replace("a?", "be nice\na?"),
        "<Response 1>: b\n<Response 2>: x",
    )


def test_pairrm_matrix_is_that_of_one_pair_at_a_time(tmp_path, capsys, pairrm):
    logit = slow_logit(pairrm)
    (row,), printed = run_pairrm(tmp_path, capsys, [hello(*TEXTS)], "--model", pairrm)
    wins, expected = expected_matrix(logit, HELLO, [f"<Response 1>: {text}" for text in TEXTS])
    same_matrix(row["wins"], wins)
    assert rewards([row]) == pytest.approx(expected, abs=1e-4) and max(expected) > 0.3
    assert [one["scores"] for one in row["responses"]] == [{"pairrm": value} for value in rewards([row])]
    assert row["labeler"] == f"pairrm:{pairrm}" and printed["pairs"] == 3 and printed["pairs_cut"] == 0
    assert sum(rewards([row])) == pytest.approx(0, abs=1e-6)
    for i, j in permutations(range(3), 2):
        assert row["wins"][i][j] + row["wins"][j][i] == pytest.approx(1, abs=1e-12)


def test_pairrm_reads_conversations_and_no_markers(tmp_path, capsys, pairrm):
    # markers and the encoder's own [CLS] and [SEP] are spaces, wherever they stand; any other bracket stays
    turns = [
        {"role": "system", "content": "be [SEP]nice"},
        {"role": "user", "content": "a<|candidate1|>?"},
        {"role": "assistant", "content": "b[CLS]"},
        {"role": "user", "content": "c <Response 1> [MASK]"},
    ]
    texts = ["x<|source|>y", "z<|candidate2|>[SEP]z<|candidate|>", "<|source |> [sep]"]
    row = {"id": "p", "prompt": turns, "responses": [response(text) for text in texts]}
    (row,), printed = run_pairrm(tmp_path, capsys, [row], "--model", pairrm)
    source = (
        OPENING
        + "USER: be  nice\na ?\nAssistant: <Response 1>\nUSER: c <Response 1> [MASK]\nAssistant: <Response 2>"
    )
    candidates = [f"<Response 1>: b \n<Response 2>: {text}" for text in ("x y", "z  z ", "<|source |> [sep]")]
    wins, expected = expected_matrix(slow_logit(pairrm), source, candidates)
    same_matrix(row["wins"], wins)
    assert rewards([row]) == pytest.approx(expected, abs=1e-4)
    assert [one["text"] for one in row["responses"]] == texts  # as they were


def test_pairrm_reads_no_reasoning(tmp_path, capsys, pairrm):
    plain, _ = run_pairrm(tmp_path, capsys, [hello(*TEXTS)], "--model", pairrm, out="plain.jsonl")
    texts = [thinking(response(text), k) for k, text in enumerate(TEXTS)]
    rows = [hello(*texts, thinking(response(TEXTS[0]), 1))]
    (row,), printed = run_pairrm(tmp_path, capsys, rows, "--model", pairrm, name="thoughts.jsonl")
    assert printed["pairs"] == 5 and row["wins"][0][3] == 0.5  # of 6, of which one compares equal answers
    same_matrix([line[:3] for line in row["wins"][:3]], plain[0]["wins"])
    assert [one["text"] for one in row["responses"][:3]] == [one["text"] for one in texts]  # as they were


def test_pairrm_turns_that_do_not_alternate(tmp_path, capsys, pairrm):
    twice = {
        "id": "twice",
        "prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        "responses": [response("x"), response("y")],
    }
    rows, printed = run_pairrm(tmp_path, capsys, [hello("a", "b"), twice], "--model", pairrm)
    reason = "turns of user and assistant do not alternate"
    assert [one["reward_error"] for one in rows[1]["responses"]] == [reason] * 2 and rewards(rows[1:]) == [
        None,
        None,
    ]
    assert rows[1]["wins"] == [[None, None], [None, None]] and printed["without"] == {reason: 2}
    assert None not in rewards(rows[:1])


def test_pairrm_one_response_has_nothing_to_be_compared_with(tmp_path, capsys, pairrm):
    rows, printed = run_pairrm(
        tmp_path, capsys, [hello("a", "b"), {**hello("x"), "id": "one"}], "--model", pairrm
    )
    assert (
        rows[1]["wins"] == [[None]]
        and rewards(rows[1:]) == [None]
        and printed["without"] == {"nothing to compare with": 1}
    )


@pytest.mark.parametrize("limits", [(40, 100), (120, 150), (40, 101), (135, 400)])
def test_pairrm_cuts_each_text_to_its_budget(tmp_path, capsys, pairrm, monkeypatch, limits):
    monkeypatch.setattr(pairrm_script, "SOURCE_TOKENS", limits[0])
    monkeypatch.setattr(pairrm_script, "ALL_TOKENS", limits[1])
    texts = ["short", "long " * 8, "a long one that ends in another way" + "!" * 5]
    (row,), printed = run_pairrm(tmp_path, capsys, [hello(*texts)], "--model", pairrm)
    logit = slow_logit(pairrm, limits)
    wins, expected = expected_matrix(logit, HELLO, [f"<Response 1>: {text}" for text in texts])
    same_matrix(row["wins"], wins)
    assert rewards([row]) == pytest.approx(expected, abs=1e-4)
    uncut, _ = expected_matrix(slow_logit(pairrm), HELLO, [f"<Response 1>: {text}" for text in texts])
    whole = 1 + 1 + len(HELLO) + 1  # [CLS], marker, bytes, [SEP]
    if limits == (135, 400):
        assert whole == 135 and printed["pairs_cut"] == 0  # what fits to the token is whole
        same_matrix(row["wins"], uncut)
    else:  # the source is cut, or in (120, 150) 15 tokens are left, "<Response 1" of every candidate
        assert (
            printed["pairs_cut"] == 3
            and max(abs(row["wins"][i][j] - uncut[i][j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3
        )


def test_pairrm_counts_pairs_of_which_a_candidate_was_cut(tmp_path, capsys, pairrm, monkeypatch):
    room = 1 + 1 + len("<Response 1>: ") + 10 + 1  # a candidate of ten bytes fits to the token
    monkeypatch.setattr(pairrm_script, "ALL_TOKENS", 1 + 1 + len(HELLO) + 1 + 2 * room)
    _, printed = run_pairrm(tmp_path, capsys, [hello("0123456789", "9876543210", "short")], "--model", pairrm)
    assert (printed["pairs"], printed["pairs_cut"]) == (3, 0)
    data = [hello("0123456789", "9876543210", "0123456789+")]
    _, printed = run_pairrm(tmp_path, capsys, data, "--model", pairrm, out="cut.jsonl", name="cut_in.jsonl")
    assert (printed["pairs"], printed["pairs_cut"]) == (3, 2)


def test_pairrm_compare_is_antisymmetric(tmp_path, capsys, pairrm):
    forward, _ = run_pairrm(tmp_path, capsys, [hello(*TEXTS)], "--model", pairrm)
    backward, _ = run_pairrm(
        tmp_path, capsys, [hello(*TEXTS[::-1])], "--model", pairrm, out="back.jsonl", name="back_in.jsonl"
    )
    turned = [line[::-1] for line in backward[0]["wins"][::-1]]
    same_matrix(forward[0]["wins"], turned, 1e-6)
    assert rewards(forward) == pytest.approx(rewards(backward)[::-1], abs=1e-5)
    same = [hello("same", response("same", "off"))]
    tie, _ = run_pairrm(tmp_path, capsys, same, "--model", pairrm, out="tie.jsonl", name="tie_in.jsonl")
    assert tie[0]["wins"] == [[None, 0.5], [0.5, None]] and rewards(tie) == [0.0, 0.0]


def test_pairrm_equal_texts_tie(tmp_path, capsys, pairrm):
    x, y, z = TEXTS
    (alone,), _ = run_pairrm(tmp_path, capsys, [hello(x, y, z)], "--model", pairrm, out="alone.jsonl")
    (row,), printed = run_pairrm(
        tmp_path, capsys, [hello(x, y, response(x, "off"), z, y)], "--model", pairrm, name="five.jsonl"
    )
    assert printed["pairs"] == 8  # of 10
    which = [0, 1, 0, 2, 1]
    for i, j in permutations(range(5), 2):
        if which[i] == which[j]:
            assert row["wins"][i][j] == 0.5
        else:
            assert row["wins"][i][j] == pytest.approx(alone["wins"][which[i]][which[j]], abs=1e-6)
    for line, reward in zip(row["wins"], rewards([row])):
        logits = [math.log(value / (1 - value)) for value in line if value is not None]
        assert reward == pytest.approx(sum(logits) / 4, abs=1e-5)


def many_pairs(count):
    return [
        {
            "id": f"p{k}",
            "prompt": f"question {k}",
            "responses": [
                response("a" * (k % 5 + 1) * 7),
                response(f"text {k}", "off"),
                response("é" * (k % 3)),
            ],
        }
        for k in range(count)
    ]


def test_pairrm_does_not_depend_on_its_batch(tmp_path, capsys, pairrm):
    together, printed = run_pairrm(tmp_path, capsys, many_pairs(8), "--model", pairrm)
    assert 0 < printed["padding"] < 0.08
    alone, printed = run_pairrm(
        tmp_path, capsys, many_pairs(8), "--model", pairrm, "--batch-tokens", "1", out="alone.jsonl"
    )
    assert printed["padding"] == 0
    for one, other in zip(together, alone):
        same_matrix(one["wins"], other["wins"])
    assert rewards(together) == pytest.approx(rewards(alone), abs=1e-5)


def test_pairrm_counts_orders_that_disagree(tmp_path, capsys, pairrm):
    rows, printed = run_pairrm(tmp_path, capsys, many_pairs(8), "--model", pairrm)
    logit, disagree, pairs = slow_logit(pairrm), 0, 0
    for row in many_pairs(8):
        source = OPENING + f"USER: {row['prompt']}\nAssistant: <Response 1>"
        texts = [f"<Response 1>: {one['text']}" for one in row["responses"]]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            pairs += 1  # the first wins in both orders, or in none
            disagree += (logit(source, texts[i], texts[j]) > 0) == (logit(source, texts[j], texts[i]) > 0)
    assert 0 < disagree < pairs == 24 and printed["orders_disagree"] == disagree and printed["pairs"] == 24


def test_pairrm_resumes_byte_for_byte(tmp_path, capsys, pairrm, monkeypatch):
    monkeypatch.setattr(pairrm_script.PairRM, "window", 2)
    run_pairrm(tmp_path, capsys, many_pairs(5), "--model", pairrm)
    whole = (tmp_path / "scored.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length, kept in ((ends[2] + 17, 2), (ends[3], 4), (ends[0] - 1, 0)):
        (tmp_path / "scored.jsonl").write_bytes(whole[:length])
        _, printed = run_pairrm(tmp_path, capsys, many_pairs(5), "--model", pairrm)
        assert (tmp_path / "scored.jsonl").read_bytes() == whole and printed["resumed_rows"] == kept


def test_pairrm_with_several_tasks_takes_their_mean(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    three = make_pairrm(tmp_path / "three", tasks=3)
    weights, values = load_file(f"{three}/model.safetensors"), []
    for task in range(3):
        folder = make_pairrm(tmp_path / f"task{task}")
        head = {
            f"head_layer.4.{kind}": weights[f"head_layer.4.{kind}"][task : task + 1].clone()
            for kind in ("weight", "bias")
        }
        save_file({**weights, **head}, f"{folder}/model.safetensors")
        rows, _ = run_pairrm(tmp_path, capsys, [hello(*TEXTS)], "--model", folder, out=f"{task}.jsonl")
        values.append(rewards(rows))
    rows, _ = run_pairrm(tmp_path, capsys, [hello(*TEXTS)], "--model", three)
    assert rewards(rows) == pytest.approx([sum(one) / 3 for one in zip(*values)], abs=1e-5)
    assert max(abs(a - b) for a, b in zip(values[0], values[1])) > 0.1


def test_a_folder_that_is_no_pairrm(tmp_path, capsys, policy):
    unmarked = make_pairrm(tmp_path / "unmarked", markers=["<|source|>", "<|candidate1|>", "<|candidate|>"])
    deberta = make_pairrm(tmp_path / "deberta", prefix="deberta.")
    for folder, sentence in (
        (
            policy,
            "expected PairRM, a deberta-v2 whose tokenizer has <|source|>, <|candidate1|>, <|candidate2|>, "
            "<|candidate|>, found a llama",
        ),
        (unmarked, "expected PairRM"),
        (deberta, "expected the weights pretrained_model.* and head_layer.*, found deberta."),
    ):
        err = refused_pairrm(tmp_path, capsys, [hello(*TEXTS)], "--model", folder)
        assert f"{folder}: {sentence}" in err and len(err.strip().splitlines()) == 1
        assert not (tmp_path / "scored.jsonl").exists() and not (tmp_path / "scored.meta.json").exists()


@pytest.mark.parametrize(
    "name", ["pretrained_model.encoder.layer.1.output.dense.weight", "head_layer.1.bias"]
)
def test_pairrm_weights_that_lack_a_tensor(tmp_path, capsys, pairrm, name):
    broken = without_tensor(pairrm, tmp_path / "broken", name)
    err = refused_pairrm(tmp_path, capsys, [hello(*TEXTS)], "--model", broken)
    short = name.removeprefix("pretrained_model.").removeprefix("head_layer.")
    assert f"{broken}: these weights are not PairRM's: " in err and short in err
    assert not (tmp_path / "scored.jsonl").exists() and not (tmp_path / "scored.meta.json").exists()


def test_pairrm_margins_that_are_not_finite(tmp_path, capsys, pairrm, monkeypatch):
    honest = pairrm_script.PairRM.logits

    def logits(scorer, sequences, update):
        values = honest(scorer, sequences, update)
        return [math.nan, *values[1:]]

    monkeypatch.setattr(pairrm_script.PairRM, "logits", logits)
    rows, printed = run_pairrm(
        tmp_path, capsys, [hello("a", "b"), {**hello("c", "d"), "id": "x"}], "--model", pairrm
    )
    assert rewards(rows[:1]) == [None, None] and None not in rewards(rows[1:])
    assert printed["without"] == {"not finite": 2} and rows[0]["wins"] == [[None, None], [None, None]]


def test_pairrm_torn_weights_and_weights_that_are_not_numbers(tmp_path, capsys, pairrm):
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    torn = copytree(pairrm, tmp_path / "torn")
    path = torn / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    err = refused_pairrm(tmp_path, capsys, [hello(*TEXTS)], "--model", str(torn))
    assert f"{path}: " in err and len(err.splitlines()) == 1
    broken = copytree(pairrm, tmp_path / "broken")
    weights = load_file(f"{broken}/model.safetensors")
    weights["head_layer.1.bias"][0] = math.nan
    save_file(weights, f"{broken}/model.safetensors", metadata={"format": "pt"})
    err = refused_pairrm(tmp_path, capsys, [hello(*TEXTS)], "--model", str(broken))
    assert f"{broken}: no score in the first 1 rows is a finite number; check its weights" in err
    assert not (tmp_path / "scored.jsonl").exists() and not (tmp_path / "scored.meta.json").exists()


def cached(home, name, folder):
    """A folder as the hub's cache has it, so that its id loads offline."""
    snapshot = home / "hub" / ("models--" + name.replace("/", "--"))
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("0" * 40)
    (snapshot / "snapshots").mkdir()
    os.symlink(folder, snapshot / "snapshots" / ("0" * 40))
    return name


def run_with_hub(home, script, *flags):
    """A script with another cache of the hub, which is read when huggingface_hub is imported."""
    command = [sys.executable, str(REPO / script), *map(str, flags)]
    done = subprocess.run(command, env=os.environ | {"HF_HOME": str(home)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_pairrm_by_its_hub_id(tmp_path, capsys, pairrm):
    by_folder, _ = run_pairrm(tmp_path, capsys, [hello(*TEXTS)], "--model", pairrm)
    name = cached(tmp_path / "home", "llm-blender/PairRM-hf", pairrm)
    flags = ["--model", name, "--responses", tmp_path / "in.jsonl", "--out", tmp_path / "hub.jsonl"]
    run_with_hub(tmp_path / "home", "scorers/pairrm.py", *flags)
    (row,) = read_rows(tmp_path / "hub.jsonl")
    assert row["labeler"] == "pairrm:llm-blender/PairRM-hf" and rewards([row]) == pytest.approx(
        rewards(by_folder), abs=1e-6
    )


# ----- embed

EMBED = ["--dtype", "float32"]


def cosines(vectors):
    return [
        [None if a is None or b is None else torch.cosine_similarity(a, b, dim=0).item() for b in vectors]
        for a in vectors
    ]


def chatml(turns):
    return (
        "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
        + "<|im_start|>assistant\n"
    )


def test_embed_of_a_causal_model_is_the_mean_over_the_response(tmp_path, capsys, policy):
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(policy), AutoModel.from_pretrained(policy).eval()
    vocabulary, sampled = fingerprint(tokenizer), [5, 258, 9, 200]
    texts = [
        response("short"),
        response("a much longer answer that goes on", finish="length"),
        response(""),
        response("ab", token_ids=sampled, tokenizer=vocabulary),
        response("short", "off", finish=None),
    ]
    data = [
        prompt_row(0, *texts),
        {
            "id": "p1",
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
            "responses": [response("x"), response("y" * 30)],
        },
    ]
    rows, printed = run_embed(tmp_path, capsys, data, *EMBED, "--model", policy)
    for row, before in zip(rows, data):
        vectors = []
        for one in before["responses"]:
            prompt = tokenizer(chatml(before["prompt"]), add_special_tokens=False)["input_ids"]
            ids = one["token_ids"] or tokenizer(one["text"], add_special_tokens=False)["input_ids"]
            with torch.no_grad():  # alone, and no end-of-turn token behind it
                states = model(torch.tensor([prompt + ids])).last_hidden_state[0].double()
            vectors.append(states[-len(ids) :].mean(0) if ids else None)
        same_matrix(row["cosine"], cosines(vectors), 2e-6)
        assert row["responses"] == before["responses"]  # no reward, no score
    cosine = rows[0]["cosine"]
    assert cosine[2] == [None] * 5 and [line[2] for line in cosine] == [None] * 5
    assert [cosine[i][i] for i in (0, 1, 3, 4)] == pytest.approx([1] * 4, abs=1e-6) and cosine[0][
        4
    ] == pytest.approx(1, abs=1e-6)
    assert all(cosine[i][j] == cosine[j][i] for i in range(5) for j in range(5)) and cosine[0][1] < 0.9
    assert sum(printed["without"].values()) == 1 and printed["responses"] == 7


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    make_bert(folder, "BertModel", seed=3)
    return folder


POOLINGS = {
    "mean_tokens": lambda states: states.mean(0),
    "cls_token": lambda states: states[0],
    "lasttoken": lambda states: states[-1],
}


def put_pooling(folder, **modes):
    (folder / "1_Pooling").mkdir(exist_ok=True)
    names = (
        "cls_token",
        "mean_tokens",
        "max_tokens",
        "mean_sqrt_len_tokens",
        "weightedmean_tokens",
        "lasttoken",
    )
    settings = {
        "word_embedding_dimension": 32,
        **{f"pooling_mode_{name}": bool(modes.get(name)) for name in names},
        "include_prompt": True,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    return str(folder)


ENCODED = [
    prompt_row(0, "good answer", "bad " * 20, "", response("good answer", "off"), "a b c d"),
    prompt_row(1, "1 2 3", "good", "good bad"),
]


def expected_cosines(folder, pooling, row):
    from transformers import AutoTokenizer, BertModel

    tokenizer, model, vectors = (
        AutoTokenizer.from_pretrained(folder),
        BertModel.from_pretrained(folder).eval(),
        [],
    )
    for one in row["responses"]:
        with torch.no_grad():
            states = (
                model(**tokenizer(one["text"], return_tensors="pt")).last_hidden_state[0].double()
            )  # [CLS] ... [SEP]
        vectors.append(POOLINGS[pooling](states) if one["text"] else None)
    return cosines(vectors)


@pytest.mark.parametrize("pooling", [None, *POOLINGS])
def test_embed_of_an_encoder_pools_as_its_folder_says(tmp_path, capsys, encoder, pooling):
    from shutil import copytree

    folder = copytree(encoder, tmp_path / "encoder")
    if pooling:
        put_pooling(folder, **{pooling: True})
    rows, printed = run_embed(tmp_path, capsys, ENCODED, *EMBED, "--model", str(folder))
    for row, before in zip(rows, ENCODED):
        expected = expected_cosines(folder, pooling or "mean_tokens", before)
        same_matrix(row["cosine"], expected, 2e-6)
        assert row["responses"] == before["responses"]
    others = [
        expected_cosines(folder, other, ENCODED[0])[0][1]
        for other in POOLINGS
        if other != (pooling or "mean_tokens")
    ]
    assert (
        min(abs(value - rows[0]["cosine"][0][1]) for value in others) > 1e-3
    )  # the poolings differ in this model
    assert rows[0]["cosine"][2] == [None] * 5 and rows[0]["cosine"][0][3] == pytest.approx(1, abs=1e-6)
    values = [
        [value for j, value in enumerate(line) if j != i and value is not None]
        for row in rows
        for i, line in enumerate(row["cosine"])
    ]
    means = {"on": [k for k in range(8) if k not in (2, 3)], "off": [3]}
    for source, which in means.items():
        assert printed["mean"][source] == pytest.approx(
            sum(sum(values[k]) / len(values[k]) for k in which) / len(which)
        )


def test_embeddings_are_of_answers_without_reasoning(tmp_path, capsys, encoder, policy):
    texts = ["good answer", "<think>bad bad</think>\n good answer", "bad bad </think>good answer", "bad"]
    empty = response("<think>bad bad")
    sampled = response("<think>bad</think>good answer", token_ids=[5, 6, 7], final="good answer")
    for model in (str(encoder), policy):
        if model == policy:
            from transformers import AutoTokenizer

            sampled["tokenizer"] = fingerprint(AutoTokenizer.from_pretrained(policy))
        data = [prompt_row(0, *texts, sampled, empty)]
        (row,), printed = run_embed(tmp_path, capsys, data, *EMBED, "--model", model, "--overwrite")
        answers = [row["cosine"][0][k] for k in (1, 2, 4)]
        assert answers == pytest.approx([1] * 3, abs=1e-6) and row["cosine"][0][3] < 0.99
        assert row["cosine"][5] == [None] * 6 and printed["responses_empty"] == 1
        assert row["responses"] == data[0]["responses"]


def test_embed_another_pooling_is_refused(tmp_path, capsys, encoder):
    from shutil import copytree

    folder = put_pooling(copytree(encoder, tmp_path / "encoder"), max_tokens=True)
    err = refused_embed(tmp_path, capsys, ENCODED, *EMBED, "--model", folder)
    assert (
        f"{folder}/1_Pooling/config.json: expected mean, cls or last-token pooling, "
        "found 'pooling_mode_max_tokens'" in err
    )
    assert not (tmp_path / "scored.jsonl").exists()


def test_embed_two_poolings_are_refused(tmp_path, capsys, encoder):
    from shutil import copytree

    folder = put_pooling(
        copytree(encoder, tmp_path / "encoder"), cls_token=True, mean_tokens=True
    )  # sentence-transformers joins the two
    assert "pooling" in refused_embed(tmp_path, capsys, ENCODED, *EMBED, "--model", folder)


def test_embed_pools_a_hub_id_as_a_folder(tmp_path, capsys, encoder):
    from shutil import copytree

    folder = put_pooling(copytree(encoder, tmp_path / "encoder"), cls_token=True)
    name = cached(tmp_path / "home", "any/encoder", folder)
    data = write_rows(tmp_path / "in.jsonl", ENCODED)
    flags = ["--model", name, "--responses", data, "--out", tmp_path / "hub.jsonl"]
    run_with_hub(tmp_path / "home", "scorers/embed.py", *EMBED, *flags)
    same_matrix(
        read_rows(tmp_path / "hub.jsonl")[1]["cosine"],
        expected_cosines(folder, "cls_token", ENCODED[1]),
        2e-6,
    )


def test_embed_does_not_depend_on_its_batch(tmp_path, capsys, encoder, policy):
    for model in (str(encoder), policy):
        data = [
            prompt_row(k, "good bad " * (10 + k % 2), "a " * (20 + k % 3)) for k in range(8)
        ]  # lengths within 8 %
        together, printed = run_embed(tmp_path, capsys, data, *EMBED, "--model", model, "--overwrite")
        assert 0 < printed["padding"] < 0.08
        alone, _ = run_embed(
            tmp_path,
            capsys,
            data,
            *EMBED,
            "--model",
            model,
            "--batch-tokens",
            "1",
            "--overwrite",
            out="alone.jsonl",
        )
        for one, other in zip(together, alone):
            same_matrix(one["cosine"], other["cosine"], 2e-6)


def test_embed_leaves_rewards_alone_and_too_long_without(tmp_path, capsys, encoder):
    row = prompt_row(
        0,
        response("good", reward=1.5, reward_error=None, scores={"rm": 1.5}),
        response("bad", reward=-1.0, reward_error=None),
        response("bad " * 63, reward=None, reward_error="why"),
        labeler="rm:x",
        wins=[[None] * 3] * 3,
    )
    (scored,), printed = run_embed(tmp_path, capsys, [row], *EMBED, "--model", str(encoder))
    assert scored["responses"] == row["responses"] and (scored["labeler"], scored["wins"]) == (
        "rm:x",
        row["wins"],
    )
    assert [[value is None for value in line] for line in scored["cosine"]] == [[False, False, True]] * 2 + [
        [True] * 3
    ]
    assert sum(printed["without"].values()) == 1


# ----- rm: Gemma-2

NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' + "
    "message['content'] | trim + '<im_end>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
RM = ["--dtype", "float32"]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A Gemma-2 reward model with attention logits far beyond their cap, and no system role."""
    folder, changes = tmp_path_factory.mktemp("gemma"), {"initializer_range": 0.4, "sliding_window": 64}
    changes |= {"attn_logit_softcapping": 5.0, "template": NO_SYSTEM, "seed": 5}
    return make_gemma(folder, "Gemma2ForSequenceClassification", **changes)


def gemma_text(turns):
    return "<|im_start|>" + "".join(f"<start_of_turn>{role}\n{text}<im_end>\n" for role, text in turns)


def test_gemma_rewards_are_those_of_the_capped_attention(tmp_path, capsys, gemma):
    from transformers import AutoTokenizer, Gemma2ForSequenceClassification

    system = {"role": "system", "content": "be nice"}
    data = [
        prompt_row(0, "short", "a much longer answer that goes on and on " * 2, ""),
        {
            "id": "s",
            "prompt": [
                system,
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "yes?"},
                {"role": "user", "content": "go"},
            ],
            "responses": [response("gone"), response("no")],
        },
    ]
    rows, printed = run(tmp_path, capsys, data, *RM, "--model", gemma)
    texts = [
        gemma_text([("user", "question 0"), ("model", one["text"].strip())]) for one in data[0]["responses"]
    ]
    texts += [
        gemma_text([("user", "be nice\n\nhi"), ("model", "yes?"), ("user", "go"), ("model", one["text"])])
        for one in data[1]["responses"]
    ]
    tokenizer = AutoTokenizer.from_pretrained(gemma)

    def alone(**settings):
        model = Gemma2ForSequenceClassification.from_pretrained(gemma, **settings).eval()
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = (
            None  # the last token is the last one
        )
        with torch.no_grad():
            return [
                model(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids).logits.item()
                for text in texts
            ]

    assert rewards(rows) == pytest.approx(alone(attn_implementation="eager"), abs=1e-4)
    for other in (
        alone(attn_implementation="sdpa"),
        alone(attn_implementation="eager", attn_logit_softcapping=None),
    ):
        assert (
            min(abs(mine - theirs) for mine, theirs in zip(rewards(rows), other)) > 0.01
        )  # the cap matters to every row
    assert printed["without"] == {}


def test_gemma_too_long_has_no_reward(tmp_path, capsys, gemma):
    rows, printed = run(
        tmp_path, capsys, [prompt_row(0, "a", "b" * 100)], *RM, "--model", gemma, "--max-length", "100"
    )
    assert rewards(rows)[1] is None and rewards(rows)[0] is not None
    assert rows[0]["responses"][1]["reward_error"] == "longer than 100 tokens" and printed["without"] == {
        "longer than 100 tokens": 1
    }


def test_embed_token_ids_beyond_the_vocabulary(tmp_path, capsys, policy):
    from transformers import AutoTokenizer

    vocabulary = fingerprint(AutoTokenizer.from_pretrained(policy))
    row = prompt_row(0, response("b", token_ids=[700], tokenizer=vocabulary))
    err = refused_embed(tmp_path, capsys, [row], *EMBED, "--model", policy)
    assert f"the row p0 has the token id 700, but the vocabulary of {policy} has 259" in err


def test_embed_weights_that_lack_a_tensor(tmp_path, capsys, encoder):
    name = "encoder.layer.1.output.dense.weight"
    broken = without_tensor(encoder, tmp_path / "broken", name)
    err = refused_embed(tmp_path, capsys, ENCODED, *EMBED, "--model", broken)
    assert f"{broken}: missing weights: {name}" in err and not (tmp_path / "scored.jsonl").exists()


def test_embed_weights_that_are_not_numbers(tmp_path, capsys, policy):
    broken = with_number(policy, tmp_path / "broken", math.nan)
    err = refused_embed(tmp_path, capsys, ENCODED, *EMBED, "--model", broken)
    assert f"{broken}: no score in the first 2 rows is a finite number; check its weights" in err
    assert not (tmp_path / "scored.jsonl").exists() and not (tmp_path / "scored.meta.json").exists()
    # a first window in which nothing has another to be compared with is fine
    rows, _ = run_embed(
        tmp_path, capsys, [prompt_row(9, "good", ""), *ENCODED], *EMBED, "--model", policy, name="more.jsonl"
    )
    assert rows[0]["cosine"] == [[1.0, None], [None, None]]


# ----- one scorer after another
def test_scorers_of_several_scripts(tmp_path, capsys, pairrm, llama_rm, encoder):  # noqa: F811
    (first,), _ = run_pairrm(tmp_path, capsys, [hello(*TEXTS)], "--model", pairrm, out="1.jsonl")
    paths = [str(tmp_path / "1.jsonl")]
    (second,), printed = run(tmp_path, capsys, paths, *RM, "--model", llama_rm, out="2.jsonl")
    assert "wins" not in second and second["labeler"] == f"rm:{llama_rm}"
    a, b = rewards([first]), rewards([second])
    assert [one["scores"] for one in second["responses"]] == [{"pairrm": x, "rm": y} for x, y in zip(a, b)]
    paths = [str(tmp_path / "2.jsonl")]
    (third,), printed = run_pairrm(tmp_path, capsys, paths, "--model", pairrm, out="3.jsonl")
    assert third["wins"] == first["wins"] and third["labeler"] == first["labeler"]
    assert rewards([third]) == a
    (fourth,), printed = run_embed(
        tmp_path, capsys, [str(tmp_path / "3.jsonl")], *EMBED, "--model", str(encoder), out="4.jsonl"
    )
    assert fourth.pop("cosine")[0][0] == pytest.approx(1, abs=1e-6)
    assert fourth == third


@pytest.mark.parametrize("name", ["pairrm", "embed", "judge", "category", "verify", "logp", "rm_vllm"])
def test_a_flag_that_a_script_does_not_have(tmp_path, name):
    model = [] if name == "verify" else ["--model", "m"]
    _, err = run_script(
        f"scorers/{name}.py", "--responses", "x", "--out", "y", *model, "--backend", "hf", expect=2
    )
    assert "unrecognized arguments: --backend hf" in err
