#!/usr/bin/env bash
# A name in tokenizer_config.json decides over tokenizer.json: the same file gives other ids, or a text without spaces.
#
# Versions   transformers 5.19.0, tokenizers 0.23.3 on Python 3.11
# Source     transformers/models/llama/tokenization_llama.py: LlamaTokenizer builds its own pre-tokenizer and decoder around the
#            vocabulary of tokenizer.json; what the file says of them is not read. PreTrainedTokenizerFast reads all of the file
# Expected   the ids that tokenizers.Tokenizer.from_file gives, whatever "tokenizer_class" says, as with transformers 4
# Seen       SentencePiece file (a space before every part of a text, as Llama-2's and Mistral-7B's), "</s>\nuser" has the ids
#            file             ['</s>', '▁', '\n', 'u', ...]
#            LlamaTokenizer   ['</s>', '\n', 'u', ...]            so every turn after an end-of-text token is another prompt
#            byte-level file (as DeepSeek's models with the class LlamaTokenizerFast), "a b\nc" is read and written as
#            file             'a b\nc'
#            LlamaTokenizer   'abc'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.19.0 tokenizers==0.23.3
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, logging

logging.set_verbosity_error()
SPECIAL = ["<unk>", "<s>", "</s>"]


def save(name, core):
    core.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    Path(name).mkdir()
    core.save(f"{name}/tokenizer.json")
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL))
    Path(name, "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizerFast", **names}))
    Path(name, "config.json").write_text(json.dumps({"model_type": "llama"}))
    return Tokenizer.from_file(f"{name}/tokenizer.json"), AutoTokenizer.from_pretrained(name)


pieces = [*SPECIAL, "\u2581", "\n", *"user"]
sentencepiece = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
sentencepiece.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
sentencepiece.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
file, loaded = save("sentencepiece", sentencepiece)
ids = file.encode("</s>\nuser", add_special_tokens=False).ids, loaded("</s>\nuser", add_special_tokens=False)["input_ids"]
for name, line in zip(("file", type(loaded).__name__), ids):
    print(f"{name:16}{[pieces[i] for i in line]}")
assert ids[0][:3] == [2, 3, 4] and ids[1][:2] == [2, 4], "the class no longer decides: the finding is out of date"

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
bytes_ = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
file, loaded = save("bytes", bytes_)
text = "a b\nc"
read = file.decode(file.encode(text).ids), loaded.decode(loaded(text, add_special_tokens=False)["input_ids"])
for name, line in zip(("file", type(loaded).__name__), read):
    print(f"{name:16}{line!r}")
assert read[0] == text and read[1] != text, "the class no longer decides: the finding is out of date"
PYTHON
