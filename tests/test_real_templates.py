"""
Real chat templates with real tokenizers: every combination gives the ids that were meant, or a sentence.

Covers  trl's templates with the tokenizers of real_models.py: prompt and response decode to what the template
        renders, end after the token that a table names, and agree with sampled ids from the first token on;
        logp and train_dpo.py read the same ids; combinations that are refused, by name; folders whose
        tokenizer class is not that of their tokenizer.json; whole runs, whose log-probabilities agree
Run     PYTHONPATH=DIR REAL_TOKENIZERS=DIR2 python -m pytest tests/test_real_templates.py
        DIR and DIR2 are those of real_models.py; what is not there is skipped
"""

import json
from collections import Counter
from datetime import datetime

import pytest
import torch
from conftest import read_rows, run_script, write_rows
from real_models import MARKER, TEXT_MARKER, find_tokenizers, make_model, read_templates, with_template
from tokenizers import Tokenizer
from train_oracle import parse
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import scorers.logp as logp
import train_dpo
from chat import chat_of, measured, prompt_ids, read_chat, response_ids
from loading import load_tokenizer

TEMPLATES, TOKENIZERS = read_templates(), find_tokenizers()
pytestmark = pytest.mark.skipif(
    not (TEMPLATES and TOKENIZERS), reason="needs trl's templates and a tokenizer"
)

DAY = "2026-11-30"
SYSTEM, QUESTION = "Answer in one  sentence, é.", "Why is the sky blue?\n\n1. In 2024\n2. naïve"
SHORT, AGAIN = "Because of Rayleigh scattering.", "And at night?"
ANSWERS = ["The Arrow of  time: 12 cafés,\n\n- one\n- two.", "(a) lower", "  \n spaces around \n"]
THOUGHT = "<think>\nFirst, a premise.\n</think>\n\nThen the answer."


def turns(*contents, roles=("user", "assistant", "user", "assistant")):
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


CHATS = {
    "one turn": turns(QUESTION),
    "system": turns(SYSTEM, QUESTION, roles=("system", "user")),
    "three turns": turns(QUESTION, SHORT, AGAIN),
}

# what ends an answer, by the longest beginning of a template's name
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "<|user|>",  # which opens the next turn: nothing closes an answer
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    "nemotron": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
}
PARTS = "idefics3", "smolvlm", "llava_next"  # contents are lists of parts
THINKS = "deepseek"  # a response begins in a think block, an answer has none, and no switch closes it


class Zoo:
    """A tokenizer as a model folder, with all markers of all templates; its templates change."""

    def __init__(self, name, folder):
        markers = {
            m for text in TEMPLATES.values() for kind in (MARKER, TEXT_MARKER) for m in kind.findall(text)
        }
        self.name, self.folder = name, make_model(folder, *TOKENIZERS[name](), sorted(markers))
        self.inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer, self.config = load_tokenizer(str(folder))
        self.plain = AutoTokenizer.from_pretrained(folder)  # whose template no code of ours sees

    def chat(self, template, **switches):
        self.tokenizer.chat_template = TEMPLATES[template]
        return measured(chat_of(self.tokenizer, self.config, switches, DAY))

    def encode(self, text):
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.inner.decode(ids, skip_special_tokens=False)

    def render(self, template, messages, generation=False, **switches):
        """What transformers renders, given what this template wants."""
        family = template.removesuffix("_training")
        if family == "gemma" and messages[0]["role"] == "system":
            system, first, *others = (turn["content"] for turn in messages)
            messages = turns(f"{system}\n\n{first}", *others)
        if family in PARTS:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        options = {"chat_template": TEMPLATES[template], "add_generation_prompt": generation, **switches}
        options["strftime_now"] = datetime.fromisoformat(DAY).strftime
        return self.plain.apply_chat_template(messages, tokenize=False, **options)


@pytest.fixture(scope="module", params=TOKENIZERS)
def zoo(request, tmp_path_factory):
    return Zoo(request.param, tmp_path_factory.mktemp(request.param))


def end_of(template):
    return ENDS[max((name for name in ENDS if template.startswith(name)), key=len)]


def refusal(zoo, template):
    """The sentence with which this combination is refused, None if it is not."""
    if template.startswith("lfm2") and zoo.plain.bos_token == "<|im_start|>":
        return "two tokens that begin a text"
    if zoo.plain.bos_token is None and template == "llama3":
        return "'bos_token' is undefined"  # the template adds it to a text
    return None


