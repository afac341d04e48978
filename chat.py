"""From a chat to token ids: what a model reads is what its chat template renders, or a sentence says why not.

`read_chat` measures what a template does to a chat of its own; `prompt_ids` and `response_ids` follow it."""

import re
from contextlib import suppress
from datetime import datetime
from itertools import product
from os.path import commonprefix
from typing import NamedTuple

from common import fail, stable_hash

ROLES = ("system", "user", "assistant", "user")
SYSTEM, QUESTION, ANSWER = "Vebmy", "Zuvqo", "Kwimab"  # no template has these words
OPEN = re.compile(r"(?i)(<|\[|<seed:|<\|start_)think(ing)?\W+$")  # a think block that nothing has closed
CLOSE = """--template-kwargs '{"enable_thinking": false}' closes it where the template has this switch"""


class Chat(NamedTuple):
    """A model's tokenizer and what its chat template does."""

    tokenizer: object
    vocabulary: int  # number of embeddings
    fingerprint: str  # of the tokenizer: models that have the same share the ids of responses
    template: str  # of tokenizer and template: models that have the same share the ids of prompts
    switches: dict  # --template-kwargs
    day: str | None  # of the run, if the template asks for it
    parts: bool = False  # contents are lists of parts, as where a template has pictures
    folds: bool = False  # a system turn opens the first user turn, as in Gemma-2, which has no such role
    generation: str = ""  # what is rendered before a response that is to be sampled
    answer: str = ""  # before a response that is given: perhaps with an empty think block, or a channel
    ending: str = ""  # after a response
    end_id: int = -1  # the token that ends a response


def encode(chat, texts):
    """Token ids of texts, without special tokens that the tokenizer would add."""
    backend = chat.tokenizer.backend_tokenizer
    return [entry.ids for entry in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def read_chat(name, revision=None, switches=None, day=None):
    """(Chat, config) of a model that is sampled from or trained."""
    import loading  # here: stages that run no model need no loading.py

    tokenizer, config = loading.load_tokenizer(name, revision)
    try:
        return measured(chat_of(tokenizer, config, switches or {}, day)), config
    except ValueError as error:
        fail(f"{name}: {error}")


def chat_of(tokenizer, config, switches, day):
    """The Chat of a model that only reads, as a reward model; a template that loses a text is refused."""
    import loading

    name, template = tokenizer.name_or_path, tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if not template:
        fail(f"{name}: no chat template; save one in the model folder as chat_template.jinja")
    for switch in switches:
        if not re.search(rf"\b{re.escape(switch)}\b", template):
            fail(f"--template-kwargs: the chat template of {name} has no variable {switch!r}")
    fingerprint = loading.fingerprint(tokenizer)
    of_template = f"{stable_hash(fingerprint, template, tokenizer.special_tokens_map):016x}"
    day = day if "strftime_now" in template else None
    chat = Chat(tokenizer, config.get_text_config().vocab_size, fingerprint, of_template, switches, day)
    problems = []
    for parts, folds in product((False, True), repeat=2):
        chat = chat._replace(parts=parts, folds=folds)
        try:
            text = render(chat, conversation(SYSTEM, QUESTION, ANSWER))
        except ValueError as error:
            problems.append(error)
            continue
        if encode(chat, [text])[0][:2] == [tokenizer.bos_token_id] * 2:
            fail(f"{name}: a rendered chat begins with two tokens that begin a text")
        if not parts or "'type'" not in text:  # a list of parts that was printed
            return chat
    fail(f"{name}: {problems[1]}")  # of contents that are texts, without a system turn


def measured(chat):
    """The Chat with what its template does before and after an answer; ValueError if it is of no use."""
    question = conversation(SYSTEM, QUESTION)
    generation = render(chat, question, generation=True)
    answer, _, ending = render(chat, conversation(SYSTEM, QUESTION, ANSWER)).partition(ANSWER)
    answer = answer.rstrip(" ")  # " Kwimab" may begin with one token
    shared = len(commonprefix([generation, answer]))
    opened, closing = generation[shared:].strip(), answer[shared:].strip()
    if closing and generation == render(chat, question):
        raise ValueError(f"the chat template has no add_generation_prompt, but begins answers: {closing!r}")
    if opened and "think" not in opened.lower():
        raise ValueError(f"the chat template begins a response with {opened!r}, but not an answer")
    longer = conversation(SYSTEM, QUESTION, ANSWER, QUESTION)
    rest = ending.strip() or render(chat, longer).partition(ANSWER)[2].strip()
    end_id = (encode(chat, [rest])[0] or [chat.tokenizer.eos_token_id])[0]
    if end_id not in chat.tokenizer.added_tokens_decoder:
        raise ValueError(f"the chat template ends a turn with {rest[:20]!r}, which is not a special token")
    return chat._replace(generation=generation, answer=answer, ending=ending, end_id=end_id)


def conversation(*texts):
    """Messages of these texts, the first of which is the system's."""
    return [{"role": role, "content": text} for role, text in zip(ROLES, texts, strict=False)]


def render(chat, messages, generation=False):
    """A chat as text, up to a response if `generation`; ValueError if a turn is rejected or lost."""
    if chat.folds and [turn["role"] for turn in messages[:2]] == ["system", "user"]:
        system, first, *others = messages
        messages = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *others]
    given, end = messages, 0
    if chat.parts:
        given = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
    options = {"tokenize": False, "add_generation_prompt": generation, **chat.switches}
    if chat.day:
        options["strftime_now"] = datetime.fromisoformat(chat.day).strftime
    try:
        text = chat.tokenizer.apply_chat_template(given, **options)
    except Exception as error:  # a template is a program, which raises any kind
        raise ValueError(f"the chat template rejects it: {error}") from error
    for turn in messages:
        content = turn["content"].strip()
        if turn["role"] == "assistant":  # an earlier answer may be without its reasoning
            content = content.rpartition("</think>")[2].strip()
        start = text.find(content, end)
        end = start + len(content)
        if start < 0:
            raise ValueError(f"the chat template loses the {turn['role']}'s {content[:50]!r}")
    return text


