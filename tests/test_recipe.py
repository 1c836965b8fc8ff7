"""A recipe is checked as a whole, completed with defaults, and means the same written out."""

import math
from pathlib import Path

import pytest
import tomli_w
from conftest import merged

from tbpo_cli.cli.main import Call
from tbpo_cli.config.recipe import Source, load_recipe
from tbpo_cli.core import GENERATORS, LOSSES
from tbpo_cli.errors import TbpoError


@pytest.fixture
def load(tmp_path):
    def load(tables, *overrides):
        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(tables), encoding="utf-8")
        return load_recipe(path, overrides)

    return load


SMALL = {"model": {"base": "org/model"}, "data": {"train": "org/pairs"}}


def faults(error):
    first = error.value
    return [first, *first.also]


def test_only_the_base_and_the_training_rows_have_no_default(load):
    recipe = load(SMALL)
    assert recipe.run.name == "recipe" and recipe.sft is None and recipe.model.lora is None
    assert recipe.align.epochs == 1.0 and recipe.align.loss_name == "tbpo_a"
    with pytest.raises(TbpoError) as error:
        load({})
    assert [fault.what for fault in faults(error)] == ["model is missing", "data is missing"]


def test_the_resolved_recipe_writes_out_every_default_and_loads_to_itself(load, tmp_path):
    recipe = load(merged(SMALL, {"model": {"lora": {}}, "sft": {}}))
    written = tmp_path / "resolved.toml"
    written.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(written, ("run.name=recipe",)) == recipe
    assert 'base = "org/model"' in recipe.to_toml() and "label_smoothing = 0.0" in recipe.to_toml()


def test_all_faults_are_reported_at_once_with_the_nearest_name(load):
    with pytest.raises(TbpoError) as error:
        load(
            {
                "model": {"base": "a/b", "dtyp": "auto"},
                "data": {"train": 4, "overlong": "dorp"},
                "align": {"learning_rate": "1e-3", "loss": {"name": "tbpo_b"}},
                "pusj": {"repo": "x"},
            }
        )
    message = str(error.value)
    assert "model.dtyp is an unknown key" in message and "did you mean model.dtype?" in message
    assert "data.train = 4 is not possible" in message
    assert 'overlong = "drop"' in message
    assert 'align.learning_rate = "1e-3" is not possible' in message and "a number" in message
    assert "align.loss.name = 'tbpo_b' is unknown" in message and 'name = "tbpo_q"' in message
    assert "pusj is an unknown table" in message and "did you mean push?" in message
    assert message.count("error:") == message.count("  where:") == message.count("  fix:") == 6


DPO = {"name": "dpo"}