def response(zoo, chat, text, prompt, **details):
    """(ids of the prompt, ids of the response) of a text after this prompt, and what was counted."""
    counts = Counter()
    (pair,) = response_ids(chat, [prompt], [{"text": text, "finish": "stop", **details}], counts)
    return pair, counts


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_what_the_template_renders(zoo, template, capsys):
    sentence = refusal(zoo, template)
    if sentence:
        with pytest.raises(SystemExit, match="2"):
            zoo.chat(template)
        assert sentence in capsys.readouterr().err
        return
    chat, end = zoo.chat(template), zoo.inner.token_to_id(end_of(template))
    assert chat.end_id == end
    for messages in CHATS.values():
        (prompt,), problems = prompt_ids(chat, [{"prompt": messages}], Counter())
        assert not problems
        assert prompt == zoo.encode(zoo.render(template, messages, generation=True))
        for text in ANSWERS:
            check_answer(zoo, template, chat, messages, prompt, text, capsys)


def check_answer(zoo, template, chat, messages, prompt, text, capsys):
    """One answer after one prompt, as text and as ids that were sampled."""
    if template.startswith(THINKS):
        with pytest.raises(SystemExit, match="2"):
            response(zoo, chat, text, prompt)
        assert "without reasoning would" in capsys.readouterr().err
        return
    whole = zoo.encode(zoo.render(template, messages + turns("", text)[1:]))
    (before, ids), counts = response(zoo, chat, text, prompt)
    assert ids[-1] == chat.end_id
    (_, cut), _ = response(zoo, chat, text, prompt, finish="length")
    assert cut == ids[:-1]
    words = [word for turn in messages for word in turn["content"].split()] + text.split()
    decoded, rendered = zoo.decode(before + cut), zoo.decode(whole)
    assert all(word in decoded for word in words)
    assert rendered.startswith(decoded)
    if not template.startswith("glm4moe"):
        assert rendered.removeprefix(decoded).lstrip().startswith(end_of(template))
    if not counts["responses_tokenized_without_header"]:
        assert before + cut == whole[: len(before + cut)]
    if whole[: len(before)] == before:
        sampled = whole[len(before) : len(before + cut)]
        assert sampled[0] == cut[0]
        details = {"token_ids": sampled, "tokenizer": chat.fingerprint}
        assert response(zoo, chat, "not read", prompt, **details)[0] == (prompt, [*sampled, chat.end_id])


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_response_with_reasoning_holds_what_was_given_and_nothing_else(zoo, template):
    if refusal(zoo, template) or template.startswith(THINKS):
        return
    chat = zoo.chat(template)
    (prompt,), _ = prompt_ids(chat, [{"prompt": CHATS["one turn"]}], Counter())
    for text in (THOUGHT, THOUGHT.removeprefix("<think>\n")):
        pair, _ = response(zoo, chat, text, prompt)
        if pair is None:  # the template loses it
            continue
        decoded = zoo.decode(pair[0] + pair[1])
        assert "First, a premise." in decoded and decoded.count("Then the answer.") == 1
        assert decoded.count("blue?") == 1
        assert not any(word in decoded for word in ("Vebmy", "Zuvqo", "Kwimab"))  # chat.py's own


VALUES = {"enable_thinking": (False, True), "reasoning_effort": ("low",)}
SWITCHES = [
    (template, {name: value})
    for template, text in TEMPLATES.items()
    for name, values in VALUES.items()
    for value in values
    if name in text
]


@pytest.mark.parametrize("template, switches", SWITCHES, ids=str)
def test_prompts_that_a_switch_rendered_need_no_switch_later(zoo, template, switches, capsys):
    if refusal(zoo, template):
        return
    messages, text = CHATS["system"], ANSWERS[0]
    (prompt,), _ = prompt_ids(zoo.chat(template, **switches), [{"prompt": messages}], Counter())
    chat = zoo.chat(template)
    row = {"prompt": messages, "prompt_token_ids": prompt, "prompt_tokenizer": chat.template}
    assert prompt_ids(chat, [row], Counter()) == ([prompt], {})
    whole = zoo.decode(zoo.encode(zoo.render(template, messages + turns("", text)[1:], **switches)))
    try:
        before, ids = response(zoo, chat, text, prompt)[0]
    except SystemExit:
        assert "without reasoning would" in capsys.readouterr().err
    else:
        assert whole.startswith(zoo.decode(before + ids[:-1]))


