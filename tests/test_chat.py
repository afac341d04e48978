"""
chat.py: what goes into a model is what its chat template renders, or a sentence says why not.

Covers  a zoo of chat templates, one for every habit that public ones have, over tokenizers of bytes and of
        SentencePiece's kind: ids against those of the whole conversation as transformers renders and
        tokenizes it, or the refusal by name; prompt ids that travel; responses as text, sampled, cut, of
        another tokenizer, with reasoning, with special tokens; answers after reasoning; the day of a run;
        a tokenizer that transformers changes.
Run     python -m pytest tests/test_chat.py
"""

import json
from collections import Counter
from datetime import date

import pytest
from conftest import CHATML, make_tokenizer
from models import tiny
from test_generate import with_template

from chat import answer, prompt_ids, read_chat, response_ids, sampled_ids
from loading import load_tokenizer, run_date

# what the templates below write; <think> and </think> are tokens, but not special ones, as in Qwen3
SPECIAL = "<s> </s> <|user|> <|system|> <|assistant|> <|end|> <|start|> <|channel|> <|message|>".split()
SPECIAL += "<|START_RESPONSE|> <|END_RESPONSE|> <|END_OF_TURN|>".split()
THINK = ["<think>", "</think>"]

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
BEGIN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OFF = "enable_thinking is defined and not enable_thinking"
RAISING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
DROPPING = TURNS.replace("messages %}", "messages if m.role != 'system' %}")
ALTERNATING = (
    "{% for m in messages if m.role != 'system' %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
PARTS = TURNS.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
PRINTING = TURNS.replace(
    "{{ m.content }}", "{{ raise_exception('a list') if m.content is string else m.content }}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"
)
# only an answer that ends the conversation has a think block
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set parts = m.content.split('</think>') %}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip() if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
)
EMPTY_BLOCK = "{{ '<think>\\n\\n</think>\\n\\n' }}"
QWEN3_BEGIN = BEGIN.replace("{% endif %}", "{% if " + OFF + " %}" + EMPTY_BLOCK + "{% endif %}{% endif %}")
OPEN_BEGIN = QWEN3_BEGIN.replace(
    "{% endif %}{% endif %}", "{% else %}{{ '<think>\\n' }}{% endif %}{% endif %}"
)
# as of DeepSeek-R1: the prompt opens a block, an answer is without one, and no switch
R1 = TURNS.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
R1_BEGIN = BEGIN.replace("{% endif %}", "<think>\n{% endif %}")
ALWAYS = TURNS + "{{ '<|im_start|>assistant\\n' }}"
SPACED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# as of gpt-oss: another token ends the last answer
CHANNEL = (
    "{% for m in messages %}<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>"
    "{{ m.content }}{{ '</s>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n"
TRIMMING = TURNS.replace("m.content", "m.content | trim")
TWO_ENDS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ '<|START_RESPONSE|>' if m.role == 'assistant' }}"
    "{{ m.content }}{{ '<|END_RESPONSE|>' if m.role == 'assistant' }}<|END_OF_TURN|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><|START_RESPONSE|>{% endif %}"
)
NO_END = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
NO_END += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
ONE_MORE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"
)
WORDS = "PROMPT and RESPONSE: " + TURNS.replace("{{ m.content }}", "RESPONSE PROMPT{{ m.content }}")
WORDS += BEGIN.replace("{% endif %}", "RESPONSE PROMPT{% endif %}")

