"""`tbpo losses` says what the classes say."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tbpo_cli.cli.losses import as_text, descriptions
from tbpo_cli.cli.main import app
from tbpo_cli.config.recipe import load_recipe
from tbpo_cli.core import GENERATORS, LOSSES
from tbpo_cli.errors import TbpoError


def described(name):
    return next(each for each in descriptions() if each.name == name)


def test_it_prints_every_loss_with_its_formula_keys_and_source():
    result = CliRunner().invoke(app, ["losses"])
    assert result.exit_code == 0
    for name in LOSSES:
        each = described(name)
        assert f"\n{name}\n" in f"\n{result.output}"
        for text in (each.fields, each.source, each.when):
            assert " ".join(text.split()) in " ".join(result.output.split())
        assert each.source.startswith("arXiv ") or name == "sft"
    assert "softplus(z), z = β (Σr^l − Σr^w)" in result.output


@pytest.mark.parametrize("name", [*LOSSES, *GENERATORS])
def test_with_a_name_only_that_loss_or_generator_is_described(name):
    result = CliRunner().invoke(app, ["losses", name])
    first, *others = result.output.splitlines()
    assert result.exit_code == 0 and first in (name, f"generator {name}")
    assert others and all(line.startswith("  ") for line in others), "one paragraph"


@pytest.mark.parametrize(("name", "fix"), [("nope", "tbpo losses"), ("sigmoid", "tbpo losses dpo")])
def test_an_unknown_name_is_answered_with_the_list(tbpo, name, fix):
    done = tbpo("losses", name)
    assert done.returncode == 2 and f"there is no loss '{name}'" in done.stderr
    assert f"expected: one of {', '.join([*LOSSES, *GENERATORS])}" in done.stderr
    assert done.stderr.endswith(f"fix: {fix}\n")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("exo_pair", 'it is not offered; of the losses of pairs, name = "dpo" is the usual one'),
        ("KTO", "it trains on single answers that are marked good or bad, and is not offered"),
        ("dpo-norm", "tbpo losses dpo_norm"),
        ("Sigmoid", "tbpo losses dpo"),
        ("klieb", "tbpo losses kliep"),
    ],
)
def test_an_unknown_name_is_answered_as_in_a_recipe(name, fix):
    with pytest.raises(TbpoError) as error:
        as_text(name)
    assert error.value.fix.startswith(fix)


def test_what_holds_with_lora_alone_is_said_of_tbpo_a():
    said = " ".join(as_text("tbpo_a").split())
    assert "where all weights are trained, its steps compute them as well" in said
    assert "with LoRA, a step takes 0.83 times dpo's" in said
    assert "where all weights are trained" not in as_text("dpo")


def test_the_table_is_of_all_losses_and_takes_no_name(tbpo):
    done = tbpo("losses", "--markdown", "wpo")
    assert done.returncode == 2 and not done.stdout
    assert "cannot make one of wpo alone" in done.stderr
    assert done.stderr.endswith("fix: tbpo losses wpo\n")


def test_as_markdown_it_is_a_row_a_loss():
    result = CliRunner().invoke(app, ["losses", "--markdown"])
    rows = result.output.strip().splitlines()
    assert len(rows) == 2 + len(LOSSES)
    assert {row.count(" | ") for row in rows} == {6}


def test_what_a_step_costs_is_what_was_measured_of_every_loss():
    path = Path(__file__).parent / "benchmarks/results/loss_costs.json"
    measured = {row["loss"]: row["cost"] for row in json.loads(path.read_text())["rows"]}
    assert {each.name: each.cost for each in descriptions()} == measured
    assert measured["dpo"] == 1 and measured["sft"] < measured["simpo"] < 1 < measured["tis_dpo"]


def test_what_a_loss_needs_is_what_its_statistics_cost():
    assert described("tbpo_a").needs == "a reference"
    assert described("tbpo_q").needs == "a reference, a learned baseline, policy logits"
    assert described("dpo").needs == "a reference, policy logits"
    assert described("simpo").needs == "policy logits"
    assert described("tis_dpo").needs == "a reference, two helper policies, policy logits"
    assert described("tgdpo").needs == "a reference, a helper policy, policy logits"
    assert described("tbpo_a").compares == "tokens"
    assert described("dpo").compares == "whole responses"


@pytest.mark.parametrize("name", LOSSES)
def test_its_fields_are_keys_that_a_recipe_takes(recipe_file, name):
    """With their defaults."""
    fields = [f"name = '{name}'", described(name).fields]
    table = "{" + ", ".join(filter(None, fields)) + "}"
    assert load_recipe(recipe_file, (f"align.loss={table}",)).align.loss == LOSSES[name]()
