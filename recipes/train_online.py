"""
Losses that sample from the policy in every step: train_dpo.py with HyPO (S1) and online DPO (S3).

Reads and writes as train_dpo.py, whose flags it has but --loss; metrics.jsonl gains sample_tokens and
sample_truncated, the length of samples and the share that was cut off.

--method hypo        DPO on the pairs, plus --hypo-lambda times KL(policy || reference), estimated on
                     --samples responses from the policy to each prompt (S1 Table 1). Metrics gain kl_est,
                     the mean log-ratio of the samples, and advantage_rms
--method online-dpo  DPO of the chosen response against one sample from the policy (S3 section 4, Theorem 4.5;
                     Table 2). The file's rejected response is not trained on

    python recipes/train_online.py --method hypo --model out/models/policy --pairs out/on0.pairs.jsonl \\
        --out out/hypo

Samples are drawn from the policy as it computes, at temperature 1 with nothing cut off, of at most --max-new
tokens, in one call for all of a process's prompts of a step, or for those of one length if sequences cannot
share rows. For that all layers are gathered (2 bytes a parameter on every GPU: 16 GB at 8B, impossible at
70B), and the reference model stays in memory, sharded. With --eval-pairs, plain DPO is measured. S1 is the
paper SimpleMix, S3 "What Matters in Data for DPO?".
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_dpo  # noqa: E402, I001  sets the environment before torch is imported
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402

from chat import read_chat  # noqa: E402
from common import fail, stable_hash  # noqa: E402
from loading import context_length  # noqa: E402


def parse_args(argv=None):
    parser = train_dpo.make_parser(__doc__)
    flag, count = parser.add_argument, train_dpo.number(int)
    flag("--method", choices=["hypo", "online-dpo"], required=True)
    flag("--hypo-lambda", type=train_dpo.number(float), help="weight of the divergence, hypo (default 1e-4)")
    flag("--samples", type=count, help="of each prompt, hypo (default 2)")
    flag("--max-new", type=count, default=256, help="longest sample in tokens (default %(default)s)")
    args = train_dpo.parse_args(argv, parser)
    if args.loss != "dpo":
        parser.error("--loss is for train_dpo.py")
    if args.method == "online-dpo" and (args.samples or args.hypo_lambda):
        parser.error("--samples and --hypo-lambda have no effect with --method online-dpo")
    args.samples = args.samples or (1 if args.method == "online-dpo" else 2)
    args.hypo_lambda = args.hypo_lambda or 1e-4
    return args


# ----- HyPO's divergence
def rloo_advantages(log_ratios):
    """(B, k): each sample's log-ratio minus the mean of the others'; a single sample has no baseline."""
    k = log_ratios.shape[1]
    if k == 1:
        return log_ratios
    return (log_ratios - log_ratios.mean(1, keepdim=True)) * k / (k - 1)


def hypo_kl(logps, reference_logps):
    """(B, k) of samples from the policy -> (B,), whose expected gradient is that of KL(policy || reference).

    S1 Table 1 prints -lambda log(y|x) sg(pi/pi_SFT): pi is missing in the first logarithm, a logarithm
    in sg, and has the sign of an objective to maximise. The raw ratio would be the gradient of half the
    chi-squared divergence.
    """
    return (rloo_advantages((logps - reference_logps).detach()) * logps).mean(1)


# ----- sampling
def sample(policy, prompts, seeds, longest, end_id):
    """A response to each prompt, at most `longest` ids, of which the last is end_id if it ended by itself.

    The noise of a response has its own seed: neither the rest of the batch nor the number of processes
    changes what is drawn. All processes call this, also one without prompts.
    """
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False, recurse=False)
    with torch.no_grad():  # gathers all layers; then generate needs no other process, however long it takes
        train_dpo.sequence_logps(policy, [train_dpo.DUMMY])
    wanted = len(prompts)
    if not prompts:  # FSDP2 plans backward by the forwards it has seen, and all processes need one plan
        prompts, seeds, longest = [[end_id]], [0], 1
    packed, responses = policy.packed, [None] * len(prompts)
    policy.eval()  # activation checkpointing would forbid the cache of keys and values
    policy.pack(False)  # the model's own attention
    for batch in batches(prompts, packed):
        part = [prompts[index] for index in batch], [seeds[index] for index in batch]
        for index, response in zip(batch, generated(policy.model, *part, longest, end_id), strict=True):
            responses[index] = response
    policy.pack(packed)
    policy.train()
    train_dpo.release(policy)
    return responses[:wanted]


def batches(prompts, packed):
    """Lists of indices of prompts that share a batch: all, or if sequences do not share rows, those as long.

    What runs on from one sequence into the next may also run on from padding (RecurrentGemma, MiniMax).
    """
    batches = {}
    for index, prompt in enumerate(prompts):
        batches.setdefault(0 if packed else len(prompt), []).append(index)
    return batches.values()


def generated(model, prompts, seeds, longest, end_id):
    """Responses to a batch of prompts. argmax(logits - log E), E exponential, is a draw from the softmax."""
    from transformers import GenerationConfig

    noise = [torch.Generator(model.device).manual_seed(seed % 2**63) for seed in seeds]

    def disturbed(ids, logits):
        draws = torch.empty_like(logits)
        for row, generator in zip(draws, noise, strict=True):
            row.exponential_(generator=generator)
        return logits - draws.log()

    width = max(map(len, prompts))
    ids = torch.tensor([[end_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    kept = model.generation_config  # none of the model's own settings may act
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=longest, eos_token_id=end_id, pad_token_id=end_id
    )
    options = {"attention_mask": mask.to(model.device), "logits_processor": [disturbed]}
    with torch.no_grad():  # without synced_gpus=False, transformers waits in every token for other processes
        output = model.generate(ids.to(model.device), synced_gpus=False, **options)
    model.generation_config = kept
    rows = output[:, width:].tolist()
    return [row[: row.index(end_id) + 1] if end_id in row else row for row in rows]


def check_room(pairs, config, args):
    """Refuse prompts that leave no room for a sample in the model's context."""
    longest, context = max(pair.sequences[0].start for pair in pairs), context_length(config)
    if longest + args.max_new > context:
        sizes = f"the longest prompt has {longest} tokens, and the context of {args.model} is {context}"
        fail(f"{args.pairs}: no room for samples of --max-new {args.max_new}: {sizes}")