CHAT = [
    {"role": "system", "content": "Be kind"},
    {"role": "user", "content": "The arrow"},
    {"role": "assistant", "content": "  The answer "},
    {"role": "user", "content": "The arrow: why?"},
]
FOLDED = [{"role": "user", "content": "Be kind\n\nThe arrow"}, *CHAT[2:]]
# name: (template, what stands in a conversation behind the first token that ends it)
RIGHT = {
    "plain": (TURNS + BEGIN, "\n"),
    "trimming": (TRIMMING + BEGIN, "\n"),
    "alternating": (ALTERNATING + TURNS + BEGIN, "\n"),
    "a channel": (CHANNEL, ""),
    "an empty think block": (QWEN3 + QWEN3_BEGIN, "\n"),
    "an open think block that an answer closes": (QWEN3 + OPEN_BEGIN, "\n"),
    "two ends": (TWO_ENDS, "<|END_OF_TURN|>"),
    "one more at the end": (ONE_MORE, "\n<|im_end|>"),
    "words": (WORDS, "\n"),
    "a system role that is rejected": (RAISING + TURNS + BEGIN, "\n"),
    "a system role that is dropped": (DROPPING + BEGIN, "\n"),
    "instructions": (INST, ""),
    "a header that is always there": (ALWAYS, "\n<|im_start|>assistant\n"),
    "an object that the template writes": ("A tool: {'type': 'function'}" + TURNS + BEGIN, "\n"),
    "a space before the answer": (SPACED, "\n"),
}


# ----- tokenizers
def sentencepiece_like(legacy):
    """Words with and without the space that SentencePiece opens a text with; bytes for the rest.

    legacy: a space opens whatever follows a special token, as in Mistral-7B-v0.1, else the text alone
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = "The arrow answer user assistant system kind why".split()
    vocabulary = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *map(chr, range(33, 127))]
    merges = []
    for word in words:
        for i in range(1, len(word)):
            merges.append((word[:i], word[i]))
        merges.append(("▁", word))
    merges = list(dict.fromkeys(merges))
    vocabulary = list(dict.fromkeys([*vocabulary, *map("".join, merges)]))
    model = models.BPE({piece: i for i, piece in enumerate(vocabulary)}, merges, byte_fallback=True)
    inner = Tokenizer(model)
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        inner.normalizer = normalizers.Sequence(steps)
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return inner


def make_model(folder, kind):
    """A random model with the special tokens that the templates need."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    inner = (
        make_tokenizer(folder).backend_tokenizer if kind == "bytes" else sentencepiece_like(kind == "legacy")
    )
    inner.add_tokens([AddedToken(word, normalized=False) for word in THINK])
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", *SPECIAL]
    inner.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **names)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return tiny(folder, tokenizer=tokenizer, hidden_size=16, intermediate_size=16)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    kinds = "bytes", "metaspace", "legacy"
    return {kind: make_model(tmp_path_factory.mktemp(kind), kind) for kind in kinds}


@pytest.fixture
def read(tmp_path, models):
    """A function that reads the Chat of a model with this template."""

    def read_with(template, kind="bytes", **options):
        folder = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        return read_chat(with_template(folder, models[kind], template), **options)[0]

    return read_with


def refusal(capsys, function, *args, **kwargs):
    """The sentence with which a call ends the run."""
    with pytest.raises(SystemExit) as end:
        function(*args, **kwargs)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    return err


def sequence(chat, messages, response, counts=None):
    """(ids of the prompt, ids of the response) of a row without ids."""
    counts = Counter() if counts is None else counts
    prompts, problems = prompt_ids(chat, [{"prompt": messages}], counts)
    assert not problems, problems
    return response_ids(chat, prompts, [response], counts)[0]


def oracle(chat, messages, **options):
    """Token ids of a conversation by transformers alone: rendered as a whole, tokenized as a whole."""
    return chat.tokenizer.apply_chat_template(messages, return_dict=False, **options)


def text_of(chat, ids):
    return chat.tokenizer.decode(ids)


