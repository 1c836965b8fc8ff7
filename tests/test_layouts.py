"""Row layouts: the same losses and gradients from each, for every loss, in every model that can
take it.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from test_mechanisms import Operations
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tbpo_cli.batch.batches import cut_to_span, micro_batches
from tbpo_cli.batch.layouts import LAYOUTS, collate
from tbpo_cli.batch.packing import Sequences, segments_of
from tbpo_cli.core import LOSSES, StateBaseline, build_loss
from tbpo_cli.data.tokens import TokenizedPair
from tbpo_cli.errors import TbpoError
from tbpo_cli.model import attention
from tbpo_cli.model.attention import BY_SEQUENCE, attend_by_sequence, in_one_kernel
from tbpo_cli.model.layout import apply_layout, choose_layout
from tbpo_cli.model.policy import NEGATIVE, POSITIVE, Policy
from tbpo_cli.model.scoring import Scorer
from tbpo_cli.train.metrics import measure, pair_weights

LENGTHS = [
    (5, 6, 4),
    (3, 1, 7),
    (9, 4, 1),
    (2, 5, 5),
    (1, 1, 1),
]  # tokens of prompt, chosen, rejected
SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
WINDOW = {"sliding_window": 8}
MODELS = {  # model type, further settings, and whether one row can hold several sequences
    "llama": ("llama", {}, True),
    "qwen2": ("qwen2", {}, True),
    "qwen3": ("qwen3", {}, True),
    "mistral": ("mistral", {"sliding_window": None}, True),
    "mistral, long window": ("mistral", {"sliding_window": 16}, True),
    "mistral, short window": ("mistral", WINDOW, False),
    "gemma2": ("gemma2", {**WINDOW, "query_pre_attn_scalar": 4}, False),
    "gemma2, capped scores": ("gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 4}, False),
    "gemma3, long window": ("gemma3_text", {"sliding_window": 64}, True),
    "gemma3": ("gemma3_text", WINDOW, False),
    "mamba": ("mamba", {"state_size": 4}, False),
    "linear attention": (
        "qwen3_next",
        {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
        False,
    ),
}


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    return [
        TokenizedPair(
            str(number), *(rng.integers(3, 61, size=length).tolist() for length in lengths)
        )
        for number, lengths in enumerate(LENGTHS)
    ]


def make_model(kind, seed=0):
    name, settings, _ = MODELS[kind]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **SMALL | settings)
    return AutoModelForCausalLM.from_config(config)


def make_scorer(kind="llama"):
    """A policy, other frozen models beside it, all different, and a baseline that is not zero."""
    policy = Policy(
        make_model(kind),
        {
            name: make_model(kind, seed).requires_grad_(False)
            for seed, name in enumerate(("reference", POSITIVE, NEGATIVE), start=1)
        },
    )
    baseline = StateBaseline(16)
    torch.nn.init.normal_(baseline.out.weight)
    return Scorer.of(policy, baseline)


def losses_and_gradients(scorer, loss, batches):
    """({pair: loss}, all gradients), over micro-batches."""
    per_pair = {}
    scorer.policy.model.zero_grad(set_to_none=True)
    scorer.baseline.zero_grad(set_to_none=True)
    for batch in batches:
        values = loss(scorer.score(batch, loss.needs)).per_pair
        values.sum().backward()
        per_pair |= dict(zip(batch.pair_ids, values.tolist(), strict=True))
    named = [*scorer.policy.model.named_parameters(), *scorer.baseline.named_parameters()]
    return per_pair, {name: p.grad for name, p in named if p.grad is not None}


def assert_same(got, want):
    assert got[0] == pytest.approx(want[0], rel=1e-4, abs=1e-5)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        torch.testing.assert_close(
            got[1][name], gradient, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def scorer():
    made = make_scorer()
    layout, _ = choose_layout(made.policy.models, "auto", longest=20)
    assert layout == "shared_prompt"
    apply_layout(made.policy.models, layout)
    return made


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    "loss",
    [
        *(pytest.param(build_loss(name), id=name) for name in LOSSES),
        pytest.param(build_loss("tbpo_a", sft_weight=0.5), id="tbpo_a and sft"),
    ],
)
def test_every_loss_has_the_same_values_and_gradients_in_every_layout_and_split(
    scorer, pairs, loss, checkpointing
):
    cut = [cut_to_span(pair, loss.span) for pair in pairs]
    one_by_one = losses_and_gradients(scorer, loss, [collate([pair], "padded") for pair in cut])
    model = (
        scorer.policy.model.train()
    )  # activation checkpointing is for training; there is no dropout here
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layout in LAYOUTS:
        for split in ([cut], [cut[:2], cut[2:]]):
            assert_same(
                losses_and_gradients(scorer, loss, [collate(part, layout) for part in split]),
                one_by_one,
            )
    model.gradient_checkpointing_disable()


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_given_the_layout_that_it_can_take(pairs, kind):
    *_, capable = MODELS[kind]
    scorer = make_scorer(kind)
    models = [scorer.policy.model, *scorer.policy.frozen.values()]
    loss = build_loss("tbpo_a")
    cut = [cut_to_span(pair, loss.span) for pair in pairs]
    one_by_one = losses_and_gradients(scorer, loss, [collate([pair], "padded") for pair in cut])
    layout, reason = choose_layout(models, "auto", longest=15)
    assert scorer.policy.model.config._attn_implementation != BY_SEQUENCE
    apply_layout(models, layout)
    assert (layout, scorer.policy.model.config._attn_implementation == BY_SEQUENCE) == (
        ("shared_prompt", True) if capable else ("padded", False)
    ), reason
    for each in LAYOUTS if capable else ["padded"]:
        assert_same(losses_and_gradients(scorer, loss, [collate(cut, each)]), one_by_one)
    if not capable:
        with pytest.raises(TbpoError, match="cannot take rows of several sequences"):
            choose_layout(models, "packed", longest=15)


# what `collate` makes of pairs: both responses, one of a single token, none, and no shared
# prompts
SEQUENCES = {
    "shared_prompt": Sequences((5, 3, 4, 2, 6, 7, 1, 1, 9), (0, 0, 0, 3, 3, 5, 6, 6, 6)),
    "packed": Sequences((4, 1, 6), (0, 1, 2)),
}


def random_states(sequences, device="cpu", dtype=torch.float32):
    """Query of 4 heads, key and value of 2, of size 8, for one row."""
    generator, total = torch.Generator().manual_seed(0), sum(sequences.lengths)
    states = [torch.randn(1, heads, total, 8, generator=generator) for heads in (4, 2, 2)]
    return [each.to(device, dtype).requires_grad_() for each in states]


def llama_attention():
    return make_model("llama").model.layers[0].self_attn


@pytest.mark.parametrize("kind", SEQUENCES)
def test_segments_let_each_token_see_what_its_sequence_says(kind):
    """Query i of a segment with n queries and m keys sees its first m − n + i + 1 keys: by
    softmax, head by head.
    """
    query, key, value = states = random_states(SEQUENCES[kind])
    expected, _ = attend_by_sequence(llama_attention(), *states, None, SEQUENCES[kind])
    segments, outputs = segments_of(SEQUENCES[kind]), []
    for (start, end), (first, last) in zip(
        segments.cu_seqlens_q.unfold(0, 2, 1).tolist(),
        segments.cu_seqlens_k.unfold(0, 2, 1).tolist(),
        strict=True,
    ):
        seen = segments.key_index[first:last]
        assert end - start <= segments.max_seqlen_q and last - first <= segments.max_seqlen_k
        scores = query[0, :, start:end] @ key[0].repeat_interleave(2, 0)[:, seen].mT / 8**0.5
        hidden = torch.ones(scores.shape[1:]).triu(last - first - (end - start) + 1).bool()
        outputs.append(
            scores.masked_fill(hidden, -torch.inf).softmax(-1)
            @ value[0].repeat_interleave(2, 0)[:, seen]
        )
    torch.testing.assert_close(
        torch.cat(outputs, dim=1).transpose(0, 1)[None], expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", SEQUENCES)
def test_the_one_kernel_takes_what_it_is_given_forward_and_backward(kind):
    """Of shapes alone ("meta"), where the kernel's own checks of its arguments run."""
    states = random_states(SEQUENCES[kind], "meta", torch.bfloat16)
    result = in_one_kernel(*states, segments_of(SEQUENCES[kind]).to("meta"), None)
    expected, _ = attend_by_sequence(
        llama_attention(), *random_states(SEQUENCES[kind]), None, SEQUENCES[kind]
    )
    assert (result.shape, result.dtype) == (expected.shape, torch.bfloat16)
    gradients = torch.autograd.grad(result.float().sum(), states)
    assert [each.shape for each in gradients] == [each.shape for each in states]