class Online:
    """forward_backward of train_dpo.py with samples; keeps the reference model."""

    def __init__(self, args):
        self.end_id = read_chat(args.model, args.revision, args.template_kwargs)[0].end_id
        self.reference = None

    def __call__(self, policy, pairs, args, step):
        if self.reference is None:
            revision = args.revision if args.reference == args.model else None
            self.reference = train_dpo.load_policy(args.reference, revision, args).requires_grad_(False)
            train_dpo.check_model(self.reference, pairs, args)
        samples = self.draw(policy, pairs, args, step)  # k for each pair
        flat = [sequence for sequences in samples for sequence in sequences]
        flat_logps = train_dpo.all_logps(self.reference, flat, 4 * args.micro_tokens)
        logps = [flat_logps[i : i + args.samples] for i in range(0, len(flat), args.samples)]
        if args.method == "online-dpo":
            pairs = [with_sample(*each) for each in zip(pairs, samples, logps, strict=True)]
            rows = train_dpo.forward_backward(policy, pairs, args, step)
        else:
            rows = train_dpo.forward_backward(policy, pairs, args, step)
            add_divergence(policy, pairs, samples, logps, args, rows)
        sampled = {pair.pair_id: sequences for pair, sequences in zip(pairs, samples, strict=True)}
        for row in rows:
            sequences = sampled[row["pair_id"]]
            if args.method == "hypo":
                row["tokens"] += sum(len(sequence.ids) for sequence in sequences)
            row["sample_tokens"] = sum(len(sequence.ids) - sequence.start for sequence in sequences) / len(
                sequences
            )
            truncated = sum(sequence.ids[-1] != self.end_id for sequence in sequences)
            row["sample_truncated"] = truncated / len(sequences)
        return rows

    def draw(self, policy, pairs, args, step):
        """args.samples sequences for each pair, on all processes; they share the work."""
        rank, world = train_dpo.rank_and_world()
        prompts, seeds = [], []
        for pair in pairs[rank::world]:
            chosen = pair.sequences[0]
            for i in range(args.samples):
                prompts.append(list(chosen.ids[: chosen.start]))
                seeds.append(stable_hash(args.seed, "sample", step, pair.pair_id, i))
        responses = sample(policy, prompts, seeds, args.max_new, self.end_id)
        sequences = []
        for prompt, response in zip(prompts, responses, strict=True):
            sequences.append(train_dpo.Sequence(prompt + response, len(prompt)))
        everyone = [None] * world
        dist.all_gather_object(everyone, sequences)
        remaining = [iter(each) for each in everyone]  # pair i belongs to process i % world
        drawn = []
        for index in range(len(pairs)):
            drawn.append(list(itertools.islice(remaining[index % world], args.samples)))
        return drawn


def add_divergence(policy, pairs, samples, reference_logps, args, rows):
    """Add the gradient of lambda times the mean divergence, and its metrics and loss to the rows."""
    lengths = [sum(len(sequence.ids) for sequence in sequences) for sequences in samples]
    mine, budget = [], policy.packed * args.micro_tokens
    for batch in train_dpo.micro_batches(lengths, budget, *train_dpo.rank_and_world()):
        sequences = [sequence for index in batch for sequence in samples[index]]
        logps, _ = train_dpo.sequence_logps(policy, sequences or [train_dpo.DUMMY] * args.samples)
        if not batch:
            (0 * logps.sum()).backward()
            continue
        logps = logps.view(len(batch), -1)  # (B, k)
        reference = logps.new_tensor([reference_logps[index] for index in batch])
        terms = args.hypo_lambda * hypo_kl(logps, reference)
        (terms.sum() / len(pairs)).backward()
        log_ratios = (logps - reference).detach()
        advantages = rloo_advantages(log_ratios).square().mean(1).sqrt()
        values = torch.stack([terms.detach(), log_ratios.mean(1), advantages]).T.tolist()
        mine += [(pairs[index].pair_id, value) for index, value in zip(batch, values, strict=True)]
    measured = dict(train_dpo.from_all_processes(mine))
    for row in rows:
        term, row["kl_est"], row["advantage_rms"] = measured[row["pair_id"]]
        row["loss"] += term


def with_sample(pair, sequences, logps):
    """The pair with the sample in place of the rejected response."""
    return pair._replace(
        sequences=[pair.sequences[0], *sequences], reference_logps=(pair.reference_logps[0], *logps)
    )


if __name__ == "__main__":
    try:
        args = parse_args()
        train_dpo.main(args, Online(args), check_room)
    except NotImplementedError as error:  # of packed_attention: samples may be longer than all pairs
        fail(f"prompt and sample cannot be packed into a row: {error}; use a smaller --max-new")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume from the last checkpoint")