@pytest.mark.parametrize(
    ("tables", "what", "expected"),
    [
        ({"model": {"lora": {"r": 0}}}, "model.lora.r = 0 is not possible", "at least 1"),
        (
            {"align": {"batch_pairs": 2.5}},
            "align.batch_pairs = 2.5 is not possible",
            "a whole number",
        ),
        (
            {"align": {"batch_pairs": True}},
            "align.batch_pairs = true is not possible",
            "a whole number",
        ),
        (
            {"align": {"learning_rate": math.nan}},
            "align.learning_rate = NaN is not possible",
            "a finite number",
        ),
        (
            {"align": {"epochs": 1, "max_steps": 2}},
            "align.epochs is not possible",
            "left out where max_steps is given",
        ),
        ({"align": {"loss": 3}}, "align.loss is not a table", "that loss's own keys"),
        (
            {"align": {"loss": DPO | {"beta": -1}}},
            "align.loss.beta is not possible",
            "must be a finite number above 0",
        ),
        (
            {"align": {"loss": DPO | {"beta": "x"}}},
            'align.loss.beta = "x" is not possible',
            "a number",
        ),
        (
            {"align": {"loss": DPO | {"gama": 1}}},
            "align.loss.gama is an unknown key",
            "one of name, sft_weight, beta",
        ),
        (
            {"align": {"loss": DPO | {"generator": {"name": "sba"}}}},
            "align.loss.generator is an unknown table",
            "one of name, sft_weight, beta, label_smoothing",
        ),
        (
            {"align": {"loss": {"generator": {"name": "sab"}}}},
            "align.loss.generator.name = 'sab' is unknown",
            "logistic, kliep",
        ),
        (
            {"align": {"loss": {"generator": {"name": "sba", "lam": -2}}}},
            "align.loss.generator.lam is not possible",
            "above -1",
        ),
        (
            {"align": {"loss": {"generator": {"name": "kliep", "lam": 0}}}},
            "align.loss.generator.lam is an unknown key",
            "one of name",
        ),
        (
            {"align": {"activation_checkpointing": "always"}},
            'align.activation_checkpointing = "always" is not possible',
            "true or false or 'auto'",
        ),
        (
            {"data": {"train": [{"path": "a/b", "weight": 0}]}},
            "data.train.weight = 0 is not possible",
            "more than 0",
        ),
        ({"data": {"train": []}}, "data.train = [] is not possible", "at least one value"),
        ({"run": {"trackers": "wandb"}}, 'run.trackers = "wandb" is not possible', 'a list, ["…"]'),
        ({"run": {"name": "../x"}}, 'run.name = "../x" is not possible', "letters, digits"),
        ({"sft": 3}, "sft = 3 is not possible", "a table: [sft]"),
        ({"model": {"lora": True}}, "model.lora = true is not possible", "a table [model.lora]"),
        (
            {"data": {"eval_fraction": 5}},
            "data.eval_fraction = 5 is not possible",
            "a share of the prompts below 1, such as 0.05",
        ),
        (
            {"align": {"warmup": 100}},
            "align.warmup = 100 is not possible",
            "a share of the steps from 0 to 1, such as 0.05, not a number of steps",
        ),
        ({"align": {"warmup": -1}}, "align.warmup = -1 is not possible", "at least 0"),
    ],
)
def test_impossible_values_are_named_with_what_is_expected(load, tables, what, expected):
    with pytest.raises(TbpoError) as error:
        load(merged(SMALL, tables))
    (fault,) = faults(error)
    assert fault.what == what and expected in fault.expected and fault.exit_code == 2


def test_a_share_to_hold_out_is_not_ignored_beside_rows_to_evaluate(load):
    assert load(SMALL).data.eval_fraction == 0.05
    assert load(SMALL, "data.eval=b").data.eval_fraction is None
    with pytest.raises(TbpoError, match="eval_fraction must be left out where eval is given"):
        load(SMALL, "data.eval=b", "data.eval_fraction=0.1")


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_can_be_named_with_its_defaults_filled_in(load, name):
    align = load(SMALL, f"align.loss.name={name}").align
    assert (align.loss_name, align.loss) == (name, LOSSES[name]())
    assert hasattr(align.loss, "generator") == (name in {"bpo", "tbpo_a", "tbpo_q"})


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generator_can_be_named(load, name):
    recipe = load(SMALL, f"align.loss.generator.name={name}")
    assert recipe.align.loss.generator == GENERATORS[name]()
    assert recipe.settings()["align.loss.generator.name"] == name


def test_a_generator_may_be_named_without_a_table_of_its_own(load):
    table, name = (
        load(SMALL, f"align.loss.{key}=kliep") for key in ("generator.name", "generator")
    )
    assert table == name
    with pytest.raises(TbpoError, match=r"generator\.name = 'klieb' is unknown"):
        load(SMALL, "align.loss.generator=klieb")


def test_set_takes_toml_values_and_bare_text(load):
    recipe = load(
        SMALL, "run.seed=7", "align.loss.name=dpo", "align.learning_rate=1e-4", "model.lora={r = 8}"
    )
    assert (recipe.run.seed, recipe.align.loss_name, recipe.align.learning_rate) == (7, "dpo", 1e-4)
    assert recipe.model.lora.r == 8
    for text in ("", "=", "a b # [c]", "[1", 'a "b" \\'):
        assert load(SMALL, f"push.card=/{text}").push.card == str(Path(f"/{text}").resolve()), (
            "bare text, whatever is in it"
        )
    for override in ("seed", "seed=1", "run.seed", "#run.seed=1", "run seed.x=1", ".seed=1", "=1"):
        with pytest.raises(TbpoError, match="--set is not understood"):
            load(SMALL, override)


