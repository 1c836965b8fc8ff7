"""From a batch to scores with real models: what the scorer computes, and which model the
reference is.
"""

import json
import shutil
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from conftest import change_recipe, run_stage
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tbpo_cli.batch.batches import cut_to_span
from tbpo_cli.batch.layouts import collate
from tbpo_cli.config.recipe import Lora, load_recipe
from tbpo_cli.core import StateBaseline, build_loss, oracle
from tbpo_cli.core.head import DIAGNOSTICS, STATISTICS
from tbpo_cli.data.store import PairStore
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.preference import pair_rows
from tbpo_cli.model.heads import read_head
from tbpo_cli.model.load import add_helper, load_policy
from tbpo_cli.model.policy import POLICY
from tbpo_cli.model.scoring import Scorer

CPU = torch.device("cpu")


@pytest.fixture
def recipe(recipe_file):
    return load_recipe(recipe_file)


@pytest.fixture(scope="module")
def pairs(trained):
    store = PairStore(trained / "run/prepare/train")
    return [store[i] for i in range(5)]


def disturb(policy, scale=0.05):
    """Moves every trained weight, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trained.values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def dense_scores(policy, pairs):
    """The oracle on logits of the models themselves, one response at a time: no layout, no
    padding of rows.
    """
    sides = []
    for responses in ([pair.chosen_ids for pair in pairs], [pair.rejected_ids for pair in pairs]):
        width = max(map(len, responses))
        mask = torch.arange(width) < torch.tensor([len(r) for r in responses])[:, None]
        tokens = torch.zeros(mask.shape, dtype=torch.int64)
        tokens[mask] = torch.cat([torch.tensor(r, dtype=torch.int64) for r in responses])
        logits = {"policy": [], "reference": []}
        for pair, response in zip(pairs, responses, strict=True):
            ids = torch.tensor([[*pair.prompt_ids, *response[:-1]]])
            with policy.view("reference") as reference:
                dense = {"reference": reference(ids).logits[0]}
            dense["policy"] = policy.model(ids).logits[0]
            for name, rows in dense.items():
                logits[name].append(
                    torch.nn.functional.pad(
                        rows[-len(response) :], (0, 0, 0, width - len(response))
                    )
                )
        stacked = [torch.stack(logits[name]) for name in ("policy", "reference")]
        sides.append(oracle.side_scores(*stacked, tokens, mask))
    return sides


def assert_same_scores(got, want, names, **tolerance):
    for side, dense in zip((got.chosen, got.rejected), want, strict=True):
        for name in names:
            torch.testing.assert_close(
                getattr(side, name)[side.mask],
                getattr(dense, name)[side.mask],
                msg=lambda m, n=name: f"{n}: {m}",
                **tolerance,
            )


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    "needs", [["advantage"], ["log_ratio"], ["kl", "log_ratio"], ["logps"]], ids="-".join
)
def test_scores_and_gradients_equal_the_dense_oracle_on_the_models_own_logits(
    recipe, pairs, lora, needs
):
    if not lora:
        recipe = replace(recipe, model=replace(recipe.model, lora=None))
    policy = load_policy(recipe, CPU, None, with_reference=True)
    disturb(policy)
    policy.model.eval()
    batch = collate(pairs, "padded")
    scores = Scorer.of(policy).score_and_measure(batch, frozenset(needs))
    dense = dense_scores(policy, pairs)
    assert_same_scores(scores, dense, DIAGNOSTICS, rtol=1e-4, atol=2e-5)

    parameters = list(policy.trained.values())
    gradients = []
    for sides in ((scores.chosen, scores.rejected), dense):
        value = sum(
            getattr(side, name)[batch_side.mask].square().sum()
            for side, batch_side in zip(sides, (batch.chosen, batch.rejected), strict=True)
            for name in needs
        )
        gradients.append(torch.autograd.grad(value, parameters, allow_unused=True))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_only_what_is_needed_is_computed(recipe, pairs):
    policy = load_policy(recipe, CPU, None, with_reference=True)
    scores = Scorer.of(policy).score(collate(pairs, "padded"), frozenset({"logps"}))
    filled = {name for name in STATISTICS if getattr(scores.chosen, name) is not None}
    assert filled == {"logps"}


def test_an_unknown_head_falls_back_to_the_models_own_logits_with_one_warning(
    recipe, pairs, caplog
):
    class Doubled(torch.nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    policy = load_policy(recipe, CPU, None, with_reference=True)
    disturb(policy)
    policy.model.eval()
    causal = policy.model.get_base_model()
    head = Doubled(32, causal.config.vocab_size, bias=False)
    head.weight = causal.lm_head.weight
    causal.lm_head = head
    scorer = Scorer.of(policy)
    assert (
        scorer.heads[POLICY] is None
        and len([r for r in caplog.records if "output head" in r.message]) == 1
    )
    with pytest.raises(TbpoError, match="needs a model with a linear output head"):
        Scorer.of(policy, StateBaseline(32))
    batch = collate(pairs, "padded")
    scores = scorer.score_and_measure(batch, frozenset({"advantage"}))
    assert_same_scores(scores, dense_scores(policy, pairs), DIAGNOSTICS, rtol=1e-4, atol=2e-5)


def test_a_linear_head_with_a_constant_factor_is_recognised(tmp_path, tokenizer):
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        logit_scale=0.25,
        max_position_embeddings=64,
        bos_token_id=None,
    )
    assert read_head(CohereForCausalLM(config)).scale == 0.25


def test_tokens_past_the_aligned_length_change_nothing(recipe, pairs):
    """Cutting the pairs before the forward pass gives the same TBPO loss and gradient as reading
    them whole.
    """
    policy = load_policy(recipe, CPU, None, with_reference=True)
    disturb(policy)
    policy.model.eval()
    loss, scorer = build_loss("tbpo_a"), Scorer.of(policy)
    results = []
    for batch in (
        collate(pairs, "padded"),
        collate([cut_to_span(p, "aligned") for p in pairs], "padded"),
    ):
        per_pair = loss(scorer.score(batch, loss.needs)).per_pair
        gradient = torch.autograd.grad(per_pair.sum(), list(policy.trained.values()))
        results.append((per_pair, torch.cat([g.flatten() for g in gradient])))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-7)


def test_only_the_positions_that_the_loss_reads_are_scored(recipe, pairs):
    """TBPO: the first T of each side; DPO: both whole responses; SFT: the chosen ones. Never
    prompt or padding.
    """
    lengths = [(len(p.chosen_ids), len(p.rejected_ids), p.aligned_length) for p in pairs]
    expected = {
        "tbpo_a": sum(2 * aligned for *_, aligned in lengths),
        "dpo": sum(chosen + rejected for chosen, rejected, _ in lengths),
        "sft": sum(chosen for chosen, *_ in lengths),
        "tbpo_a and sft": sum(chosen + aligned for chosen, _, aligned in lengths),
    }
    assert len(set(expected.values())) == 4
    for name, count in expected.items():
        name, _, with_sft = name.partition(" and ")
        loss = build_loss(name, sft_weight=0.1) if with_sft else build_loss(name)
        cut = [cut_to_span(pair, loss.span) for pair in pairs]
        batch = collate(cut, "padded")
        assert len(batch.predictor) == len(batch.predictor.unique()) == count


def test_no_gradient_of_the_state_baseline_reaches_the_policy(recipe, pairs):
    policy = load_policy(recipe, CPU, None, with_reference=True)
    baseline = StateBaseline(32)
    torch.nn.init.ones_(baseline.out.weight)
    scores = Scorer.of(policy, baseline).score(
        collate(pairs, "padded"), frozenset({"log_ratio", "state_baseline"})
    )
    value = scores.chosen.state_baseline.sum()
    assert all(
        g is None
        for g in torch.autograd.grad(
            value, list(policy.trained.values()), allow_unused=True, retain_graph=True
        )
    )
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(value, list(baseline.parameters())))


def test_without_training_policy_and_reference_are_the_same(recipe, pairs):
    policy = load_policy(recipe, CPU, None, with_reference=True)
    policy.model.eval()
    scores = Scorer.of(policy).score(
        collate(pairs, "padded"), DIAGNOSTICS - {"reverse_kl", "entropy"}
    )
    assert scores.chosen.log_ratio.abs().max() == 0 and scores.rejected.advantage.abs().max() < 1e-6


def test_a_token_whose_advantage_is_that_of_the_other_side_is_not_counted_as_better(recipe, pairs):
    """One response on both sides: each position ties, and a tie is not a preference."""
    policy = load_policy(recipe, CPU, None, with_reference=True)
    disturb(policy)
    policy.model.eval()
    alike = [replace(pair, rejected_ids=pair.chosen_ids) for pair in pairs]
    for one in alike:
        batch = replace(collate([one], "padded"), indices=(0,))
        (row,) = pair_rows(Scorer.of(policy), POLICY, batch)
        assert row["aligned"] == len(one.chosen_ids) and row["kl"] > 0
        assert (row["token_accuracy"], row["log_ratio"]) == (0, 0)


def test_dropout_is_off_in_the_reference_and_on_in_the_policy(recipe, pairs):
    policy = load_policy(recipe, CPU, None, with_reference=True)
    disturb(policy)
    policy.model.train()
    scorer, batch = Scorer.of(policy), collate(pairs, "padded")
    first, second = (
        scorer.score(batch, frozenset({"logps", "log_ratio"})).chosen for _ in range(2)
    )
    assert not torch.equal(first.logps, second.logps), "LoRA dropout draws anew"
    torch.testing.assert_close(
        first.logps - first.log_ratio, second.logps - second.log_ratio, rtol=0, atol=1e-5
    )
    assert policy.model.training


# ---------------------------------------------------------------------------- which reference it is


def reference_logps(policy, pairs):
    batch = collate(pairs, "padded")
    with torch.no_grad():
        side = Scorer.of(policy).score(batch, frozenset({"logps", "log_ratio"})).chosen
    return (side.logps - side.log_ratio)[side.mask]


def plain_logps(model, pairs):
    """log-probabilities of the chosen responses by the bare transformers model."""
    found = []
    for pair in pairs:
        ids = torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]])
        with torch.no_grad():
            logps = model.eval()(ids).logits[0, :-1].log_softmax(-1)
        count = len(pair.chosen_ids)
        found.append(logps[-count:].gather(-1, ids[0, -count:, None]).squeeze(-1))
    return torch.cat(found)


SETTINGS = {
    "adapter off": (True, False),
    "sft adapter": (True, True),
    "frozen copy": (False, True),
    "full": (False, False),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_reference_is_the_model_the_recipe_names_and_never_moves(
    setting, recipe_file, tmp_path, base
):
    """Through the real stages: train, then compare the reference with the base (or what sft made)
    loaded by itself.
    """
    from tbpo_cli.train.loop import train
    from tbpo_cli.train.run import TrainingRun

    lora, with_sft = SETTINGS[setting]
    if not lora:
        change_recipe(recipe_file, model={"lora": None})
    if with_sft:
        sft = {"batch_examples": 8, "max_steps": 3, "learning_rate": 1e-2}
        change_recipe(recipe_file, sft=sft)
    recipe, run = load_recipe(recipe_file), tmp_path / "run"
    run_stage("sft" if with_sft else "prepare", recipe_file, run)
    sft_output = run / "sft" / ("adapter" if lora else "model") if with_sft else None

    named = AutoModelForCausalLM.from_pretrained(
        sft_output if with_sft and not lora else base, dtype=torch.float32
    )
    untouched = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if with_sft and lora:
        named = PeftModel.from_pretrained(named, sft_output)
    stores = [PairStore(run / "prepare" / split) for split in ("train", "eval")]
    pairs = [stores[1][i] for i in range(len(stores[1]))]
    expected = plain_logps(named, pairs)
    assert with_sft == (not torch.allclose(expected, plain_logps(untouched, pairs), atol=1e-3))

    policy = load_policy(recipe, CPU, sft_output, with_reference=True)
    torch.testing.assert_close(reference_logps(policy, pairs), expected, rtol=1e-4, atol=1e-4)
    before = reference_logps(policy, pairs)
    folder = tmp_path / "align"
    folder.mkdir()
    train(TrainingRun(policy, recipe.align.loss, recipe.align, *stores, folder, 0))
    assert torch.equal(reference_logps(policy, pairs), before), (
        "the reference moved during training"
    )
    policy.model.eval()
    moved = plain_logps(policy.model, pairs) - expected
    assert moved.abs().max() > 1e-3, "the policy did not move"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["split"] == "eval" and abs(lines[0]["kl"]) < 1e-6 < lines[-1]["kl"]


@pytest.mark.parametrize("initial_weights", ["pretrained", "random"])
def test_full_fine_tuning_computes_in_fp32_on_cpu_and_saves_in_the_dtype_of_the_base(
    recipe, tmp_path, base, initial_weights
):
    from safetensors.torch import load_file

    folder = tmp_path / "bf16"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    model = replace(recipe.model, base=str(folder), lora=None, initial_weights=initial_weights)
    policy = load_policy(replace(recipe, model=model), CPU, None, with_reference=False)
    assert {p.dtype for p in policy.trained.values()} == {torch.float32}
    policy.save(tmp_path / "model")
    assert {t.dtype for t in load_file(tmp_path / "model/model.safetensors").values()} == {
        torch.bfloat16
    }
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"


def test_target_modules_that_do_not_exist_are_refused(recipe):
    recipe = replace(recipe, model=replace(recipe.model, lora=Lora(target_modules=("nonsense",))))
    with pytest.raises(TbpoError, match="adapter does not fit"):
        load_policy(recipe, CPU, None, with_reference=True)


def test_a_view_is_what_peft_makes_of_its_adapter_and_leaves_everything_as_it_was(recipe):
    """Of the base, by `disable_adapter`; of another adapter, by `set_adapter`. Afterwards dropout
    is on again where it was, and the weights that are trained have gradients.
    """
    policy = load_policy(recipe, CPU, None, with_reference=True)
    model, ids = policy.model, torch.arange(5, 25)[None]
    model.add_adapter("positive", policy.adapters[POLICY])
    model.set_adapter(POLICY)
    disturb(policy)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".positive." in name:
                weight.add_(0.1)
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        wanted = {"reference": model(ids).logits}
    model.set_adapter("positive")
    wanted["positive"] = model(ids).logits.detach()
    model.set_adapter(POLICY)
    policy.train()
    trained = set(policy.trained)
    dropout = {name for name, module in model.named_modules() if module.training}
    assert any(".lora_dropout." in name for name in dropout)
    for name, logits in wanted.items():
        with policy.view(name) as view:
            assert torch.equal(view(ids).logits, logits), name
            assert not any(module.training for module in view.modules())
        assert {name for name, module in model.named_modules() if module.training} == dropout
        assert set(policy.trained) == trained
    assert not torch.equal(wanted["reference"], wanted["positive"])


def test_views_of_an_adapter_that_trains_single_tokens_are_those_of_peft(recipe, base, tmp_path):
    """peft's layer of such tokens takes its state from its class until it is set."""
    ids = torch.arange(5, 25)[None]
    options = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [6, 7, 8]}
    for seed, folder in enumerate(("start", "positive")):
        torch.manual_seed(seed)
        source = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = get_peft_model(source, LoraConfig(**options, task_type="CAUSAL_LM"))
        with torch.no_grad():
            for weight in adapted.parameters():
                if weight.requires_grad:
                    weight.add_(0.2 * torch.randn(weight.shape))
        adapted.save_pretrained(tmp_path / folder)

    source = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = PeftModel.from_pretrained(source, tmp_path / "start", adapter_name=POLICY).eval()
    plain.load_adapter(tmp_path / "positive", adapter_name="positive")
    with torch.no_grad():
        wanted = {POLICY: plain(ids).logits}
        with plain.disable_adapter():
            wanted["reference"] = plain(ids).logits
        plain.set_adapter("positive")
        wanted["positive"] = plain(ids).logits

    policy = load_policy(recipe, CPU, None, with_reference=True, start=str(tmp_path / "start"))
    add_helper(policy, "positive", str(tmp_path / "positive"), recipe.model, CPU)
    for name in [*wanted, *reversed(wanted)]:
        with policy.view(name) as view:
            logits = view(ids).logits
        torch.testing.assert_close(logits, wanted[name], rtol=1e-4, atol=1e-4)
    apart = [(wanted[a] - wanted[b]).abs().max() for a, b in combinations(wanted, 2)]
    assert min(apart) > 0.01


def test_a_view_goes_over_no_modules_once_the_training_has_begun(recipe, monkeypatch):
    """2,665 modules of a model with 32 layers took the host 37 ms a micro-batch, and now 0.8 ms."""
    policy = load_policy(recipe, CPU, None, with_reference=True)
    policy.train()
    with policy.view("reference"):
        pass

    def refuse(self, *_):
        raise AssertionError("all modules are visited")

    monkeypatch.setattr(torch.nn.Module, "named_modules", refuse)
    monkeypatch.setattr(torch.nn.Module, "train", refuse)
    policy.train()
    with policy.view("reference"):
        pass
