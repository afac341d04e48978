"""
From a chat to token ids: what the stages that run a model need of its tokenizer and chat template.
"""

import hashlib
import json
import os
import re

from common import as_messages, fail, note


def load_tokenizer(name, revision=None):
    """(tokenizer, config) of a local model folder or of OWNER/NAME on the hub."""
    from transformers import AutoConfig, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not name:
        fail("--model is empty: expected a model folder, or OWNER/NAME on the hub")
    problem = "no such folder, and not available from the hub"
    if os.path.isdir(name):
        problem = "its tokenizer or config cannot be loaded"
        files = os.listdir(name)
        if "config.json" not in files or not any(file.endswith(".safetensors") for file in files):
            fail(f"{name}: not a model folder: config.json or *.safetensors is missing")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        return tokenizer, AutoConfig.from_pretrained(name, revision=revision)
    except Exception as error:  # damaged files raise many kinds, even a bare Exception
        reason = str(error).partition("\n")[0]
        fail(f"{name}: {problem}: {type(error).__name__}: {reason}")


def read_sides(row, line):
    """The prompt's messages, and of chosen and rejected {"text", "finish", "token_ids", "tokenizer"}."""
    prompts, responses = [], []
    for side in ("chosen", "rejected"):
        messages = row[side]
        if isinstance(messages, str):
            messages = [{"role": "assistant", "content": messages}]
        if not messages or messages[-1]["role"] != "assistant":
            fail(f"{line}: expected {side} to be text, or messages that end with the assistant's")
        if not messages[-1]["content"].strip():
            fail(f"{line}: the {side} response is empty")
        prompts.append(messages[:-1] or row.get("prompt"))
        details = {key: row.get(f"{side}_{key}") for key in ("finish", "token_ids", "tokenizer")}
        responses.append({"text": messages[-1]["content"], **details})
    if prompts[0] != prompts[1]:
        fail(f"{line}: chosen and rejected answer different prompts")
    prompt = as_messages(prompts[0], line)  # role first: train_dpo.py hashes this as JSON
    return [{"role": turn["role"], "content": turn["content"], **turn} for turn in prompt], responses


def prompt_ids(tokenizer, messages, **switches):
    """Ids of a chat as its template renders it, with no other special tokens.

    Where a template has no system role (Gemma-2), the system's text opens the first user turn.
    """
    from jinja2 import TemplateError

    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True} | switches
    try:
        ids = tokenizer.apply_chat_template(messages, **options)["input_ids"]
    except TemplateError as error:
        if messages[0]["role"] != "system" or len(messages) == 1:
            fail(f"{tokenizer.name_or_path}: the chat template rejects {messages!r:.100}: {error}")
        system, first, *rest = messages
        first = {"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}
        return prompt_ids(tokenizer, [first, *rest], **switches)
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        fail(f"{tokenizer.name_or_path}: the rendered prompt begins with two beginning-of-text tokens")
    return ids


def end_of_turn(tokenizer):
    """The token that ends an assistant's turn: what the chat template renders right after the response."""
    from jinja2 import TemplateError

    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        fail(f"{name}: no chat template; save one in the model folder as chat_template.jinja")
    chat = [{"role": "user", "content": "PROMPT"}, {"role": "assistant", "content": "RESPONSE"}]
    try:
        tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("RESPONSE")[2].lstrip()
    except TemplateError as error:
        fail(f"{name}: the chat template cannot be rendered: {error}")
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    if ids[0] not in tokenizer.added_tokens_decoder:
        fail(f"{name}: the chat template ends a turn with {tail[:20]!r}, which is not a special token")
    return ids[0]


def fingerprint(tokenizer):
    """Identifies a vocabulary. Token ids are valid for every model with the same fingerprint."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def completion_ids(tokenizer, vocabulary, end_id, response):
    """Ids of a response as a model is trained on it, with the end-of-turn token unless it was truncated.

    They are those sampled if their tokenizer has the fingerprint `vocabulary`, else those of the text.
    """
    ids = response.get("token_ids")
    if ids is None or response.get("tokenizer") != vocabulary:
        ids = tokenizer(response["text"], add_special_tokens=False)["input_ids"]
    return list(ids) if response.get("finish") == "length" else [*ids, end_id]


def count_special(texts, tokenizer):
    """How many texts hold one of the tokenizer's special tokens, which a model would read as that token."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    pattern = re.compile("|".join(map(re.escape, special)) or "(?!)")
    return sum(bool(pattern.search(text)) for text in texts)


def show(tokenizer, ids, start):
    """Log a sequence as a model reads it, with the response, which begins at `start`, between 【 and 】."""
    note(f"{tokenizer.decode(ids[:start])}【{tokenizer.decode(ids[start:])}】")
