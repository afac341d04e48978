"""
One prompt and one response are the same token ids, and the same number, in every stage.

Covers  a response as text and as sampled ids, over tokenizers of SentencePiece's kind and templates that put
        something before an answer: scorers/logp.py, train_dpo.py and a float64 model agree. Switches given to
        generate.py alone reach logp and training through files; given downstream they are checked. Files that
        are merged in both orders; two samplings of one prompt; two dates.
Run     python -m pytest tests/test_prompt_ids.py
"""

import contextlib
import json
import sys

import pytest
import torch
from conftest import REPO, read_rows, write_rows
from test_chat import (
    BEGIN,
    CHANNEL,
    DATED,
    OPEN_BEGIN,
    QWEN3,
    QWEN3_BEGIN,
    TURNS,
    models,  # noqa: F401  a fixture
)
from test_generate import with_template
from train_oracle import float64, parse, refused_run, train

import build_pairs
import generate
import loading
import score
import train_dpo
from chat import read_chat

sys.path.insert(0, str(REPO / "scorers"))
import logp  # noqa: E402

ZEPHYR = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
ZEPHYR += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
ANSWER, OTHER = "The arrow", "why? The answer kind"
REASONED = "<think>\nThe why\n</think>\n\nThe arrow"
TEMPLATES = {  # name: (template, response)
    "zephyr": (ZEPHYR, ANSWER),
    "chatml": (TURNS + BEGIN, ANSWER),
    "qwen3": (QWEN3 + QWEN3_BEGIN, ANSWER),
    "qwen3 with reasoning": (QWEN3 + QWEN3_BEGIN, REASONED),
    "qwen3.5": (QWEN3 + OPEN_BEGIN, ANSWER),
    "qwen3.5 with reasoning": (QWEN3 + OPEN_BEGIN, REASONED),
    "gpt-oss": (CHANNEL, ANSWER),
}


def quietly(script, *flags, scorer=None):
    """main of a script in this process; returns the rows of --out."""
    args = script.parse_args([str(flag) for flag in flags])
    score.main(args, scorer) if scorer else script.main(args)
    return read_rows(args.out)


def logps(tmp_path, model, rows, *flags, out="logp.jsonl"):
    path = write_rows(tmp_path / f"in.{out}", rows)
    flags = ["--dtype", "float32", "--model", model, "--responses", path, "--out", tmp_path / out, *flags]
    rows = quietly(logp, *flags, scorer=logp.LogProbability)
    return [response["logp"] for row in rows for response in row["responses"]]


def trained(tmp_path, model, pairs, *flags):
    """{pair_id: (chosen_logp, rejected_logp) of --model, which the learning rate is too small to move}"""
    path = write_rows(tmp_path / "pairs.jsonl", pairs)
    flags = ["--model", model, "--pairs", path, "--batch-size", 1, "--lr", 1e-12, *flags]
    train(*flags, "--out", tmp_path / "trained", "--overwrite")
    order = train_dpo.epoch_order([train_dpo.Pair(pair["pair_id"], "", [], 0, ()) for pair in pairs], 0, 0)
    rows = read_rows(tmp_path / "trained" / "metrics.jsonl")
    numbers = [(row["chosen_logp"], row["rejected_logp"]) for row in rows]
    return dict(zip([pair.pair_id for pair in order], numbers, strict=True))


def whole(chat, prompt, text):
    """(ids of the prompt, ids up to the first end of turn) of the conversation, by transformers alone.

    The prompt is that of the conversation, so an empty think block or a channel belongs to it.
    """
    tokenizer = chat.tokenizer
    turns = [*prompt, {"role": "assistant", "content": text}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    header = rendered[: rendered.rindex(text)]
    ids, header_ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (rendered, header))
    assert ids[: len(header_ids)] == header_ids
    end = ids.index(chat.end_id, len(header_ids)) + 1
    return header_ids, ids[len(header_ids) : end]