# ----- the zoo: what is right
def folded(name):
    return FOLDED if name in ("instructions", *(name for name in RIGHT if "system" in name)) else CHAT


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "legacy"])
@pytest.mark.parametrize("name", RIGHT)
def test_a_text_has_the_ids_that_it_has_in_its_conversation(read, name, kind):
    template, tail = RIGHT[name]
    chat = read(template, kind)
    for text in ("The answer", "why\n\nThe answer?", "x"):
        prompt, ids = sequence(chat, CHAT, {"text": text, "finish": "stop"})
        whole = oracle(chat, [*folded(name), {"role": "assistant", "content": text}])
        n = len(prompt) + len(ids)
        assert prompt + ids == whole[:n] and text_of(chat, whole[n:]).replace(" ", "") == tail
        assert text_of(chat, ids[:-1]).strip(" ") == text
        # what is sampled follows the prompt for generation
        (prompt,), _ = prompt_ids(chat, [{"prompt": CHAT}], Counter())
        assert prompt == oracle(chat, folded(name), add_generation_prompt=True)


@pytest.mark.parametrize("kind", ["metaspace", "legacy"])
def test_the_first_token_of_a_text_is_that_of_a_sample(read, kind):
    """SentencePiece's kind: alone a text begins with the space that it does not have after a line break."""
    chat = read(TURNS + BEGIN, kind)
    vocabulary = chat.tokenizer.get_vocab()
    alone = chat.tokenizer("The answer", add_special_tokens=False)["input_ids"]
    _, ids = sequence(chat, CHAT, {"text": "The answer", "finish": "length"})
    assert alone == [vocabulary["▁The"], vocabulary["▁answer"]]
    assert ids == [vocabulary["The"], vocabulary["▁answer"]]
    # where a special token stands before it, a tokenizer of the first kind has such a space again
    chat = read(CHANNEL, kind)
    _, ids = sequence(chat, CHAT, {"text": "The answer", "finish": "length"})
    assert ids[0] == vocabulary["▁The" if kind == "legacy" else "The"]


def test_white_space_of_an_answer_is_the_templates(read):
    text = " The answer\n\n"
    for template, expected in ((TURNS, text), (TRIMMING, "The answer")):
        chat = read(template + BEGIN)
        _, ids = sequence(chat, CHAT, {"text": text, "finish": "stop"})
        assert text_of(chat, ids) == expected + "<|im_end|>"


def test_a_turn_without_an_end_ends_with_the_opener_of_the_next(read):
    chat = read(NO_END)
    prompt, ids = sequence(chat, CHAT, {"text": "The answer", "finish": "stop"})
    turns = [*CHAT, {"role": "assistant", "content": "The answer"}, {"role": "user", "content": ""}]
    assert prompt + ids == oracle(chat, turns)[:-1] and text_of(chat, ids) == "The answer<|user|>"


@pytest.mark.parametrize(
    "name, first",
    [("two ends", "<|END_RESPONSE|>"), ("one more at the end", "<|end|>"), ("instructions", "<|im_end|>")],
)
def test_the_first_token_that_ends_a_turn_ends_a_response(read, name, first):
    chat = read(RIGHT[name][0])
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_id) == first


@pytest.mark.parametrize("before", ["", RAISING])
def test_content_parts_are_given_where_only_these_are_rendered(read, before):
    chat, plain = read(before + PARTS + BEGIN), read(before + TURNS + BEGIN)
    for text in ("The answer", "x"):
        assert sequence(chat, CHAT, {"text": text}) == sequence(plain, CHAT, {"text": text})
    assert chat.parts and not plain.parts and chat.folds == plain.folds == (before != "")


def test_a_system_turn_that_gets_lost_opens_the_first_user_turn(read):
    chat = read(DROPPING + BEGIN)
    (prompt,), _ = prompt_ids(chat, [{"prompt": CHAT}], Counter())
    assert text_of(chat, prompt).startswith("<|im_start|>user\nBe kind\n\nThe arrow<|im_end|>")
    # a second system turn is nowhere to be seen, and the row is of no use
    lost = [CHAT[1], CHAT[2], {"role": "system", "content": "Be brief"}, CHAT[3]]
    prompts, problems = prompt_ids(chat, [{"prompt": lost}, {"prompt": CHAT}], Counter())
    assert problems == {0: "the chat template loses the system's 'Be brief'"} and prompts == [None, prompt]