def prompt_ids(chat, rows, counts):
    """([ids of each row's prompt, or None], {index: why}); prompt_token_ids of this template stay."""
    prompts, texts, problems = [None] * len(rows), {}, {}
    for index, row in enumerate(rows):
        ids = row.get("prompt_token_ids")
        usable = ids and row.get("prompt_tokenizer") == chat.template and max(ids) < chat.vocabulary
        prompts[index] = list(ids) if usable else None
        counts["prompts_rendered_anew"] += ids is not None and not usable
        if not usable or chat.switches:
            try:
                texts[index] = render(chat, row["prompt"], generation=True)
            except ValueError as error:
                problems[index] = str(error)
    for index, ids in zip(texts, encode(chat, texts.values()), strict=True):
        if prompts[index] not in (None, ids):
            fail(f"--template-kwargs {chat.switches}: prompts were sampled with others; leave out this flag")
        prompts[index] = ids or None
        if not ids:
            problems[index] = "the chat template renders nothing"
    return prompts, problems


def answer(response):
    """What a response says after its reasoning; rewards, judges, win rates and lengths are of this."""
    text = response["text"]
    before, end, final = text.rpartition("</think>")
    if response.get("final") is not None:
        return response["final"]
    if text.lstrip().startswith("<think>") or end and "<think>" not in text:
        return final.strip() if end else ""
    return text


def sampled_ids(chat, response):
    """The ids of a response that was sampled with this tokenizer; None of another."""
    return response.get("token_ids") if response.get("tokenizer") == chat.fingerprint else None


def response_ids(chat, prompts, responses, counts):
    """[(ids of the prompt, ids of the response)]; None for a response that the template loses.

    A text has the form that the template gives to an answer, and is tokenized after what stands before it:
    SentencePiece puts a space before the first word of a text.
    """
    sequences, texts = [], {}
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = sampled_ids(chat, response)
        sequences.append(None if None in (prompt, ids) else (prompt, list(ids)))
        if ids is None and prompt is not None:
            counts["responses_of_another_tokenizer"] += response.get("token_ids") is not None
            with suppress(ValueError):
                text = render(chat, conversation(SYSTEM, QUESTION, response["text"]))
                reasoning = response["text"].rpartition("</think>")[0].strip()
                if reasoning.removeprefix("<think>").strip() in text:
                    texts[index] = text.removesuffix(chat.ending)
    generation, answer = encode(chat, [chat.generation, chat.answer])
    for (index, text), ids in zip(texts.items(), encode(chat, texts.values()), strict=True):
        header, header_ids, prompt = chat.generation, generation, prompts[index]
        if text.startswith(chat.answer):  # else it has reasoning
            header, header_ids, prompt = chat.answer, answer, before_answer(chat, prompt, generation, answer)
        elif not text.startswith(header) or before_answer(chat, prompt, generation, answer) == prompt:
            continue  # reasoning, where a prompt ends with an empty think block
        n = len(header_ids)
        if ids[:n] != header_ids:
            counts["responses_tokenized_without_header"] += 1
            ids = header_ids + encode(chat, [text.removeprefix(header)])[0]
        sequences[index] = prompt, ids[n:]
    for sequence, response in zip(sequences, responses, strict=True):
        if sequence and response.get("finish") != "length":
            sequence[1].append(chat.end_id)
    return sequences


def before_answer(chat, prompt, generation, answer):
    """The ids of a prompt before an answer that is given: there it may end with an empty think block."""
    shared = len(commonprefix([generation, answer]))
    closing, kept = answer[shared:], len(prompt) - len(generation) + shared
    if prompt[-1] == generation[-1] and prompt[len(prompt) - len(closing) :] != closing:
        prompt = prompt[:kept] + closing
    elif prompt[-1] != generation[-1]:  # with other switches, it may end with a part of the block
        overlap = max(n for n in range(len(closing) + 1) if prompt[len(prompt) - n :] == closing[:n])
        prompt = prompt + closing[overlap:] if overlap else prompt
    end = chat.tokenizer.backend_tokenizer.decode(prompt[-9:], skip_special_tokens=False)
    if OPEN.search(end):
        fail(f"{chat.tokenizer.name_or_path}: a text without reasoning would follow {end!r}; {CLOSE}")
    return prompt
