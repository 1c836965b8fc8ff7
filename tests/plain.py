"""A second implementation of training, by transformers, peft and torch alone.

Dense logits, no fused layer, no cache, no packing: each response in a pass of its own.
Nothing of `tbpo_cli` is imported. Every step reads all pairs, so that their order plays no part.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

BASELINE_WIDTH = 1024
MAX_LOG_RATIO = 30.0
MAX_STATE_BASELINE = 10.0


@dataclass(frozen=True)
class Settings:
    """What the two implementations are given alike; the defaults are none of the product's."""

    loss: str  # "tbpo_a", "tbpo_q", "dpo", "tis_dpo" or "sft"
    num_steps: int
    beta: float = 0.3
    learning_rate: float = 2e-3
    warmup: float = 0.2
    schedule: str = "linear"
    weight_decay: float = 0.05
    max_grad_norm: float = 0.5
    seed: int = 7


@dataclass
class Result:
    """Of every step, before it: the loss and other figures; the weights after the last one."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)  # before they are clipped
    figures: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """A model's dense view of one response: for each token, the distribution it was drawn from."""

    log_probs: torch.Tensor  # (T, V)
    tokens: torch.Tensor  # (T,)
    states: torch.Tensor  # (T, H), what the output head reads

    @property
    def logps(self):
        return self.log_probs.gather(-1, self.tokens[:, None]).squeeze(-1)


def tokenize(tokenizer, row):
    """(prompt ids, {side: response ids}), cut where the chat template's end of turn is."""
    user = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=False)
    responses = {}
    for side in ("chosen", "rejected"):
        answer = {"role": "assistant", "content": row[side]}
        text = tokenizer.apply_chat_template([*user, answer], tokenize=False)
        assert text.startswith(prompt)
        end = text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
        responses[side] = tokenizer.encode(text[len(prompt) : end], add_special_tokens=False)
    return tokenizer.encode(prompt, add_special_tokens=False), responses


def read(model, prompt, response):
    """One pass over one sequence. Position i of the logits predicts token i + 1."""
    ids = torch.tensor([prompt + response])
    states = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    output = model(input_ids=ids, use_cache=False)
    hook.remove()
    predicting = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
    log_probs = output.logits[0, predicting].float().log_softmax(-1)
    return Side(log_probs, torch.tensor(response), states[-1][0, predicting])


def scaled_basu(log_ratio):
    """L_h of the paper's generator: sba with λ = 0 and scale 4."""
    z = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (z.exp() + z) / 4


def rank_weights(scores):
    """TIS-DPO's: ranks from 0.7 to 1.3; the last token has none, and a token without a rival 1."""
    *ranked, _ = scores.tolist()
    if len(ranked) < 2:
        return torch.tensor([1.0] * max(1, len(ranked)) + [0.0] * len(ranked))
    order = sorted(range(len(ranked)), key=lambda place: ranked[place])
    weights = [0.7 + 0.6 * order.index(place) / (len(ranked) - 1) for place in range(len(ranked))]
    return torch.tensor([*weights, 0.0])


def loss_of_pair(settings, policy, reference, baseline, helpers):
    """The loss of one pair, from {"chosen": Side, "rejected": Side} of each model."""
    ratio = {side: policy[side].logps - reference[side].logps for side in policy}
    if settings.loss == "dpo":
        margin = ratio["chosen"].sum() - ratio["rejected"].sum()
        return F.softplus(-settings.beta * margin)
    if settings.loss == "tis_dpo":
        total = 0.0
        for side, sign in (("chosen", 1), ("rejected", -1)):
            positive, negative = (helper[side].logps for helper in helpers)
            weights = rank_weights(sign * (positive - negative))
            total = total + sign * (weights * ratio[side]).sum()
        return F.softplus(-settings.beta * total)
    length = min(len(policy["chosen"].tokens), len(policy["rejected"].tokens))
    if settings.loss == "tbpo_a":
        score = {}
        for side in policy:
            log_ref = reference[side].log_probs
            kl = (log_ref.exp() * (log_ref - policy[side].log_probs)).sum(-1)
            score[side] = (ratio[side] + kl)[:length]
        log_weight = 0.0
    else:
        score = {side: ratio[side][:length] for side in policy}
        state = {side: baseline(policy[side].states.detach())[:length, 0] for side in policy}
        difference = state["rejected"] - state["chosen"]
        log_weight = difference - difference.mean()
        log_weight = log_weight.clamp(-MAX_STATE_BASELINE, MAX_STATE_BASELINE)
    log_ratio = settings.beta * (score["rejected"] - score["chosen"] + log_weight)
    return scaled_basu(log_ratio).mean()