def test_options_that_are_keys_by_another_name_take_any_text(load):
    call = Call(Path("x.toml"), adapter='./🙂 "a"', against=["me/é", "b\\n"], sets=["run.seed=3"])
    recipe = load(SMALL, *call.overrides)
    assert Path(recipe.sample.adapter).name == '🙂 "a"' and recipe.eval.against == ("me/é", "b\\n")


def test_paths_in_the_file_are_relative_to_it_and_those_of_set_to_the_current_folder(
    load, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / "model").mkdir()
    tables = {"model": {"base": "model"}, "data": {"train": ["rows.jsonl", "org/pairs"]}}
    recipe = load(tables, "data.eval=more.jsonl")
    assert recipe.model.base == str(tmp_path / "model")
    assert recipe.data.train == (Source(str(tmp_path / "rows.jsonl")), Source("org/pairs"))
    assert recipe.data.eval == (Source(str(elsewhere / "more.jsonl")),)
    assert load(SMALL).model.base == "org/model", "a Hub id stays a Hub id"
    hub = load(merged(SMALL, {"model": {"base": "mistralai/Mistral-7B-v0.1"}}))
    assert hub.model.base == "mistralai/Mistral-7B-v0.1"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"[model\n", "closing bracket"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "there is no such recipe"),
    ],
)
def test_an_unreadable_recipe_is_named(tmp_path, content, what):
    path = tmp_path / "broken.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TbpoError, match=what) as error:
        load_recipe(path)
    assert str(path) in error.value.where


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("model:\n  base: x\n", "the recipe is YAML, not TOML", "mine.toml writes it as TOML"),
        ('{"model": {"base": "x"}}', "the recipe is JSON, not TOML", "tbpo init NAME --from"),
        ("[data]\ndedup = True\n", "True is Python's word", "write true"),
        ("[model]\nadapter = None\n", "TOML has no word for nothing", "leave the line out"),
        ('[data]\ntrain = "C:\\data\\x"\n', "a backslash in double quotes", r"train = 'C:\data\x'"),
        ("[model]\n[data]\n[model]\n", "[model] is there twice", "remove one"),
        ("[run]\nseed = 1\nseed = 2\n", "seed = 2 is there twice", "remove one"),
        ("[model]\nbase = org/model\n", "a text without quotes", 'write "org/model"'),
        (
            'model = "a/b"\n[model.lora]\nr = 8\n',
            '[model.lora] is a table, and model = "a/b" above it is a value',
            'remove model = "a/b", and write base = "a/b" under [model]',
        ),
        (
            '[align]\nloss = "dpo"\n[align.loss]\nbeta = 0.2\n',
            '[align.loss] is a table, and align.loss = "dpo" above it is a value',
            'write name = "dpo" under [align.loss]',
        ),
        (
            'push = "a/b"\n[push]\nrepo = "a/b"\n',
            '[push] is a table, and push = "a/b" above it',
            "write its keys under [push]",
        ),
        ("[model\n", "a heading without its closing bracket", "write [model]"),
        ("[align]\nwarmup = .5\n", "a number that begins with a point", "write warmup = 0.5"),
        ("[align]\nlearning_rate = 1.e-5\n", "a point that no digit", "write learning_rate = 1e-5"),
        ("[align]\nwarmup = 10%\n", "a share in percent", "as 0.1 for 10 %"),
        ("[run]\nseed = 1,\n", "a comma or semicolon at the end", "write seed = 1"),
        ('[push]\nrepo = "a/b\n', "a text without its closing quotes", 'write repo = "a/b"'),
        ("[model]\nbase 'a/b'\n", "a key without =", "write base = 'a/b'"),
        ("[model.lora]\nr = 8 alpha = 16\n", "two keys on one line", "alpha = 16 on a line"),
        ('[eval]\nopponents = ["a" "b"]\n', "a list without commas", "put a comma"),
        ("tbpo align x.toml\n", "a line of Python or of a shell", "tbpo init"),
        ("[run]\nseed = 1 + 1\n", "the recipe is not valid TOML", "mend that line"),
    ],
)
def test_what_is_not_toml_is_named_as_what_it_is(tmp_path, text, what, fix):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TbpoError) as error:
        load_recipe(path)
    assert error.value.what.startswith(what) and fix in error.value.fix
    assert str(path) in error.value.where and "line" in error.value.where


