"""
Bad input gets one sentence with file and line and exit status 2, and nothing is written (DESIGN.md, rule 3).

Covers  torn lines, missing keys, prompts that end with no user turn, empty and missing files, ids that stand twice,
        rewards that are no numbers, folders that are no models, tokenizers without a chat template, an --out of another
        run. What only one script can meet (a ratio, a total, a missing head ...) is tested beside that script.
Run     python -m pytest tests/test_bad_input.py
"""

import importlib
import json
import shutil

import pytest
from conftest import make_policy, run_script, write_rows

# data-reading commands that need no training
DATA = ["generate", "import", "score", "build_pairs", "boundary", "winrate"]
PROMPT = [{"role": "user", "content": "hi"}]


def good_rows(command):
    if command == "train_dpo":
        return [{"pair_id": f"p{k}", "prompt": PROMPT, "chosen": [{"role": "assistant", "content": f"good {k}"}],
                 "rejected": [{"role": "assistant", "content": "bad"}]} for k in range(4)]
    if command == "generate":
        return [{"id": f"p{k}", "prompt": f"question {k}"} for k in range(4)]
    if command == "import":
        return [{"id": f"p{k}", "prompt": f"question {k}", "response": "text"} for k in range(4)]
    sides = [("good", "on", 2.0), ("bad", "on", 1.0), ("fine", "off", 1.5), ("poor", "off", 0.5)]
    return [{"id": f"p{k}", "prompt": f"question {k}", "answer": "1", "responses": [
        {"text": text, "source": source, "model": source, "finish": "stop"}
        | ({} if command == "score" else {"reward": reward})
        for text, source, reward in sides]} for k in range(4)]


def flags_of(command, data, out, model):
    return {"generate": ["--model", model, "--prompts", data, "--out", out, "--backend", "hf", "--n", "1",
                         "--max-tokens", "4"],
            "import": ["--import-format", "rows", "--import-data", data, "--out", out],
            "score": ["--scorer", "verify", "--responses", data, "--out", out],
            "build_pairs": ["--scored", data, "--out", out], "boundary": ["--scored", data, "--out", out],
            "winrate": ["winrate", "--scored", data, "--model", "on", "--baseline", "off", "--out", out],
            "train_dpo": ["--model", model, "--pairs", data, "--out", out]}[command]


def script_of(command):
    return importlib.import_module({"import": "generate", "winrate": "evaluate"}.get(command, command))


def start(command, data, out, model, *more):
    script = script_of(command)
    script.main(script.parse_args([*flags_of(command, str(data), str(out), str(model)), *more]))


