"""Tiny random models and their tokenizers, which the tests run as they would run real ones."""

import torch

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # distributions far from uniform
}
WORDS = "[PAD] [CLS] [SEP] [UNK] question good bad answer long a b c d 0 1 2 3 4 5 6 7 8 9 user assistant :"


def make_tokenizer(folder, template=CHATML):
    """256 bytes and three special tokens; pad is the end-of-turn token, as in SmolLM2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=512,
    )
    if template:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_bert_tokenizer(folder):
    """The words of WORDS, no chat template; two texts are read as Bert reads a pair."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(WORDS.split())}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny(folder, architecture="LlamaForCausalLM", tokenizer=None, seed=0, biases=False, **changes):
    """Save a random float32 model of a transformers class; returns its folder as text.

    tokenizer: one that is saved in the folder already, by default that of make_tokenizer
    biases: random ones, where a new model has zeros
    changes: of its config, beside SIZES and the special tokens; a reward model has one label
    """
    import transformers

    tokenizer = tokenizer or make_tokenizer(folder)
    model_class = getattr(transformers, architecture)
    config = {"vocab_size": len(tokenizer), **SIZES}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[name] = getattr(tokenizer, name)
    if architecture.endswith("SequenceClassification"):
        config["num_labels"] = 1
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**(config | changes))).float()
    if biases:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()
    if model.can_generate():
        model.generation_config.temperature = 0.1  # must reach no sample
        model.generation_config.do_sample = True
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return str(folder)


def make_policy(folder, seed=0, tie=True, hidden=64, spread=0.3, template=CHATML):
    """A random LlamaForCausalLM with ChatML; vocabulary 259."""
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "initializer_range": spread}
    tokenizer = make_tokenizer(folder, template)
    return tiny(folder, "LlamaForCausalLM", tokenizer, seed, tie_word_embeddings=tie, **sizes)


def make_bert(folder, architecture="BertForSequenceClassification", seed=2, **changes):
    """A random reader of pairs of texts, with the tokenizer of make_bert_tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    sizes |= {"initializer_range": 0.5, "num_key_value_heads": 2}
    return tiny(folder, architecture, make_bert_tokenizer(folder), seed, **sizes, **changes)


def make_gemma(folder, architecture="Gemma2ForCausalLM", template=CHATML, seed=0, **changes):
    """A random Gemma-2, whose attention_logit_softcapping and window are set by `changes`."""
    sizes = {"head_dim": 32, "query_pre_attn_scalar": 32}
    return tiny(folder, architecture, make_tokenizer(folder, template), seed, **(sizes | changes))