@pytest.mark.parametrize(
    "layout", ["shared_prompt", "packed"]
)  # for padded rows transformers' masks ask once a pass
@pytest.mark.parametrize("name", LOSSES)
def test_no_step_waits_for_the_device(pairs, name, layout, monkeypatch):
    """On "meta", whose tensors have no numbers, every question for one is an error: what a GPU
    would have to answer.
    """
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: nullcontext()
    )  # it does not know that device
    loss, meta, scorer = build_loss(name), torch.device("meta"), make_scorer()
    models = [scorer.policy.model, *scorer.policy.frozen.values()]
    for model in models:
        model.set_attn_implementation(BY_SEQUENCE)
        model.to(meta)
    scorer = Scorer.of(scorer.policy, scorer.baseline.to(meta))
    batch = collate([cut_to_span(pair, loss.span) for pair in pairs], layout).to(meta)
    optimizer = torch.optim.AdamW(scorer.policy.model.parameters())
    for diagnostics in (False, True):
        score = scorer.score_and_measure if diagnostics else scorer.score
        scores = score(batch, loss.needs)
        output = loss(scores)
        totals = measure(scores, output, loss)
        (output.per_pair * pair_weights(scores, loss)).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(scorer.policy.model.parameters(), 1.0)
        optimizer.step()
        assert norm.is_meta and all(total.is_meta for total, _ in totals.values())
    with pytest.raises((RuntimeError, NotImplementedError)):
        norm.item()