def test_a_byte_order_mark_says_nothing(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps(SMALL), encoding="utf-8-sig")
    assert load_recipe(path).model.base == "org/model"


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("align.per_device_train_batch_size=4", "here it is align.batch_pairs"),
        ("model.lora_r=4", "here it is model.lora.r"),
        ("align.loss.loss_type=sigmoid", "here it is align.loss.name"),
        ("align.loss.rpo_alpha=1.0", "here it is align.loss.sft_weight"),
        ("align.beta=0.1", "here it is align.loss.beta"),
        ("data.beta=0.1", "here it is align.loss.beta"),
        (
            "model.temperature=1.0",
            "it belongs to another table: rounds.temperature or sample.temperature",
        ),
        ("align.generator=sba", "it belongs to another table: align.loss.generator"),
        ("align.padding_free=true", "there is nothing to set"),
        ("align.loss.nme=dpo", "did you mean align.loss.name?"),
        ("align.loss.name=sigmoid", "--set align.loss.name=dpo"),
        ("align.loss.generator={name = 'kliep', lam = 1}", "a key of ba and sba, not of kliep"),
        ("align.loss.lam=0.5", "it is a key of the generator: align.loss.generator.lam"),
        ("align.loss={name = 'dpo', lam = 1}", "it is a key of orpo and dpop, not of dpo"),
        ("align.loss.gamma=1", "it is a key of simpo and d2po and confpo, not of tbpo_a"),
        ("align.loss.generator.beta=1", "it is a key of the loss: align.loss.beta"),
        ("align.lam=1", "align.loss.lam or align.loss.generator.lam"),
        ("align.loss=DPO", "--set align.loss.name=dpo"),
        ("align.lr=1e-5", "did you mean align.learning_rate?"),
        ("model.lora.rank=8", "did you mean model.lora.r?"),
        ("learning_rate=1e-5", "here it is align.learning_rate"),
        (
            "temperature=0.5",
            "it belongs to another table: rounds.temperature or sample.temperature",
        ),
        ("align=dpo", "align is a table: --set align.KEY=VALUE"),
        ('align.learning_rate="5e-6"', "--set align.learning_rate=5e-6"),
        ("data.dedup=True", "--set data.dedup=true"),
        ("eval.suites=mmlu", "--set 'eval.suites=[\"mmlu\"]'"),
        ("align.xyz=1", "remove it"),
        ("align.loss=kto", "single answers that are marked good or bad, and is not offered"),
        ("align.loss=kto", 'then name = "dpo"'),
        ("align.loss=apo_zero_unpaired", 'then name = "apo_zero"'),
        ("align.loss=gdpo", "a table [rounds] chooses pairs by the marks of a judge"),
        ("align.loss=ebft", "it is not offered, and no loss here is like it"),
        ("align.loss=dpo-norm", "--set align.loss.name=dpo_norm"),
        ("align.loss=gxpo", "change it: --set align.loss.name=…"),
        ("align.loss={name = 'dpo', sft_weight = -1}", "change it: --set align.loss.sft_weight=…"),
        ("align.cpo_alpha=0.5", "here it is align.loss.sft_weight = 0.5"),
        ("align.loss=ppo", "a table [rounds] chooses pairs by the marks of a judge"),
        ("align.loss=nca_pair", 'name = "dpo" is the usual one; tbpo losses lists all'),
        ("align.loss_type=kto", "here it is align.loss.name; of kto: it trains on single answers"),
        ("align.loss_type=sigmoid", 'here it is align.loss.name = "dpo"'),
        ("align.max_length=1024", "here it is data.max_length = 1024"),
        ("learning_rate=1e-5", "here it is align.learning_rate = 1e-05"),
        ("peft={r = 8}", "the adapter is the table [model.lora]"),
        ("model.peft_config={r = 8}", "the adapter is the table [model.lora]"),
        ("training={learning_rate = 1e-5}", "a training is the table [align] (of preferences) or"),
        ("dataset={path = 'a/b'}", "the rows are named in the table [data]"),
        ("judge={url = 'http://x/v1'}", "did you mean judge.endpoint?"),
        ("eval.judge={base_url = 'http://x/v1'}", "did you mean eval.judge.endpoint?"),
        ("model.lora=true", "write a line [model.lora] below the keys of [model]"),
        ("model.lora=false", "remove the line"),
        ("data.eval_fraction=5", "divide it by all pairs, or name rows of their own: data.eval"),
        ("align.warmup=100", "for 100 steps, 100 divided by all steps"),
        ("model.finetuning_type=full", "without a table [model.lora], all weights are trained"),
        ("model.finetuning_type=lora", "write a table [model.lora], which trains an adapter"),
        ("model.use_peft=false", "without a table [model.lora], all weights are trained"),
    ],
)
def test_a_key_that_belongs_elsewhere_is_answered_with_its_place(load, override, fix):
    with pytest.raises(TbpoError) as error:
        load(SMALL, override)
    assert fix in error.value.fix, error.value.fix


