"""
Bad input gets one sentence with file and line and exit status 2, and nothing is written (DESIGN.md, rule 3).

Covers  torn lines, missing keys, prompts that end with no user turn, empty and missing files, ids that are
        twice in a file, rewards that are no numbers, folders that are no models, tokenizers without a chat
        template; an --out that is an input, takes an input's record, is a folder or cannot be written, or is
        of another run. What only one script can meet (a ratio, a total, a missing head ...) is tested beside
        that script, and every key of every type in test_shapes.py.
Run     python -m pytest tests/test_bad_input.py
"""

import importlib
import json
import os
import shutil

import pytest
import torch
from conftest import make_policy, read_rows, run_script, write_rows

QUICK = ["build_pairs", "boundary", "winrate"]  # they replace their output
DATA = ["generate", "import", "score", *QUICK]  # data-reading commands that need no training
ALL = [*DATA, "train_dpo"]
PROMPT = [{"role": "user", "content": "hi"}]


def good_rows(command):
    if command == "train_dpo":
        bad = [{"role": "assistant", "content": "bad"}]
        good = [[{"role": "assistant", "content": f"good {k}"}] for k in range(4)]
        return [{"pair_id": f"p{k}", "prompt": PROMPT, "chosen": good[k], "rejected": bad} for k in range(4)]
    rows = [{"id": f"p{k}", "prompt": f"question {k}"} for k in range(4)]
    if command == "generate":
        return rows
    if command == "import":
        return [{**row, "response": "text"} for row in rows]
    responses = []
    for text, source, reward in (
        ("good", "on", 2.0),
        ("bad", "on", 1.0),
        ("fine", "off", 1.5),
        ("poor", "off", 0.5),
    ):
        known = {"text": text, "source": source, "model": source, "finish": "stop"}
        responses.append(known if command == "score" else {**known, "reward": reward})
    return [{**row, "answer": "1", "responses": [dict(one) for one in responses]} for row in rows]


def flags_of(command, data, out, model):
    sampling = ["--backend", "hf", "--n", "1", "--max-tokens", "4"]
    return {
        "generate": ["--model", model, "--prompts", data, "--out", out, *sampling],
        "import": ["--format", "rows", "--data", data, "--out", out],
        "score": ["--responses", data, "--out", out],
        "logp": ["--responses", data, "--out", out],
        "rm": ["--responses", data, "--out", out],
        "build_pairs": ["--scored", data, "--out", out],
        "boundary": ["--scored", data, "--out", out],
        "winrate": ["--scored", data, "--model", "on", "--baseline", "off", "--out", out],
        "train_dpo": ["--model", model, "--pairs", data, "--out", out],
    }[command]


def start(command, data, out, model, *more):
    modules = {"import": "data.import_responses", "winrate": "evaluate", "rm": "score"}
    modules |= {"score": "scorers.verify", "logp": "scorers.logp"}  # "score": the quickest of the scorers
    script = importlib.import_module(modules.get(command, command))
    args = script.parse_args([*flags_of(command, str(data), str(out), str(model)), *map(str, more)])
    scorers = {"score": "Verify", "logp": "LogProbability"}
    try:
        if command in scorers:
            script.score.main(args, getattr(script, scorers[command]))
        else:
            script.main(args)
    finally:
        if torch.distributed.is_initialized():  # train_dpo.py was refused between its start and its end
            torch.distributed.destroy_process_group()