@pytest.mark.parametrize("kind", SEQUENCES)
def test_keys_and_values_are_copied_where_a_prompt_is_repeated_alone(kind):
    sequences = SEQUENCES[kind]
    pairs = zip(sequences.continues, range(len(sequences.lengths)), strict=True)
    repeats = any(number - prefix > 1 for prefix, number in pairs)
    states = random_states(sequences, "meta", torch.bfloat16)
    states = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in states]
    with Operations() as seen:
        in_one_kernel(*states, segments_of(sequences).to("meta"), None)
    assert seen.names["index_select"] == 2 * repeats
    assert seen.names["clone"] == seen.names["index"] == 0, "states are as attentions have them"


@pytest.mark.parametrize("kind", SEQUENCES)
def test_where_the_kernel_has_no_groups_keys_and_values_are_repeated(kind, monkeypatch):
    """As on torch 2.11: the kernel gets as many key heads as queries, and gradients the shapes of
    what was given.
    """
    monkeypatch.setattr(attention, "HAS_GROUPS", False)
    states = random_states(SEQUENCES[kind], "meta", torch.bfloat16)
    result = in_one_kernel(*states, segments_of(SEQUENCES[kind]).to("meta"), None)
    assert result.shape == (1, sum(SEQUENCES[kind].lengths), 4, 8)
    gradients = torch.autograd.grad(result.float().sum(), states)
    assert [each.shape for each in gradients] == [each.shape for each in states]