@pytest.mark.parametrize("kind", ["metaspace", "legacy"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_sampled_ids_are_one_number_everywhere(tmp_path, models, name, kind):  # noqa: F811
    template, text = TEMPLATES[name]
    model = with_template(tmp_path / "model", models[kind], template)
    chat, _ = read_chat(model)
    prompt = [{"role": "user", "content": "The kind arrow"}]
    expected, (header, completion) = [], whole(chat, prompt, text)
    if text == REASONED and chat.generation.endswith("<think>\n"):  # it is opened by the prompt
        opening = "<think>\n"
        header, completion = whole(chat, prompt, text.removeprefix(opening))
        text = text.removeprefix(opening)
    other = whole(chat, prompt, OTHER)
    weights = float64(model)
    for start, ids in ((header, completion), other):
        with torch.no_grad():
            lines = weights(torch.tensor([start + ids])).logits[0].log_softmax(-1)
        expected.append(sum(lines[len(start) + i - 1, token].item() for i, token in enumerate(ids)))
    sampled = {"token_ids": completion[:-1], "tokenizer": chat.fingerprint}
    # sampled after what stands before it: the prompt as it was for a sample that began in this way
    travelled = {"prompt_token_ids": header, "prompt_tokenizer": chat.template}
    responses = [{"text": text, "source": "off"}, {"text": OTHER, "source": "off"}]
    rows = [{"id": "text", "prompt": prompt, "responses": responses}]
    rows += [{"id": "ids", "prompt": prompt, **travelled, "responses": [{**responses[0], **sampled}]}]
    found = logps(tmp_path, model, rows)
    assert found == pytest.approx([*expected, expected[0]], abs=1e-5 * abs(expected[0]))
    assert abs(found[0] - found[2]) < 1e-5 and abs(found[0] - found[1]) > 1
    pairs = [{"pair_id": "text", "prompt": prompt, "chosen": text, "rejected": OTHER}]
    pairs += [{**pairs[0], "pair_id": "ids", **travelled}]
    pairs[1] |= {f"chosen_{key}": value for key, value in sampled.items()}
    numbers = trained(tmp_path, model, pairs)
    for name in ("text", "ids"):
        assert numbers[name] == pytest.approx(found[:2], rel=1e-5), name


# ----- switches of generate.py
SWITCH = '{"enable_thinking": false}'


@pytest.fixture(scope="module")
def thinking(models, tmp_path_factory):  # noqa: F811
    """A model whose template thinks unless it is told not to."""
    return with_template(
        tmp_path_factory.mktemp("thinking") / "model", models["metaspace"], QWEN3 + OPEN_BEGIN
    )


def sampled_rows(folder, model, *flags, n_rows=3, name="on.jsonl"):
    prompts = [{"id": f"p{k}", "prompt": f"The arrow {k}"} for k in range(n_rows)]
    flags = ["--n", 3, "--max-tokens", 5, "--temperature", 1.5, "--backend", "hf", *flags]
    flags += ["--model", model, "--prompts", write_rows(folder / "prompts.jsonl", prompts)]
    rows = quietly(generate, *flags, "--out", folder / name)
    for row in rows:  # a reward by hand, that of an answer after reasoning too
        for k, response in enumerate(row["responses"]):
            response["reward"] = k
    write_rows(folder / name, rows)
    return rows


def build(folder, *files, out="pairs.jsonl", ratio=1):
    flags = ["--truncated", "keep", "--on-ratio", ratio, "--out", folder / out]
    return quietly(build_pairs, "--scored", *files, *flags)


def test_switches_of_generate_reach_logp_and_training_through_the_files(
    tmp_path, thinking, capsys, monkeypatch
):
    rows = sampled_rows(tmp_path, thinking, "--template-kwargs", SWITCH)
    chat, config = read_chat(thinking)
    closed = chat.tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"]
    for row in rows:
        assert row["prompt_tokenizer"] == chat.template
        assert chat.tokenizer.decode(row["prompt_token_ids"]).endswith("assistant\n<think>\n\n</think>\n\n")
        assert row["prompt_token_ids"][-len(closed) :] == closed
    pairs = build(tmp_path, tmp_path / "on.jsonl")
    ids = {row["id"]: row["prompt_token_ids"] for row in rows}
    assert len(pairs) > 1 and all(pair["prompt_token_ids"] == ids[pair["id"]] for pair in pairs)
    args = parse("--model", thinking, "--pairs", tmp_path / "pairs.jsonl", "--out", "o")
    loaded, dropped = train_dpo.load_pairs(args.pairs, chat, config, args)
    assert not dropped and len(loaded) == len(pairs)
    for pair, row in zip(loaded, pairs, strict=True):
        for sequence in pair.sequences:
            assert list(sequence.ids[: sequence.start]) == ids[row["id"]]
    # logp without the flag: the number of training
    expected = logps(tmp_path, thinking, rows)
    numbers = trained(tmp_path, thinking, pairs)
    by_text = {}
    for i, value in enumerate(expected):
        by_text[rows[i // 3]["id"], rows[i // 3]["responses"][i % 3]["text"]] = value
    for pair in pairs:
        sides = [by_text[pair["id"], pair[side][0]["content"]] for side in ("chosen", "rejected")]
        assert numbers[pair["pair_id"]] == pytest.approx(sides, rel=1e-5)
    # the flag that was given to generate.py renders the same, another is refused
    assert logps(tmp_path, thinking, rows, "--template-kwargs", SWITCH, out="same.jsonl") == expected
    capsys.readouterr()
    monkeypatch.setattr(logp, "load_model", None)  # it is refused before
    with pytest.raises(SystemExit):
        logps(tmp_path, thinking, rows, "--template-kwargs", '{"enable_thinking": true}', out="o.jsonl")
    said = capsys.readouterr().err
    assert "--template-kwargs {'enable_thinking': True}: " in said and said.count("\n") == 1
    monkeypatch.undo()
    flags = ["--model", thinking, "--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / "out"]
    said = refused_run(capsys, *flags, "--template-kwargs", '{"enable_thinking": true}')
    assert "--template-kwargs {'enable_thinking': True}: " in said and not (tmp_path / "out").exists()
    # without ids the flag is needed: another prompt, another number
    bare = [{key: row[key] for key in ("id", "prompt", "responses")} for row in rows]
    assert logps(tmp_path, thinking, bare, "--template-kwargs", SWITCH, out="bare.jsonl") == expected
    without = logps(tmp_path, thinking, bare, out="without.jsonl")
    assert min(abs(a - b) for a, b in zip(without, expected)) > 0.01


# ----- files that are merged
def off_policy(folder, rows, *keys, name):
    """A file of other responses to the same prompts, with these keys of the rows."""
    off = []
    for row in rows:
        texts = [{"text": f"{word} {row['id']}", "source": "off", "reward": k} for k, word in enumerate("xy")]
        off.append({key: row[key] for key in ("id", "prompt", *keys)} | {"responses": texts})
    return write_rows(folder / name, off)


def without_order(pairs):
    return sorted((json.dumps(pair, sort_keys=True) for pair in pairs))


def test_files_in_both_orders_give_the_same_pairs(tmp_path, thinking):
    rows = sampled_rows(tmp_path, thinking, "--template-kwargs", SWITCH, n_rows=6)
    imported = off_policy(tmp_path, rows, name="imported.jsonl")
    # this template rendered their prompts with another switch, as generate.py --source off would
    others = sampled_rows(tmp_path, thinking, n_rows=6, name="thinking.jsonl")
    sampled = off_policy(tmp_path, others, "prompt_token_ids", "prompt_tokenizer", name="sampled.jsonl")
    assert others[0]["prompt_token_ids"] != rows[0]["prompt_token_ids"]
    for off in ([imported], [sampled], [imported, sampled]):
        files = [str(tmp_path / "on.jsonl"), *off]
        one, two = (build(tmp_path, *order, ratio=0.5) for order in (files, files[::-1]))
        if len(files) == 2:
            assert without_order(one) == without_order(two)
        for pair in one + two:
            assert pair["prompt_token_ids"] == rows[int(pair["id"][1:])]["prompt_token_ids"]
            assert pair["prompt_tokenizer"] == rows[0]["prompt_tokenizer"]
        assert {pair["source"] for pair in one} == {"on", "off"} and len(one) == len(two) > 3


@pytest.mark.parametrize("turned", [False, True])
def test_a_prompt_that_was_sampled_in_two_ways_is_refused(tmp_path, thinking, capsys, turned):
    sampled_rows(tmp_path, thinking, "--template-kwargs", SWITCH)
    sampled_rows(tmp_path, thinking, "--seed", 1, name="two.jsonl")
    files = [str(tmp_path / name) for name in ("on.jsonl", "two.jsonl")]
    files = files[::-1] if turned else files
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        build(tmp_path, *files)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "prompt_token_ids" in said
    assert f"{files[0]} and {files[1]}" in said and "p0" in said
    # sampled in one way they are merged
    sampled_rows(
        tmp_path, thinking, "--template-kwargs", SWITCH, "--seed", 1, "--overwrite", name="two.jsonl"
    )
    assert len(build(tmp_path, *files)) > 1


# ----- dates
@contextlib.contextmanager
def on_day(monkeypatch, day):
    class Day(loading.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

    with monkeypatch.context() as patch:
        patch.setattr(loading, "date", Day)
        yield


def test_the_date_of_the_samples_reaches_training(tmp_path, models, monkeypatch, capsys):  # noqa: F811
    model = with_template(tmp_path / "model", models["bytes"], DATED + TURNS + BEGIN)
    with on_day(monkeypatch, "2026-01-05"):
        rows = sampled_rows(tmp_path, model)
    chat, config = read_chat(model, day="2026-01-06")
    text = chat.tokenizer.decode(rows[0]["prompt_token_ids"])
    assert "Today is 05 Jan 2026." in text
    with on_day(monkeypatch, "2026-01-06"):
        build(tmp_path, tmp_path / "on.jsonl")
        args = parse("--model", model, "--pairs", tmp_path / "pairs.jsonl", "--out", "o")
        for pair in train_dpo.load_pairs(args.pairs, chat, config, args)[0]:
            row = rows[int(pair.pair_id[1])]
            assert list(pair.sequences[0].ids[: pair.sequences[0].start]) == row["prompt_token_ids"]
        # off-policy samples of another day, of the same prompts: one sentence
        sampled_rows(tmp_path, model, "--source", "off", name="off.jsonl")
        files = [str(tmp_path / name) for name in ("on.jsonl", "off.jsonl")]
        capsys.readouterr()
        flags = ["--dtype", "float32", "--model", model, "--out", tmp_path / "logp.jsonl"]
        merged = quietly(logp, *flags, "--responses", *files, scorer=logp.LogProbability)
    said = capsys.readouterr().err
    dates = {files[0]: "2026-01-05", files[1]: "2026-01-06"}
    assert f"the chat templates of these files saw different dates: {dates}\n" in said
    assert [row["prompt_token_ids"] for row in merged] == [row["prompt_token_ids"] for row in rows]