def contents(folder):
    """{path: bytes} of all files below a folder, where links lead to, and the kind of what is neither."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[path] = os.readlink(path)
        else:
            found[path] = path.read_bytes() if path.is_file() else path.stat().st_mode
    return found


def refused(tmp_path, capsys, command, data, model, *more, out=None):
    """The sentence of a run that must be refused: one line on standard error, status 2, no file changed."""
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as exit_status:
        start(command, data, tmp_path / "out" / "out.jsonl" if out is None else out, model, *more)
    printed = capsys.readouterr()
    assert exit_status.value.code == 2 and printed.out == ""
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err, printed.err
    assert contents(tmp_path) == before
    return printed.err


def test_the_good_rows_are_good(tmp_path, capsys, policy):
    for command in DATA:  # or else the refusals below could have another reason
        data = write_rows(tmp_path / f"{command}.jsonl", good_rows(command))
        start(command, data, tmp_path / f"{command}.out.jsonl", policy)
        assert json.loads(capsys.readouterr().out.splitlines()[-1]), command


# ----- lines and files
@pytest.mark.parametrize("command", ALL)
@pytest.mark.parametrize(
    "line",
    ['{"id": "p2", "prompt": "torn"', '{"id": "p2", "prompt": "torn', "[1, 2]", "null"],
    ids=["torn", "torn in a text", "list", "null"],
)
def test_a_line_that_is_no_object(tmp_path, capsys, policy, command, line):
    lines = [json.dumps(row) for row in good_rows(command)]
    lines[2] = line
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    err = refused(tmp_path, capsys, command, tmp_path / "data.jsonl", policy)
    assert f" {tmp_path}/data.jsonl:3: " in err


@pytest.mark.parametrize("command", DATA)
def test_blank_lines_are_no_rows(tmp_path, capsys, policy, command):
    lines = [json.dumps(row) for row in good_rows(command)]
    expected = tmp_path / "1.jsonl"
    for out, text in (
        (expected, "\n".join(lines)),
        (tmp_path / "2.jsonl", "\n" + "\n \t\n".join(lines) + "\n\n"),
    ):
        (tmp_path / "data.jsonl").write_text(text)
        start(command, tmp_path / "data.jsonl", out, policy)
    assert read_rows(tmp_path / "2.jsonl") == read_rows(expected)
    # they count as lines where a row is named
    (tmp_path / "data.jsonl").write_text("\n\n".join([*lines, "torn"]))
    capsys.readouterr()
    err = refused(tmp_path, capsys, command, tmp_path / "data.jsonl", policy)
    assert f" {tmp_path}/data.jsonl:{2 * len(lines) + 1}: " in err


@pytest.mark.parametrize("command", ALL)
def test_bytes_that_are_no_text(tmp_path, capsys, policy, command):
    write_rows(tmp_path / "data.jsonl", good_rows(command))
    with open(tmp_path / "data.jsonl", "ab") as file:
        file.write(b'{"id": "\xff\xfe"}\n')
    err = refused(tmp_path, capsys, command, tmp_path / "data.jsonl", policy)
    assert "data.jsonl:5: " in err


@pytest.mark.parametrize("command", ALL)
def test_an_empty_file_and_none(tmp_path, capsys, policy, command):
    (tmp_path / "data.jsonl").touch()
    (tmp_path / "folder").mkdir()
    for name in ("data.jsonl", "absent.jsonl", "folder"):
        err = refused(tmp_path, capsys, command, tmp_path / name, policy)
        assert f"{tmp_path}/{name}: expected JSON lines, found no file or an empty one" in err


@pytest.mark.parametrize("command", ["generate", "score", *QUICK, "train_dpo"])
def test_an_id_that_is_twice_in_a_file(tmp_path, capsys, policy, command):
    rows = good_rows(command)
    key = "pair_id" if command == "train_dpo" else "id"
    rows[2][key] = "p0"
    err = refused(tmp_path, capsys, command, write_rows(tmp_path / "data.jsonl", rows), policy)
    assert f"data.jsonl:3: duplicate {key} p0" in err


def second_file(tmp_path, command, rows):
    """The flag and paths of the good rows and of a second file."""
    flag = "--responses" if command == "score" else "--scored"
    first = write_rows(tmp_path / "first.jsonl", good_rows(command))
    return flag, first, write_rows(tmp_path / "second.jsonl", rows)


@pytest.mark.parametrize("command", ["score", *QUICK])
def test_another_prompt_in_a_second_file(tmp_path, capsys, policy, command):
    rows = good_rows(command)
    rows[1]["prompt"] = "another question"
    more = second_file(tmp_path, command, rows[:2])
    err = refused(tmp_path, capsys, command, "", policy, *more)
    assert "second.jsonl:2: " in err and "p1" in err and "another prompt" in err


@pytest.mark.parametrize("command", ["score", *QUICK])
def test_an_id_that_is_twice_in_a_second_file(tmp_path, capsys, policy, command):
    """A prompt may be in several files, but once in each."""
    rows = good_rows(command)
    more = second_file(tmp_path, command, [rows[0], rows[1], rows[0]])
    err = refused(tmp_path, capsys, command, "", policy, *more)
    assert "second.jsonl:3: duplicate id p0 in this file" in err


@pytest.mark.parametrize("command", ["score", *QUICK])
def test_a_file_that_is_given_twice(tmp_path, capsys, policy, command):
    flag, first, _ = second_file(tmp_path, command, good_rows(command))
    assert "first.jsonl" in refused(tmp_path, capsys, command, "", policy, flag, first, first)


# ----- rows
@pytest.mark.parametrize(
    "command, key",
    [
        ("generate", "prompt"),
        ("import", "prompt"),
        ("score", "responses"),
        ("score", "prompt"),
        ("score", "id"),
        ("build_pairs", "responses"),
        ("build_pairs", "prompt"),
        ("build_pairs", "id"),
        ("boundary", "prompt"),
        ("boundary", "responses"),
        ("boundary", "id"),
        ("winrate", "prompt"),
        ("winrate", "responses"),
        ("winrate", "id"),
        ("train_dpo", "chosen"),
        ("train_dpo", "rejected"),
    ],
)
def test_a_missing_key(tmp_path, capsys, policy, command, key):
    rows = good_rows(command)
    del rows[1][key]
    err = refused(tmp_path, capsys, command, write_rows(tmp_path / "data.jsonl", rows), policy)
    assert f"`{key}`" in err.split("data.jsonl:2: ")[1]


@pytest.mark.parametrize("command", ALL)
@pytest.mark.parametrize(
    "prompt, sentence",
    [
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "expected a prompt that ends with a user turn",
        ),
        ([], "expected a prompt that ends with a user turn"),
        (7, "prompt"),
        ([{"role": "user"}], "content"),
        (["a"], "prompt"),
    ],
    ids=["assistant last", "no turn", "a number", "no content", "no messages"],
)
def test_a_prompt_that_is_none(tmp_path, capsys, policy, command, prompt, sentence):
    rows = good_rows(command)
    rows[3]["prompt"] = prompt
    err = refused(tmp_path, capsys, command, write_rows(tmp_path / "data.jsonl", rows), policy)
    assert sentence in err.split("data.jsonl:4: ")[1]


@pytest.mark.parametrize("command", ["score", *QUICK])
@pytest.mark.parametrize(
    "responses, key",
    [
        ("text", "responses"),
        ([{"text": 1, "source": "on", "reward": 1}], "text"),
        ([{"source": "on", "reward": 1}], "text"),
        ([{"text": "a", "source": "own", "reward": 1}], "source"),
        (["a"], "responses"),
    ],
    ids=["text", "number", "no text", "source", "strings"],
)
def test_responses_that_are_none(tmp_path, capsys, policy, command, responses, key):
    rows = good_rows(command)
    rows[1]["responses"] = responses
    err = refused(tmp_path, capsys, command, write_rows(tmp_path / "data.jsonl", rows), policy)
    assert key in err.split("data.jsonl:2: ")[1]


@pytest.mark.parametrize("command", QUICK)
@pytest.mark.parametrize(
    "reward, sentence",
    [
        (float("nan"), ""),
        (float("inf"), ""),
        (float("-inf"), ""),
        ("1.5", "reward"),
        (True, "reward"),
        ("no key", "reward"),
    ],
    ids=str,
)
def test_rewards_that_are_no_numbers(tmp_path, capsys, policy, command, reward, sentence):
    rows = good_rows(command)
    rows[2]["responses"][1]["reward"] = reward
    if reward == "no key":
        del rows[2]["responses"][1]["reward"]
    err = refused(tmp_path, capsys, command, write_rows(tmp_path / "data.jsonl", rows), policy)
    if reward == "no key" and command == "build_pairs":  # which does not always need one
        assert f'{tmp_path}/data.jsonl: p2: a response has no "reward"; score.py writes it\n' in err
    else:
        assert sentence in err.split("data.jsonl:3: ")[1]


@pytest.mark.parametrize(
    "command, sentence",
    [
        ("build_pairs", "expected some pairs, found 0: "),
        ("boundary", "no on-policy and off-policy response can be compared"),
        ("winrate", "no prompt has a verdict on on against off: "),
    ],
)
def test_files_without_any_reward(tmp_path, capsys, policy, command, sentence):
    rows = good_rows(command)
    for row in rows:
        for response in row["responses"]:
            response["reward"] = None
    err = refused(tmp_path, capsys, command, write_rows(tmp_path / "data.jsonl", rows), policy)
    assert f"{tmp_path}/data.jsonl: {sentence}" in err


@pytest.mark.parametrize("command", QUICK)
@pytest.mark.parametrize("wins", [[[None, 1], [0, None]], [[None] * 4] * 3, [[None] * 3] * 4, []], ids=len)
def test_wins_of_another_shape(tmp_path, capsys, policy, command, wins):
    rows = good_rows(command)
    for row in rows:
        row["wins"] = [[None, 1, 1, 1], [0, None, 1, 1], [0, 0, None, 1], [0, 0, 0, None]]
    rows[1]["wins"] = wins
    err = refused(tmp_path, capsys, command, write_rows(tmp_path / "data.jsonl", rows), policy)
    assert 'data.jsonl:2: expected "wins" to have a row and a column for every response' in err


MESSAGES = "expected {} to be text, or messages that end with the assistant's"


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        ("chosen", [], MESSAGES.format("chosen")),
        ("rejected", [], MESSAGES.format("rejected")),
        ("chosen", PROMPT, MESSAGES.format("chosen")),
        (
            "chosen",
            [{"role": "user", "content": "another"}, {"role": "assistant", "content": "a"}],
            "chosen and rejected answer different prompts",
        ),
        ("chosen", None, "chosen"),
        ("prompt", None, "expected a prompt that ends with a user turn"),
        ("prompt", "no key", "expected a prompt that ends with a user turn"),
        ("rejected_token_ids", [2**32], "rejected_token_ids"),
    ],
    ids=["nothing", "nothing rejected", "user", "another prompt", "null", "no prompt", "no key", "token id"],
)
def test_a_pair_that_is_none(tmp_path, capsys, policy, key, value, sentence):
    rows = good_rows("train_dpo")
    rows[0][key] = value
    if value == "no key":
        del rows[0][key]
    err = refused(tmp_path, capsys, "train_dpo", write_rows(tmp_path / "data.jsonl", rows), policy)
    assert sentence in err.split("data.jsonl:1: ")[1]


# ----- models
@pytest.mark.parametrize("command", ["generate", "rm", "logp", "train_dpo"])
def test_a_folder_that_is_no_model(tmp_path, capsys, policy, command):
    rows = good_rows("score" if command in ("rm", "logp") else command)
    data = write_rows(tmp_path / "data.jsonl", rows)
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()  # a model, but not in safetensors
    shutil.copy(f"{policy}/config.json", tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    for model in ("empty", "pickled"):
        err = refused(tmp_path, capsys, command, data, policy, "--model", tmp_path / model)
        assert f"{tmp_path}/{model}: not a model folder: config.json or *.safetensors is missing\n" in err
    for model in ("data.jsonl", "absent"):
        err = refused(tmp_path, capsys, command, data, policy, "--model", tmp_path / model)
        assert f"{tmp_path}/{model}: " in err
    err = refused(tmp_path, capsys, command, data, policy, "--model", "")
    assert "--model is empty: expected a model folder, or OWNER/NAME on the hub" in err


@pytest.mark.parametrize("command", ["generate", "logp", "train_dpo"])
def test_a_tokenizer_without_chat_template(tmp_path, capsys, policy, command):
    model = make_policy(tmp_path / "model", template=None)
    data = write_rows(tmp_path / "data.jsonl", good_rows("score" if command == "logp" else command))
    err = refused(tmp_path, capsys, command, data, policy, "--model", model)
    assert f"{model}: no chat template; save one in the model folder as chat_template.jinja" in err


def test_a_reward_model_without_chat_template(tmp_path, capsys, policy):
    from transformers import AutoModelForSequenceClassification

    model = make_policy(tmp_path / "model", template=None)
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(model)
    data = write_rows(tmp_path / "data.jsonl", good_rows("score"))
    err = refused(tmp_path, capsys, "rm", data, policy, "--model", model)
    assert "the tokenizer has no chat template and no separator for pairs of texts" in err


# ----- outputs
@pytest.mark.parametrize("command", QUICK)
@pytest.mark.parametrize(
    "name",
    [
        "data.jsonl",  # the input
        "../{folder}/./data.jsonl",  # by another path
        "data.json",  # data.meta.json would be the record of this output
        "data.meta.json",  # the record of the input
        "link.jsonl",  # a link to the input
        "link of a link.jsonl",
        "linked folder/data.jsonl",
        "linked.jsonl",  # its record, linked.meta.json, is a link to the input
        "to the record.jsonl",  # a link to the record of the input
    ],
)
def test_an_output_that_would_replace_an_input(tmp_path, capsys, policy, command, name):
    data = write_rows(tmp_path / "data.jsonl", good_rows(command))
    (tmp_path / "data.meta.json").write_text('{"argv": ["score.py"]}')
    (tmp_path / "link.jsonl").symlink_to(data)
    (tmp_path / "link of a link.jsonl").symlink_to("link.jsonl")
    (tmp_path / "linked folder").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "linked.meta.json").symlink_to("data.jsonl")
    (tmp_path / "to the record.jsonl").symlink_to("data.meta.json")
    out = f"{tmp_path}/{name.format(folder=tmp_path.name)}"
    before = (tmp_path / "data.jsonl").read_bytes()
    err = refused(tmp_path, capsys, command, data, policy, out=out)
    assert f"--out {out}: " in err and "this would overwrite an input file or its record" in err
    assert (tmp_path / "data.jsonl").read_bytes() == before != b""
    if os.path.realpath(out) == os.path.realpath(data):
        # and where the input is given as a link
        err = refused(tmp_path, capsys, command, tmp_path / "link of a link.jsonl", policy, out=out)
        assert "this would overwrite an input file or its record" in err


@pytest.mark.parametrize("command", QUICK)
@pytest.mark.parametrize("name", ["out.json.tmp", "out.meta.json.tmp"])
def test_an_input_with_the_name_of_a_part_of_the_output(tmp_path, capsys, policy, command, name):
    """The outputs are written beside and renamed; what is written beside must be no input."""
    data = write_rows(tmp_path / name, good_rows(command))
    before = contents(tmp_path)
    try:
        start(command, data, tmp_path / "out.json", policy)
        capsys.readouterr()
    except SystemExit as end:
        assert end.code == 2 and "out.json" in capsys.readouterr().err
    assert {path: contents(tmp_path).get(path) for path in before} == before


@pytest.mark.parametrize("command", QUICK)
@pytest.mark.parametrize("name", ["folder", "folder/", "folder.jsonl", "file/below.json", "pipe", "", "."])
def test_an_output_that_cannot_be_written(tmp_path, capsys, policy, monkeypatch, command, name):
    data = write_rows(tmp_path / "data.jsonl", good_rows(command))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "file").write_text("a file where a folder is needed")
    os.mkfifo(tmp_path / "pipe")  # no file, like /dev/null, which a rename would replace
    monkeypatch.chdir(tmp_path)
    err = refused(tmp_path, capsys, command, data, policy, out=name)
    assert f"--out {name}: " in err or f" {name} cannot be written: " in err


@pytest.mark.parametrize("name", ["file", "file/below", "blocked"])
def test_a_folder_that_cannot_be_written(tmp_path, capsys, policy, name):
    data = write_rows(tmp_path / "data.jsonl", good_rows("train_dpo"))
    (tmp_path / "file").write_text("a file where a folder is needed")
    (tmp_path / "blocked" / "metrics.jsonl").mkdir(parents=True)
    out = tmp_path / name
    err = refused(tmp_path, capsys, "train_dpo", data, policy, out=out)
    assert f"--out {out}" in err


@pytest.mark.parametrize("command", QUICK)
def test_a_record_that_cannot_be_written(tmp_path, capsys, policy, command):
    data = write_rows(tmp_path / "data.jsonl", good_rows(command))
    (tmp_path / "result.meta.json").mkdir()  # what stands in its way is no file
    out = tmp_path / "result.jsonl"
    out.write_text("the output of before")
    err = refused(tmp_path, capsys, command, data, policy, out=out)
    assert "result.meta.json" in err and out.read_text() == "the output of before"


@pytest.mark.parametrize(
    "command, flag, value",
    [("build_pairs", "--truncated", "keep"), ("boundary", "--tie", "half"), ("winrate", "--model", "off")],
)
def test_an_output_of_another_run_is_replaced(tmp_path, capsys, policy, command, flag, value):
    """A quick stage just writes: over another run's output, over what a killed run left, through no link."""
    rows = good_rows(command)
    for row in rows:
        cut = {
            "text": "cut",
            "source": "on",
            "model": "on",
            "finish": "length",
            "reward": 1.5,
        }  # ties with fine
        row["responses"].append(cut)
    data, out = write_rows(tmp_path / "data.jsonl", rows), tmp_path / "out" / "out.jsonl"
    record, keep = tmp_path / "out" / "out.meta.json", tmp_path / "keep.jsonl"

    def result():
        """The output and what the record has of the arguments; whatever else is there must not be."""
        capsys.readouterr()
        assert sorted(path.name for path in out.parent.iterdir()) == ["out.jsonl", "out.meta.json"]
        meta = json.loads(record.read_text())
        return out.read_text(), {key: meta[key] for key in ("args", "inputs", "counts")}

    flags = ["--on-ratio", 1] if command == "build_pairs" else []
    start(command, data, out, policy, *flags)
    first = result()
    start(command, data, out, policy, *flags, flag, value)
    second = result()
    assert second[1]["args"][flag[2:]] == value and second != first
    # killed between the pairs and their record: the new output stands beside the old record, or beside none
    out.write_text(first[0])
    (tmp_path / "out" / "out.jsonl.tmp").write_text("half of an out")
    (tmp_path / "out" / "out.meta.json.tmp").write_text('{"argv": [')
    start(command, data, out, policy, *flags, flag, value)
    assert result() == second
    record.unlink()
    start(command, data, out, policy, *flags, flag, value)
    assert result() == second
    record.write_text('{"torn')
    start(command, data, out, policy, *flags, flag, value)
    assert result() == second
    # a link to a file that is no input is replaced, and the file it leads to is left
    keep.write_text("keep me")
    out.unlink()
    out.symlink_to(keep)
    start(command, data, out, policy, *flags, flag, value)
    assert result() == second and not out.is_symlink() and keep.read_text() == "keep me"