def test_roles_that_are_rejected_make_a_row_unusable(read):
    chat = read(ALTERNATING + TURNS + BEGIN)
    rows = [{"prompt": CHAT[1:2]}, {"prompt": [CHAT[1], CHAT[3]]}, {"prompt": CHAT}]
    prompts, problems = prompt_ids(chat, rows, Counter())
    assert problems == {1: "the chat template rejects it: roles must alternate"}
    assert prompts[1] is None and text_of(chat, prompts[0]).startswith("<|im_start|>user\nThe arrow<")
    assert response_ids(chat, prompts, [{"text": "x", "token_ids": None}] * 3, Counter())[1] is None


def test_words_that_a_template_writes_itself_are_not_taken_for_a_turn(read):
    chat = read(WORDS)
    (prompt,), _ = prompt_ids(chat, [{"prompt": CHAT[1:2]}], Counter())
    assert text_of(chat, prompt).endswith(
        "RESPONSE PROMPTThe arrow<|im_end|>\n<|im_start|>assistant\nRESPONSE PROMPT"
    )
    # the turns are looked for in their order: a user's text that the system's has too is lost all the same
    losing = read(
        TURNS.replace("{{ m.content }}", "{{ m.content if m.role != 'user' or 'x' not in m.content }}")
        + BEGIN
    )
    row = {"prompt": [{"role": "system", "content": "all x"}, {"role": "user", "content": "x"}]}
    assert prompt_ids(losing, [row], Counter())[1] == {0: "the chat template loses the user's 'x'"}


def test_a_prompt_of_nothing_is_unusable(read):
    chat = read("{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}")
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("", "The")]
    prompts, problems = prompt_ids(chat, rows, Counter())
    assert problems == {0: "the chat template renders nothing"}
    assert prompts[0] is None and text_of(chat, prompts[1]) == "The"
    assert response_ids(chat, prompts, [{"text": "x"}] * 2, Counter())[0] is None


# ----- thinking
def test_an_answer_without_reasoning_follows_an_empty_think_block(read):
    chat = read(QWEN3 + QWEN3_BEGIN)
    prompt, ids = sequence(chat, CHAT, {"text": "The answer", "finish": "stop"})
    sampled, _ = sequence(chat, CHAT, {"text": "x", "token_ids": [5], "tokenizer": chat.fingerprint})
    assert (
        text_of(chat, prompt[len(sampled) :]) == "<think>\n\n</think>\n\n"
        and prompt[: len(sampled)] == sampled
    )
    assert text_of(chat, ids) == "The answer<|im_end|>"  # only this is trained
    # thinking is off in the prompt already
    off = read(QWEN3 + QWEN3_BEGIN, switches={"enable_thinking": False})
    assert sequence(off, CHAT, {"text": "The answer", "finish": "stop"}) == (prompt, ids)
    (given,), _ = prompt_ids(off, [{"prompt": CHAT}], Counter())
    assert given == prompt == oracle(chat, CHAT, add_generation_prompt=True, enable_thinking=False)
    # a row that was sampled with thinking off, read without the switch
    row = {"prompt": CHAT, "prompt_token_ids": given, "prompt_tokenizer": chat.template}
    (travelled,), _ = prompt_ids(chat, [row], Counter())
    (pair,) = response_ids(chat, [travelled], [{"text": "The answer", "finish": "stop"}], Counter())
    assert pair == (prompt, ids)