def figures_of(beta, own, other):
    """Sums over a pair, and what they are means over, by the names that metrics.jsonl has."""
    log_refs = {side: other[side].log_probs for side in other}
    kl = [
        (log_refs[side].exp() * (log_refs[side] - own[side].log_probs)).sum() for side in log_refs
    ]
    counts = [len(own[side].tokens) for side in log_refs]
    reward = {side: beta * (own[side].logps - other[side].logps).sum().item() for side in other}
    return {
        "logps_chosen": (own["chosen"].logps.sum().item(), counts[0]),
        "logps_rejected": (own["rejected"].logps.sum().item(), counts[1]),
        "kl": (sum(kl).item(), sum(counts)),
        "reward_chosen": (reward["chosen"], 1),
        "reward_rejected": (reward["rejected"], 1),
        "margin": (reward["chosen"] - reward["rejected"], 1),
        "accuracy": (reward["chosen"] > reward["rejected"], 1),
    }


def make_baseline(hidden_size, seed):
    """b_φ: its first layer drawn from the seed, its last one zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = torch.nn.Linear(hidden_size, BASELINE_WIDTH)
        last = torch.nn.Linear(BASELINE_WIDTH, 1)
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    return torch.nn.Sequential(first, torch.nn.GELU(), last)


def rate_of(settings, step):
    """A linear rise over the warm-up, then a fall that reaches zero after the last step."""
    warmup = math.ceil(settings.warmup * settings.num_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    share = (step - warmup) / (settings.num_steps - warmup)
    fall = {"linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
    return settings.learning_rate * fall[settings.schedule]


def greedy(model, prompt, stop_ids, num_tokens):
    """The likeliest tokens, one after the other, each from a pass over all before it."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + num_tokens:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] in stop_ids:
                break
    return ids[len(prompt) :]


def train(base, rows, settings, adapter=None, helpers=()):
    """Trains on all rows in every step.

    Args:
        base: the folder of the model that is trained.
        rows: with prompt, chosen and rejected.
        settings: of the training.
        adapter: of the base, to train instead of all weights.
        helpers: adapters of the base, TIS-DPO's positive and negative one.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    pairs = [tokenize(tokenizer, row) for row in rows]

    def load(adapter):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        return (
            model
            if adapter is None
            else PeftModel.from_pretrained(model, adapter, is_trainable=True)
        )

    policy, reference = load(adapter), load(adapter).requires_grad_(False)
    frozen = [load(helper).requires_grad_(False) for helper in helpers]
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    optimizers = [
        torch.optim.AdamW(
            trained.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
    ]
    baseline = None
    if settings.loss == "tbpo_q":
        baseline = make_baseline(policy.get_input_embeddings().weight.shape[1], settings.seed)
        optimizers.append(torch.optim.AdamW(baseline.parameters(), lr=1e-3, weight_decay=0.0))
    result = Result()
    for step in range(settings.num_steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = 0.0
        of_pairs = []
        count = sum(len(r["chosen"]) for _, r in pairs) if settings.loss == "sft" else len(pairs)
        for prompt, responses in pairs:
            if settings.loss == "sft":
                one = -read(policy, prompt, responses["chosen"]).logps.sum()
            else:
                own = {side: read(policy, prompt, ids) for side, ids in responses.items()}
                with torch.no_grad():
                    other, *helped = (
                        {side: read(model, prompt, ids) for side, ids in responses.items()}
                        for model in (reference, *frozen)
                    )
                one = loss_of_pair(settings, own, other, baseline, helped)
                of_pairs.append(figures_of(settings.beta, own, other))
            (one / count).backward()
            loss += one.item() / count
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), settings.max_grad_norm)
        result.grad_norms.append(norm.item())
        for group in optimizers[0].param_groups:
            group["lr"] = rate_of(settings, step)
        for optimizer in optimizers:
            optimizer.step()
        result.losses.append(loss)
        means = {}
        for name in of_pairs[0] if of_pairs else ():
            sums, counts = zip(*(figures[name] for figures in of_pairs), strict=True)
            means[name] = sum(sums) / sum(counts)
        result.figures.append(means)
    result.weights = {name: p.detach() for name, p in trained.items()}
    return result