@pytest.mark.parametrize(
    "command, flag, value, difference",
    [
        ("generate", "--temperature", "0.9", "temperature = 0.7, not 0.9"),
        ("score", "--name", "x", "name = None, not 'x'"),
    ],
)
def test_an_output_of_another_run_is_refused(tmp_path, capsys, policy, command, flag, value, difference):
    data, out = write_rows(tmp_path / "data.jsonl", good_rows(command)), tmp_path / "out" / "out.jsonl"
    start(command, data, out, policy)
    before = contents(out.parent)
    capsys.readouterr()
    err = refused(tmp_path, capsys, command, data, policy, flag, value)
    over = "; use another --out, or --overwrite to start over\n"
    assert f"--out {out} was written with {difference}{over}" in err
    # another input under the same name, and then a file that no meta file explains
    rows = good_rows(command)
    write_rows(data, [*rows[:3], {**rows[3], "note": "changed"}])
    err = refused(tmp_path, capsys, command, data, policy)
    assert f"--out {out} was written with {data} = " in err and contents(out.parent) == before
    (tmp_path / "out" / "out.meta.json").unlink()
    err = refused(tmp_path, capsys, command, data, policy)
    record = f"{out.with_suffix('')}.meta.json"
    assert f"--out {out} exists but its record {record} is missing or damaged{over}" in err


def test_as_a_user_sees_it(tmp_path):
    """Once in a process of its own: the script's name, the sentence, no traceback, status 2."""
    (tmp_path / "data.jsonl").write_text('{"id": "a", "prompt": "b", "responses": []}\n{"id"\n')
    flags = "--scored", "data.jsonl", "--out", "pairs.jsonl"
    _, err = run_script("build_pairs.py", *flags, cwd=tmp_path, expect=2)
    assert err.startswith("build_pairs.py: data.jsonl:2: ") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