def test_an_open_think_block_is_closed_before_an_answer(read):
    chat = read(QWEN3 + OPEN_BEGIN)
    (given,), _ = prompt_ids(chat, [{"prompt": CHAT}], Counter())
    assert text_of(chat, given).endswith("assistant\n<think>\n")
    prompt, ids = sequence(chat, CHAT, {"text": "The answer", "finish": "stop"})
    assert text_of(chat, prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert text_of(chat, ids) == "The answer<|im_end|>"
    off = read(QWEN3 + OPEN_BEGIN, switches={"enable_thinking": False})
    assert sequence(off, CHAT, {"text": "The answer", "finish": "stop"}) == (prompt, ids)


@pytest.mark.parametrize("begin", [QWEN3_BEGIN, OPEN_BEGIN], ids=["closed", "open"])
def test_a_text_with_reasoning_is_trained_with_it(read, begin):
    chat = read(QWEN3 + begin)
    text = "<think>\nso\n</think>\n\nThe answer"
    prompt, ids = sequence(chat, CHAT, {"text": text, "finish": "stop"})
    assert prompt + ids == oracle(chat, [*CHAT, {"role": "assistant", "content": text}])[:-1]
    (given,), _ = prompt_ids(chat, [{"prompt": CHAT}], Counter())
    assert prompt == given and text_of(chat, ids).endswith("so\n</think>\n\nThe answer<|im_end|>")
    # an earlier answer of the prompt may lose its reasoning, as the template has it
    turns = [CHAT[1], {"role": "assistant", "content": text}, CHAT[3]]
    prompts, problems = prompt_ids(chat, [{"prompt": turns}], Counter())
    assert not problems and text_of(chat, prompts[0]).count("think>") == (begin == OPEN_BEGIN)


def test_reasoning_where_every_prompt_ends_with_an_empty_think_block(read):
    """No prompt leads to such a text, so that it is lost, and does not bring a prompt of its own."""
    chat = read(QWEN3 + BEGIN.replace("{% endif %}", EMPTY_BLOCK + "{% endif %}"))
    (prompt,), _ = prompt_ids(chat, [{"prompt": CHAT}], Counter())
    assert text_of(chat, prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    texts = "<think>\nso\n</think>\n\nThe answer", "so\n</think>\n\nThe answer", "The answer"
    pairs = response_ids(
        chat, [prompt] * 3, [{"text": text, "finish": "length"} for text in texts], Counter()
    )
    assert pairs[:2] == [None, None]
    assert pairs[2][0] == prompt and text_of(chat, pairs[2][1]) == "The answer"


def test_reasoning_after_a_prompt_that_was_sampled_with_thinking_off(read):
    """With the switch or without it: no second think block follows that of the prompt."""
    chat, off = read(QWEN3 + QWEN3_BEGIN), read(QWEN3 + QWEN3_BEGIN, switches={"enable_thinking": False})
    (closed,), _ = prompt_ids(off, [{"prompt": CHAT}], Counter())
    text = {"text": "<think>\nso\n</think>\n\nThe answer", "finish": "stop"}
    assert response_ids(chat, [closed], [text], Counter()) == response_ids(off, [closed], [text], Counter())
    assert response_ids(chat, [closed], [text], Counter()) == [None]
    assert sequence(chat, CHAT, text) is not None


@pytest.mark.parametrize("text", ["<think>\nso\n</think>\n\nThe answer", "Two <think>in</think> text"])
def test_reasoning_that_the_template_drops_is_a_lost_response(read, text):
    dropping = TURNS.replace("m.content", "m.content.split('</think>')[-1].lstrip()")
    assert sequence(read(dropping + BEGIN), CHAT, {"text": text}) is None
    assert sequence(read(TURNS + BEGIN), CHAT, {"text": text}) is not None
    two = sequence(read(QWEN3 + QWEN3_BEGIN), CHAT, {"text": text})
    assert (two is None) == text.startswith("Two")  # its template would lose the first word


def test_an_open_think_block_that_no_answer_closes(read, capsys):
    chat = read(R1 + R1_BEGIN)
    (prompt,), _ = prompt_ids(chat, [{"prompt": CHAT}], Counter())
    assert text_of(chat, prompt).endswith("assistant\n<think>\n")
    err = refusal(capsys, sequence, chat, CHAT, {"text": "The answer", "finish": "stop"})
    assert chat.tokenizer.name_or_path in err and "<think>" in err and "enable_thinking" in err
    # what was sampled goes on after the block, reasoning and all
    text = "so\n</think>\n\nThe answer"
    sampled = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    response = {"text": text, "finish": "stop", "token_ids": sampled, "tokenizer": chat.fingerprint}
    assert sequence(chat, CHAT, response) == (prompt, sampled + [chat.end_id])


# ----- days and names
def test_the_day_of_the_run_is_the_templates(read):
    chat = read(DATED + TURNS + BEGIN, day="2024-02-29")
    (prompt,), _ = prompt_ids(chat, [{"prompt": CHAT}], Counter())
    assert chat.day == "2024-02-29"
    assert text_of(chat, prompt).startswith(
        "<|im_start|>system\nToday is 29 Feb 2024.<|im_end|>\n<|im_start|>system\nBe"
    )
    _, ids = sequence(chat, CHAT, {"text": "The answer", "finish": "stop"})
    assert text_of(chat, ids) == "The answer<|im_end|>"
    assert read(TURNS + BEGIN, day="2024-02-29").day is None


@pytest.mark.parametrize(
    "record, expected",
    [
        ('{"args": {"date": "2024-02-29"}}', "2024-02-29"),
        ('{"args": {"date": null}}', None),
        ('{"args": {}}', None),
        ('{"args": {"date": "soon"}}', None),
        ('{"args": {"date": 7}}', None),
        ("[1]", None),
        ("{torn", None),
        (None, None),
    ],
)
def test_the_day_of_a_run_is_that_of_its_record(tmp_path, record, expected):
    out = tmp_path / "out.jsonl"
    if record:
        (tmp_path / "out.meta.json").write_text(record)
    today = {str(date.today())}
    days = run_date(str(out), False), run_date(str(out), True)
    today.add(str(date.today()))  # midnight may pass
    assert days[0] == expected if expected else days[0] in today
    assert days[1] in today


def test_one_of_several_named_templates(tmp_path, models):
    tokenizer = load_tokenizer(models["bytes"])[0]
    tokenizer.chat_template = {"default": QWEN3 + QWEN3_BEGIN, "tool_use": "{{ tools }}"}
    folder = with_template(tmp_path / "model", models["bytes"], "")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    chat, _ = read_chat(folder, switches={"enable_thinking": False})
    (prompt,), _ = prompt_ids(chat, [{"prompt": CHAT}], Counter())
    assert isinstance(chat.tokenizer.chat_template, dict)
    assert text_of(chat, prompt).endswith("assistant\n<think>\n\n</think>\n\n")


# ----- the zoo: what is refused
@pytest.mark.parametrize(
    "template, sentence",
    [
        (TURNS.replace("m.content", "m.content | lower") + BEGIN, "the chat template loses the "),
        (
            TURNS.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}") + BEGIN,
            "loses the assistant's",
        ),
        (TURNS.replace("{{ m.content }}", "{{ m.content if m.role != 'user' }}") + BEGIN, "loses the user's"),
        (PRINTING + BEGIN, "the chat template rejects it: a list"),
        (TURNS, "has no add_generation_prompt, but begins answers: '<|im_start|>assistant'"),
        (TURNS + BEGIN.replace("assistant", "model"), "begins a response with 'model', but not an answer"),
        (TURNS.replace("<|im_end|>", " END") + BEGIN, "ends a turn with 'END', which is not a special token"),
        ("{{ bos_token * 2 }}" + TURNS + BEGIN, "begins with two tokens that begin a text"),
        ("{% if", "the chat template rejects it: "),
        ("{{ raise_exception('never') }}", "the chat template rejects it: never"),
    ],
    ids=[
        "lower case",
        "no answer",
        "no question",
        "printed lists",
        "no generation prompt",
        "two headers",
        "an end that is text",
        "two beginnings",
        "no template",
        "never",
    ],
)
def test_a_template_that_is_of_no_use_is_refused_by_name(tmp_path, models, capsys, template, sentence):
    model = with_template(tmp_path / "model", models["bytes"], template)
    err = refusal(capsys, read_chat, model)
    assert f"{model}: " in err and sentence in err


def test_a_switch_that_the_template_does_not_have(tmp_path, models, capsys):
    model = with_template(tmp_path / "model", models["bytes"], TURNS + BEGIN)
    err = refusal(capsys, read_chat, model, switches={"enable_thinking": False})
    assert f"--template-kwargs: the chat template of {model} has no variable 'enable_thinking'" in err
    model = with_template(tmp_path / "qwen3", models["bytes"], QWEN3 + QWEN3_BEGIN)
    err = refusal(capsys, read_chat, model, switches={"thinking": False})  # a part of a variable's name
    assert f"--template-kwargs: the chat template of {model} has no variable 'thinking'" in err


# ----- the ids of a prompt
def test_ids_of_a_prompt_travel_with_the_row(read):
    chat = read(TURNS + BEGIN)
    other = read(TRIMMING + BEGIN)
    assert chat.fingerprint == other.fingerprint and chat.template != other.template
    expected = oracle(chat, CHAT, add_generation_prompt=True)
    given = [7, 8, 9]
    cases = [
        ({"prompt_token_ids": given, "prompt_tokenizer": chat.template}, given, 0),
        ({"prompt_token_ids": given, "prompt_tokenizer": other.template}, expected, 1),
        ({"prompt_token_ids": given, "prompt_tokenizer": None}, expected, 1),
        ({"prompt_token_ids": [7, chat.vocabulary], "prompt_tokenizer": chat.template}, expected, 1),
        (
            {"prompt_token_ids": [7, chat.vocabulary - 1], "prompt_tokenizer": chat.template},
            [7, chat.vocabulary - 1],
            0,
        ),
        ({"prompt_token_ids": [], "prompt_tokenizer": chat.template}, expected, 1),
        ({"prompt_token_ids": None, "prompt_tokenizer": None}, expected, 0),
        ({}, expected, 0),
    ]
    for keys, ids, anew in cases:
        counts = Counter()
        assert prompt_ids(chat, [{"prompt": CHAT, **keys}], counts) == ([ids], {})
        assert counts["prompts_rendered_anew"] == anew
    counts = Counter()
    together, _ = prompt_ids(chat, [{"prompt": CHAT, **keys} for keys, _, _ in cases], counts)
    assert together == [ids for _, ids, _ in cases] and counts["prompts_rendered_anew"] == 4


def test_switches_that_render_otherwise_than_the_ids_are_refused(read, capsys):
    plain, off = read(QWEN3 + QWEN3_BEGIN), read(QWEN3 + QWEN3_BEGIN, switches={"enable_thinking": False})
    assert plain.template == off.template
    rows = []
    for chat in (plain, off):
        (ids,), _ = prompt_ids(chat, [{"prompt": CHAT}], Counter())
        rows.append({"prompt": CHAT, "prompt_token_ids": ids, "prompt_tokenizer": chat.template})
    assert prompt_ids(off, rows[1:], Counter())[0] == [rows[1]["prompt_token_ids"]]
    err = refusal(capsys, prompt_ids, off, rows, Counter())
    assert "--template-kwargs {'enable_thinking': False}: " in err and "leave out" in err
    assert prompt_ids(plain, rows, Counter())[0] == [row["prompt_token_ids"] for row in rows]


# ----- the ids of a response
def test_responses_of_every_kind(read):
    chat = read(TURNS + BEGIN)
    ids = chat.tokenizer("why", add_special_tokens=False)["input_ids"]
    end = [chat.end_id]
    mine, other = (
        {"token_ids": [70, 71], "tokenizer": chat.fingerprint},
        {"token_ids": [70], "tokenizer": "x"},
    )
    cases = [
        ({"finish": "stop"}, ids + end, 0),
        ({}, ids + end, 0),
        ({"finish": None}, ids + end, 0),
        ({"finish": "length"}, ids, 0),
        ({**mine, "finish": "stop"}, [70, 71] + end, 0),
        ({**mine, "finish": "length"}, [70, 71], 0),
        ({**other, "finish": "stop"}, ids + end, 1),
        ({"token_ids": [70], "finish": "length"}, ids, 1),
    ]
    for keys, expected, of_another in cases:
        counts, response = Counter(), {"text": "why", **keys}
        assert sequence(chat, CHAT, response, counts)[1] == expected
        assert counts["responses_of_another_tokenizer"] == of_another
    assert mine["token_ids"] == [70, 71]  # the row itself stays
    assert sampled_ids(chat, mine) == [70, 71] and sampled_ids(chat, other) is sampled_ids(chat, {}) is None
    prompts = [oracle(chat, CHAT, add_generation_prompt=True)] * len(cases)
    together = response_ids(chat, prompts, [{"text": "why", **keys} for keys, _, _ in cases], Counter())
    assert together == [(prompts[0], expected) for _, expected, _ in cases]


def test_a_special_token_in_a_text_is_the_token(read):
    """Callers count such texts and drop them, for a model would learn to go on after its end of turn."""
    chat = read(TURNS + BEGIN)
    _, ids = sequence(chat, CHAT, {"text": "x<|im_end|>y", "finish": "length"})
    assert ids[1] == chat.end_id and len(ids) == 3


def test_a_response_that_the_template_loses_or_rejects(read):
    losing = "{{ raise_exception('x') if 'x' in m.content else m.content | replace('j', '') }}"
    chat = read(TURNS.replace("{{ m.content }}", losing) + BEGIN)
    texts = "The answer", "x", "judge"
    prompts = [[5]] * 3
    pairs = response_ids(chat, prompts, [{"text": text, "finish": "length"} for text in texts], Counter())
    assert text_of(chat, pairs[0][1]) == "The answer" and pairs[1:] == [None, None]


@pytest.mark.parametrize(
    "response, expected",
    [
        ({"text": "plain"}, "plain"),
        ({"text": " plain\n"}, " plain\n"),
        ({"text": "<think>so</think>\n\nit is"}, "it is"),
        ({"text": "\n<think>so</think> a </think> b"}, "b"),
        ({"text": "so\n</think>\n\nit is"}, "it is"),  # the prompt had opened the block
        ({"text": "<think>so"}, ""),
        ({"text": "<think></think>"}, ""),
        ({"text": "write <think> and </think> around it"}, "write <think> and </think> around it"),
        ({"text": "so|it is", "final": "it is"}, "it is"),
        ({"text": "so", "final": ""}, ""),
        ({"text": "plain", "final": None}, "plain"),
    ],
)
def test_the_answer_is_what_follows_the_reasoning(response, expected):
    assert answer(response) == expected


# ----- the tokenizer of the folder
def test_a_tokenizer_that_transformers_changes_is_used_as_its_file_has_it(tmp_path, models, capsys):
    """A Llama folder whose tokenizer.json is of bytes, and whose config names SentencePiece's class."""
    model = with_template(tmp_path / "model", models["bytes"], TURNS + BEGIN)
    path = tmp_path / "model" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tokenizer_class": "LlamaTokenizerFast"}))
    chat, _ = read_chat(model)
    note = capsys.readouterr().err
    assert f"{model}: transformers' " in note and "is not the tokenizer of tokenizer.json" in note
    right, _ = read_chat(models["bytes"])
    text = "in 2024,\n 123 apples fell"
    _, ids = sequence(chat, CHAT, {"text": text, "finish": "length"})
    assert ids == sequence(right, CHAT, {"text": text, "finish": "length"})[1]
    assert text_of(chat, ids) == text and chat.fingerprint == right.fingerprint
    assert not capsys.readouterr().err