@pytest.mark.parametrize("template", TEMPLATES)
def test_logp_and_training_read_the_same_ids(zoo, template, tmp_path):
    if refusal(zoo, template) or template.startswith(THINKS):
        return
    chat = zoo.chat(template)
    messages, (text, other, _) = CHATS["three turns"], ANSWERS
    (prompt,), _ = prompt_ids(chat, [{"prompt": messages}], Counter())
    sampled = {"token_ids": zoo.encode(other), "tokenizer": chat.fingerprint}
    responses = [{"text": text}, {"text": other, "finish": "length", **sampled}]
    row = {"id": "0", "prompt": messages, "responses": responses}
    _, pairs = logp.tokenized(chat, [row], Counter())
    pair = {"prompt": messages, "chosen": text, "rejected": other, "rejected_finish": "length"}
    pair |= {f"rejected_{key}": value for key, value in sampled.items()}
    args = parse("--model", zoo.folder, "--pairs", write_rows(tmp_path / "pairs", [pair]), "--out", tmp_path)
    ((read,), _) = train_dpo.load_pairs(args.pairs, chat, zoo.config, args)
    assert [(list(s.ids), s.start) for s in read.sequences] == [(ids + more, len(ids)) for ids, more in pairs]
    assert pairs[1] == (prompt, sampled["token_ids"])


# ----- folders
CLASSES = [
    {"tokenizer_class": "LlamaTokenizer", "legacy": True},
    {"tokenizer_class": "LlamaTokenizerFast"},
    {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False},
    {"tokenizer_class": "GPT2Tokenizer"},
    {"tokenizer_class": "Qwen2Tokenizer"},
    {},
]


@pytest.mark.parametrize("changes", CLASSES, ids=str)
def test_a_folder_is_read_as_its_tokenizer_json_whatever_its_class(zoo, tmp_path, changes):
    folder = with_template(zoo.folder, TEMPLATES["qwen2_5"], tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    tokenizer, _ = load_tokenizer(str(folder))
    text = (
        "It's  a café\n\nThe\n<|im_end|>\nuser\n\nHi 2024<|im_end|> b<|im_end|>  c<|im_start|>assistant\n x"
    )
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == zoo.encode(text)


def test_read_chat_from_a_folder(zoo, tmp_path):
    chat, config = read_chat(str(with_template(zoo.folder, TEMPLATES["qwen3"], tmp_path / "m")), day=DAY)
    assert chat.end_id == zoo.inner.token_to_id("<|im_end|>")
    assert config.vocab_size == AutoConfig.from_pretrained(zoo.folder).vocab_size == chat.vocabulary
    assert chat.answer.endswith("assistant\n<think>\n\n</think>\n\n")


# ----- whole runs
def test_a_response_has_one_log_probability_in_logp_and_training(zoo, tmp_path):
    """Sampled by generate.py and imported as text, with another template for every tokenizer."""
    templates = "gemma3", "qwen3_5_think", "gptoss", "qwen3", "llama3"
    template = templates[list(TOKENIZERS).index(zoo.name) % len(templates)]
    model = with_template(zoo.folder, TEMPLATES[template], tmp_path / "model")
    prompts = write_rows(tmp_path / "p.jsonl", [{"id": "0", "prompt": CHATS["one turn"]}])
    flags = ["--model", model, "--prompts", prompts, "--n", 1, "--max-tokens", 12, "--dtype", "float32"]
    run_script("generate.py", *flags, "--backend", "hf", "--out", tmp_path / "on.jsonl")
    (row,) = read_rows(tmp_path / "on.jsonl")
    texts = [{"text": text, "source": "off", "model": "w", "finish": "stop"} for text in ANSWERS[:2]]
    row["responses"] += texts
    rows = write_rows(tmp_path / "r.jsonl", [row])
    flags = ["--model", model, "--responses", rows, "--dtype", "float32", "--out", tmp_path / "l.jsonl"]
    run_script("scorers/logp.py", *flags)
    sampled, *others = read_rows(tmp_path / "l.jsonl")[0]["responses"]
    pairs = []
    for i, other in enumerate(others):
        pair = {
            "pair_id": str(i),
            "prompt": row["prompt"],
            "chosen": sampled["text"] or ".",
            "rejected": other["text"],
        }
        pair |= {key: row[key] for key in ("prompt_token_ids", "prompt_tokenizer")}
        pair |= {f"chosen_{key}": sampled[key] for key in ("finish", "token_ids", "tokenizer")}
        pairs.append(pair)
    flags = ["--model", model, "--pairs", write_rows(tmp_path / "pairs.jsonl", pairs), "--dtype", "float32"]
    run_script("train_dpo.py", *flags, "--batch-size", 2, "--out", tmp_path / "out")
    (cache,) = (tmp_path / "reference_cache").glob("*.jsonl")
    found = sorted(entry["logp"] for entry in read_rows(cache))
    assert found == pytest.approx(sorted(one["logp"] for one in [sampled, *others]), rel=1e-5)
    chat = zoo.chat(template)
    for one in [sampled, *others]:
        ((before, ids),) = response_ids(chat, [row["prompt_token_ids"]], [one], Counter())
        assert one["logp"] == pytest.approx(float64_logp(model, before, ids), rel=1e-5)


def float64_logp(model, before, ids):
    """log pi of ids after `before`, from the model's own logits."""
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()