@pytest.mark.parametrize("kind", SEQUENCES)
def test_under_autocast_every_kernel_gets_queries_and_keys_in_its_dtype(kind, monkeypatch):
    """Rotary positions in fp32 leave them in fp32, beside values in bf16."""
    query, key, value = random_states(SEQUENCES[kind])
    given = set()

    def kernel(module, *states, **options):
        given.update(each.dtype for each in states if each is not None)
        return sdpa_attention_forward(module, *states, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", kernel)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = (query, key, value.detach().bfloat16())
        found, _ = attend_by_sequence(llama_attention(), *mixed, None, SEQUENCES[kind])
    assert given == {torch.bfloat16} and found.dtype == torch.bfloat16
    half = (each.detach().bfloat16() for each in (query, key, value))
    expected, _ = attend_by_sequence(llama_attention(), *half, None, SEQUENCES[kind])
    assert torch.equal(found, expected)


def test_the_attention_that_is_taken_is_named_and_what_the_fast_way_wants():
    model = make_model("llama")
    cpu = attention.describe_attention([model], torch.bfloat16, torch.device("cpu"))
    assert cpu == ("a call of torch's fused attention for each sequence", "")
    how, why = attention.describe_attention([model], torch.float32, torch.device("cuda"))
    assert how == cpu[0] and "takes half precision alone" in why


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("span", ["response", "chosen"])
def test_every_response_token_is_predicted_from_the_one_before_it(pairs, layout, span):
    cut = [cut_to_span(pair, span) for pair in pairs]
    batch = collate(cut, layout)
    responses = [
        (pair, ids)
        for side in ("chosen_ids", "rejected_ids")
        for pair in cut
        for ids in [getattr(pair, side)]
    ]
    assert batch.tokens.tolist() == [token for _, ids in responses for token in ids]
    before = [token for pair, ids in responses if ids for token in [pair.prompt_ids[-1], *ids[:-1]]]
    assert batch.input_ids.flatten()[batch.predictor].tolist() == before
    assert batch.position_ids.is_contiguous()  # XGLM takes nothing else
    positions = [len(pair.prompt_ids) - 1 + t for pair, ids in responses for t in range(len(ids))]
    assert batch.position_ids.flatten()[batch.predictor].tolist() == positions
    lengths = np.array(
        [[len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)] for pair in cut]
    )
    assert batch.input_ids.numel() <= LAYOUTS[layout].num_tokens(lengths)
    for side, column in ((batch.chosen, 1), (batch.rejected, 2)):
        assert side.mask.sum(dim=1).tolist() == lengths[:, column].tolist()
        assert side.mask.flatten().nonzero().flatten().tolist() == side.slots.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches_hold_every_pair_once_within_the_token_budget(layout):
    lengths = np.array([(3, 2, 4), (1, 1, 1), (9, 9, 2), (4, 4, 4), (2, 2, 2), (2, 3, 2)])
    for budget in (10, 24, 60, 1000):
        groups = micro_batches(lengths, budget, layout)
        assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
        assert all(
            len(group) == 1 or LAYOUTS[layout].num_tokens(lengths[group]) <= budget
            for group in groups
        )
    assert len(groups) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_is_moved_to_a_device_whole_and_unchanged_in_shape_and_type(pairs, layout):
    """To "meta", which every machine has; its tensors have no numbers."""
    batch = collate(pairs, layout)
    moved = batch.to(torch.device("meta"))

    def tensors(of):
        sides = (of.chosen.mask, of.chosen.slots, of.rejected.mask, of.rejected.slots)
        return [
            of.input_ids,
            of.position_ids,
            of.tokens,
            of.predictor,
            *sides,
            *(of.segments or ())[:3],
        ]

    for found, wanted in zip(tensors(moved), tensors(batch), strict=True):
        assert (found.device.type, found.shape, found.dtype) == ("meta", wanted.shape, wanted.dtype)
    assert (moved.pair_ids, moved.sequences, moved.num_tokens) == (
        batch.pair_ids,
        batch.sequences,
        batch.num_tokens,
    )
    assert (moved.segments or ())[3:] == (batch.segments or ())[3:]
    assert batch.to(torch.device("cpu")) is batch