def test_a_fault_of_the_command_line_is_placed_there(load):
    with pytest.raises(TbpoError) as error:
        load(merged(SMALL, {"align": {"warmup": 2}}), "align.epochs=0", "align.loss=dop")
    places = {fault.where for fault in faults(error)}
    assert len(places) == 3 and {"--set align.epochs", "--set align.loss.name"} < places
    assert any(where.endswith("recipe.toml, [align] warmup") for where in places)


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("align.loss={name = 'dpo', sft_weight = -1}", "--set align.loss"),
        ("align.loss={name = 'dpo', nme = 1}", "--set align.loss"),
        ("align.loss={generator = {lam = -2}}", "--set align.loss"),
        ("align.loss={label_smoothing = 0.1}", "recipe.toml, [align.loss] beta"),
    ],
)
def test_a_fault_in_a_table_of_the_command_line_is_placed_there(load, override, where):
    """That of a key of the same table that the file gives is placed in the file."""
    faulty = override.startswith("align.loss={label")
    recipe = merged(SMALL, {"align": {"loss": {"beta": -1}}}) if faulty else SMALL
    with pytest.raises(TbpoError) as error:
        load(recipe, override)
    (fault,) = faults(error)
    assert fault.where.endswith(where) and fault.where.startswith("--set") != faulty


def test_set_makes_a_table_that_is_absent(load):
    assert load(SMALL, "sft={}").sft is not None
    assert load(SMALL, "model.lora={}").model.lora.r == 32


def test_a_learning_rate_at_the_top_of_the_file_is_answered_with_its_place(load):
    with pytest.raises(TbpoError) as error:
        load({"learning_rate": 1e-5, **SMALL})
    assert "here it is align.learning_rate" in str(error.value)


def test_set_names_a_loss_and_leaves_tables_out(load):
    loss = {"name": "tbpo_q", "beta": 0.3}
    whole = merged(SMALL, {"model": {"lora": {"r": 4}}, "sft": {}, "align": {"loss": loss}})
    recipe = load(whole, "align.loss=dpo", "model.lora=none", "sft=none")
    assert (recipe.align.loss_name, recipe.align.loss.beta) == ("dpo", 0.1)
    assert recipe.model.lora is None and recipe.sft is None
    assert load(whole, "align.loss=dpo", "align.loss.beta=0.2").align.loss.beta == 0.2
    assert load(SMALL, "run.name=none").run.name == "none", "a text that may not be absent"


def test_the_default_rate_is_that_of_what_is_trained(load):
    full = load(merged(SMALL, {"sft": {}}))
    lora = load(merged(SMALL, {"sft": {}, "model": {"lora": {}}}))
    assert (full.align.learning_rate, full.sft.learning_rate) == (1e-6, 2e-5)
    assert (lora.align.learning_rate, lora.sft.learning_rate) == (1e-5, 2e-4)
    assert load(SMALL, "align.learning_rate=3e-7").align.learning_rate == 3e-7


def test_no_message_has_a_regular_expression(load):
    for override in ("run.name=a b", "push.repo=x", "push.base_model=x", "sample.endpoint=x"):
        with pytest.raises(TbpoError) as error:
            load(SMALL, override)
        assert not set("^$\\[") & set(error.value.expected), error.value.expected