def refused(tmp_path, capsys, command, data, model, *more):
    """The sentence of a run that must be refused: one line on standard error, status 2, and no new file."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_status:
        start(command, data, tmp_path / "out" / "out.jsonl", model, *more)
    printed = capsys.readouterr()
    assert exit_status.value.code == 2 and printed.out == ""
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err, printed.err
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.name != "out"] == []
    return printed.err


def test_the_good_rows_are_good(tmp_path, capsys, policy):
    for command in DATA:  # or else the refusals below could have another reason
        start(command, write_rows(tmp_path / f"{command}.jsonl", good_rows(command)), tmp_path / f"{command}.out.jsonl",
              policy)
        assert json.loads(capsys.readouterr().out.splitlines()[-1]), command


@pytest.mark.parametrize("command", [*DATA, "train_dpo"])
@pytest.mark.parametrize("line", ['{"id": "p2", "prompt": "torn', "[1, 2]", "", "null"],
                         ids=["torn", "list", "blank", "null"])
def test_a_line_that_is_no_object(tmp_path, capsys, policy, command, line):
    lines = [json.dumps(row) for row in good_rows(command)]
    lines[2] = line
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    err = refused(tmp_path, capsys, command, tmp_path / "data.jsonl", policy)
    assert f"{tmp_path}/data.jsonl:3: expected a JSON object, found" in err


@pytest.mark.parametrize("command", [*DATA, "train_dpo"])
def test_bytes_that_are_no_text(tmp_path, capsys, policy, command):
    write_rows(tmp_path / "data.jsonl", good_rows(command))
    with open(tmp_path / "data.jsonl", "ab") as file:
        file.write(b'{"id": "\xff\xfe"}\n')
    assert "data.jsonl:5: expected a JSON object" in refused(tmp_path, capsys, command, tmp_path / "data.jsonl", policy)


@pytest.mark.parametrize("command, key", [
    ("generate", "prompt"), ("import", "prompt"), ("score", "responses"), ("score", "prompt"), ("score", "id"),
    ("build_pairs", "responses"), ("build_pairs", "id"), ("boundary", "prompt"), ("boundary", "responses"),
    ("winrate", "responses"), ("winrate", "id"), ("train_dpo", "prompt"), ("train_dpo", "chosen"),
    ("train_dpo", "rejected")])
def test_a_missing_key(tmp_path, capsys, policy, command, key):
    rows = good_rows(command)
    del rows[1][key]
    err = refused(tmp_path, capsys, command, write_rows(tmp_path / "data.jsonl", rows), policy)
    assert f"data.jsonl:2: expected the key {key!r}, found " in err


@pytest.mark.parametrize("command", [*DATA, "train_dpo"])
@pytest.mark.parametrize("prompt, sentence", [
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
     "expected a prompt that ends with a user turn"),
    ([], "expected the prompt to be text or messages"), (7, "expected the prompt to be text or messages"),
    ([{"role": "user"}], "expected the prompt to be text or messages"),
    (["a"], "expected the prompt to be text or messages")],
    ids=["assistant last", "no turn", "a number", "no content", "no messages"])
def test_a_prompt_that_is_none(tmp_path, capsys, policy, command, prompt, sentence):
    rows = good_rows(command)
    rows[3]["prompt"] = prompt
    assert f"data.jsonl:4: {sentence}" in refused(tmp_path, capsys, command, write_rows(tmp_path / "data.jsonl", rows),
                                                  policy)


@pytest.mark.parametrize("command", [*DATA, "train_dpo"])
def test_an_empty_file_and_none(tmp_path, capsys, policy, command):
    (tmp_path / "data.jsonl").touch()
    assert f"{tmp_path}/data.jsonl: expected JSON lines, found an empty file" in refused(
        tmp_path, capsys, command, tmp_path / "data.jsonl", policy)
    assert "absent.jsonl: expected JSON lines, found no such file" in refused(tmp_path, capsys, command,
                                                                              tmp_path / "absent.jsonl", policy)


@pytest.mark.parametrize("command", ["generate", "score", "build_pairs", "boundary", "winrate", "train_dpo"])
def test_an_id_that_stands_twice(tmp_path, capsys, policy, command):
    rows = good_rows(command)
    key = "pair_id" if command == "train_dpo" else "id"
    rows[2][key] = "p0"
    err = refused(tmp_path, capsys, command, write_rows(tmp_path / "data.jsonl", rows), policy)
    assert f"data.jsonl:3: the {key} p0 stands twice in the file" in err


@pytest.mark.parametrize("command", ["score", "build_pairs", "boundary", "winrate"])
@pytest.mark.parametrize("responses",
                         ["text", [{"text": 1, "source": "on"}], [{"source": "on"}], [{"text": "a", "source": "own"}],
                          ["a"]],
                         ids=["text", "number", "no text", "source", "strings"])
def test_responses_that_are_none(tmp_path, capsys, policy, command, responses):
    rows = good_rows(command)
    rows[1]["responses"] = responses
    assert 'data.jsonl:2: expected "responses" to be a list of' in refused(
        tmp_path, capsys, command, write_rows(tmp_path / "data.jsonl", rows), policy)


@pytest.mark.parametrize("command", ["build_pairs", "boundary", "winrate"])
@pytest.mark.parametrize("reward", [float("nan"), float("-inf"), "1.5", True, "no key"], ids=str)
def test_rewards_that_are_no_numbers(tmp_path, capsys, policy, command, reward):
    rows = good_rows(command)
    rows[2]["responses"][1]["reward"] = reward
    if reward == "no key":
        del rows[2]["responses"][1]["reward"]
    err = refused(tmp_path, capsys, command, write_rows(tmp_path / "data.jsonl", rows), policy)
    assert "data.jsonl:3: expected" in err and "reward" in err


@pytest.mark.parametrize("command", ["build_pairs", "boundary", "winrate"])
def test_files_without_any_reward(tmp_path, capsys, policy, command):
    rows = good_rows(command)
    for row in rows:
        for response in row["responses"]:
            response["reward"] = None
    assert "data.jsonl: no response has a reward" in refused(tmp_path, capsys, command,
                                                             write_rows(tmp_path / "data.jsonl", rows), policy)


@pytest.mark.parametrize("command", ["boundary", "winrate"])
def test_wins_of_another_shape(tmp_path, capsys, policy, command):
    rows = good_rows(command)
    for row in rows:
        row["wins"] = [[None, 1, 1, 1], [0, None, 1, 1], [0, 0, None, 1], [0, 0, 0, None]]
    rows[1]["wins"] = [[None, 1], [0, None]]
    assert "data.jsonl:2: expected" in refused(tmp_path, capsys, command, write_rows(tmp_path / "data.jsonl", rows),
                                               policy)


@pytest.mark.parametrize("command", ["generate", "score", "train_dpo"])
def test_a_folder_that_is_no_model(tmp_path, capsys, policy, command):
    data = write_rows(tmp_path / "data.jsonl", good_rows(command))
    more = ["--scorer", "logp", "--model"] if command == "score" else ["--model"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()  # a model, but not in safetensors
    shutil.copy(f"{policy}/config.json", tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    for model, sentence in (("empty",
                             "expected a Hugging Face model folder, found no config.json with *.safetensors in it"),
                            ("pickled",
                             "expected a Hugging Face model folder, found no config.json with *.safetensors in it"),
                            ("data.jsonl", "expected a Hugging Face model folder or a hub id, found a file"),
                            ("absent", "expected a Hugging Face model folder or a hub id, found nothing")):
        err = refused(tmp_path, capsys, command, data, policy, *more, str(tmp_path / model))
        assert f"{tmp_path}/{model}: {sentence}" in err


@pytest.mark.parametrize("command", ["generate", "score", "train_dpo"])
def test_a_tokenizer_without_chat_template(tmp_path, capsys, policy, command):
    model = make_policy(tmp_path / "model", template=None)
    data = write_rows(tmp_path / "data.jsonl", good_rows(command))
    more = ["--scorer", "logp", "--model"] if command == "score" else ["--model"]
    err = refused(tmp_path, capsys, command, data, policy, *more, model)
    assert f"{model}: the tokenizer has no chat template" in err
    if command == "score":
        from transformers import AutoModelForSequenceClassification
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(model)
        err = refused(tmp_path, capsys, command, data, policy, "--scorer", "rm", "--model", model)
        assert "the tokenizer has neither a chat template nor a separator for pairs of texts" in err


def test_an_empty_response_in_a_pair(tmp_path, capsys, policy):
    rows = good_rows("train_dpo")
    rows[1]["rejected"][0]["content"] = " \n"
    assert "data.jsonl:2: the rejected response is empty" in refused(
        tmp_path, capsys, "train_dpo", write_rows(tmp_path / "data.jsonl", rows), policy)


def test_a_pair_that_is_none(tmp_path, capsys, policy):
    for chosen, sentence in (([], "expected chosen to be text or messages that end with the assistant's"),
                             ([{"role": "user", "content": "a"}],
                              "expected chosen to be text or messages that end with the assistant's"),
                             ([{"role": "user", "content": "another"}, {"role": "assistant", "content": "a"}],
                              "chosen and rejected answer different prompts")):
        rows = good_rows("train_dpo")
        rows[0]["chosen"] = chosen
        assert f"data.jsonl:1: {sentence}" in refused(tmp_path, capsys, "train_dpo",
                                                      write_rows(tmp_path / "data.jsonl", rows), policy)


@pytest.mark.parametrize("command, difference", [
    ("generate", ("--temperature", "0.9", "temperature was 0.7 and is 0.9")),
    ("import", ("--source", "on", "source was 'off' and is 'on'")),
    ("score", ("--name", "x", "name was 'verify' and is 'x'")),
    ("build_pairs", ("--truncated", "keep", "truncated was 'drop' and is 'keep'")),
    ("boundary", ("--tie", "half", "tie was 'off' and is 'half'")),
    ("winrate", ("--model", "off", "model was 'on' and is 'off'"))])
def test_an_output_of_another_run(tmp_path, capsys, policy, command, difference):
    data, out = write_rows(tmp_path / "data.jsonl", good_rows(command)), tmp_path / "out" / "out.jsonl"
    start(command, data, out, policy)
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    capsys.readouterr()
    err = refused(tmp_path, capsys, command, data, policy, *difference[:2])
    assert f"{out}: belongs to a run with other args: {difference[2]}; --overwrite starts anew" in err
    # another input under the same name, and then a file that no meta file explains
    rows = good_rows(command)
    write_rows(data, [*rows[:3], {**rows[3], "note": "changed"}])
    assert "belongs to a run with other inputs" in refused(tmp_path, capsys, command, data, policy)
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before
    (tmp_path / "out" / "out.meta.json").unlink()
    assert f"{out}: exists, and no out.meta.json says what made it; --overwrite starts anew" in refused(
        tmp_path, capsys, command, data, policy)


def test_as_a_user_sees_it(tmp_path):
    """Once in a process of its own: the script's name, the sentence, no traceback, status 2."""
    (tmp_path / "data.jsonl").write_text('{"id": "a", "prompt": "b", "responses": []}\n{"id"\n')
    _, err = run_script("build_pairs.py", "--scored", "data.jsonl", "--out", "pairs.jsonl", cwd=tmp_path, expect=2)
    assert err == "build_pairs.py: data.jsonl:2: expected a JSON object, found b'{\"id\"\\n'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
