"""What the server process of processes.py loads before it forks; one thread, as every test has."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import torch  # noqa: E402
import torch.distributed.checkpoint  # noqa: E402, F401
import torch.distributed.fsdp  # noqa: E402, F401
import transformers.models.bert.modeling_bert  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: E402, F401

torch.set_num_threads(1)
