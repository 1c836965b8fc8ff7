"""Publishing: what goes to the Hub, in one commit, that others can load it, and what happens when
something fails.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import change_recipe, preference_rows, run_stage, write_jsonl, write_recipe
from hub_server import COMMIT, connected, serve
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tbpo_cli.config.recipe import Model, load_recipe
from tbpo_cli.config.validate import validate
from tbpo_cli.core.losses import LOSSES, Dpo
from tbpo_cli.errors import TbpoError, gather
from tbpo_cli.hub import client
from tbpo_cli.hub.base import published_base
from tbpo_cli.hub.card import render_card
from tbpo_cli.hub.secrets import check_no_secret, without_folders
from tbpo_cli.model.adapters import local_adapter
from tbpo_cli.model.load import load_policy, load_trained
from tbpo_cli.model.merge import merge_adapter
from tbpo_cli.runs.files import write_sealed
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.stages import push
from tbpo_cli.stages.sample import answer

TOKEN = "hf_" + "w" * 30
SHORT = ("align.max_steps=2", "align.learning_rate=0.05")
PUSH = (*SHORT, "push.repo=me/tuned", "push.base_model=org/base", "push.license=mit")
FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "curves.svg",
    "recipe.toml",
    "results.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def figure(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 8}


def evaluate(run):
    """Results as `tbpo eval` writes them, of the run's adapter."""
    metrics = {name: figure(0.5) for name in ("accuracy", "margin", "kl")}
    model = {
        "source": str(run / "align/adapter"),
        "preference": {"all": metrics},
        "score": None,
        "diversity": {"distinct_1": figure(0.3)},
        "suites": {"arc": {"easy": figure(0.4)}},
    }
    win = {
        "model": "policy",
        "against": "reference",
        "judge": "world.py:score",
        "raw": figure(0.71),
        "length_controlled": None,
        "wins": 5,
        "ties": 1,
        "losses": 2,
    }
    results = {
        "run": "tiny",
        "loss": "tbpo_a",
        "num_pairs": 8,
        "num_prompts": 8,
        "verdict": "It wins.",
        "gate": None,
        "models": {"policy": model, "reference": model},
        "win_rates": [win],
    }
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval/results.json").write_text(json.dumps(results))
    write_sealed(
        run / "eval/manifest.json",
        {"inputs": {"outputs": {"align": RunDir(run).outputs_hash("align")}}},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory, base, rows):
    """A recipe and its aligned and evaluated run."""
    folder = tmp_path_factory.mktemp("made")
    recipe_file = write_recipe(folder / "tiny.toml", base, rows)
    evaluate(run_stage("align", recipe_file, folder / "run", *SHORT))
    return recipe_file, folder / "run"


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made[1], tmp_path / "run"))


@pytest.fixture
def server(tmp_path, base, monkeypatch):
    """A Hub with the base on it, and a client in this process that may write."""
    shutil.copytree(base, tmp_path / "hub/models/org/base")
    with serve(tmp_path / "hub") as started, connected(started.address, tmp_path / "cache"):
        started.tokens[TOKEN] = "write"
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(client, "WAITS", (0.01, 0.01))
        yield started


def publish(made, run, *sets, **options):
    push.run(load_recipe(made[0], (*PUSH, *sets)), RunDir(run), **options)


def card_of(server, repo="me/tuned"):
    return ModelCard((server.root / "models" / repo / "README.md").read_text(encoding="utf-8"))


def test_one_commit_holds_the_adapter_its_card_and_what_it_was_made_with(made, run, server, capsys):
    publish(made, run, f"judge.scorer=python:{made[0].parent}/mine.py:score")
    repo = server.root / "models/me/tuned"
    assert {path.name for path in repo.iterdir()} == FILES
    assert len(server.heads[repo]) == 1
    config = json.loads((repo / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", COMMIT)
    assert (
        recipe := load_recipe(repo / "recipe.toml").model
    ).base == "org/base" and recipe.revision == COMMIT
    assert 'scorer = "python:mine.py:score"' in (repo / "recipe.toml").read_text()
    receipt = json.loads((run / "push/receipt.json").read_text())
    assert receipt["commit"] == server.heads[repo][0] and set(receipt["sha256"]) == FILES
    texts = "".join(path.read_text() for path in repo.iterdir() if path.suffix != ".safetensors")
    assert str(made[0].parent) not in texts and "/base" not in texts.replace("org/base", ""), (
        "no folder of this machine"
    )
    assert capsys.readouterr().out.strip() == f"{server.address}/me/tuned"


def test_the_card_has_metadata_that_the_hub_takes_and_figures_of_the_evaluation_only(
    made, run, server
):
    publish(made, run)
    card = card_of(server)
    data = card.data.to_dict()
    card.validate()
    wanted = {
        "library_name": "peft",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "license": "mit",
        "pipeline_tag": "text-generation",
    }
    assert {key: data[key] for key in wanted} == wanted
    index = {one.metric_name: one.metric_value for one in card.data.eval_results}
    assert index == {
        "reward accuracy": 0.5,
        "win rate against reference by world.py:score": 0.71,
        "arc: easy": 0.4,
    }
    assert "It wins." in card.text and "71.0% (61.0% to 81.0%, n = 8)" in card.text
    assert "| distinct-1 | 0.300 (0.200 to 0.400, n = 8) | 0.300" in card.text
    ends = json.loads((run / "align/adapter/generation_config.json").read_text())["eos_token_id"]
    assert f"max_new_tokens=64, eos_token_id=[{ends}])" in card.text, "the base may stop elsewhere"
    assert f"with one of the tokens {ends}." in card.text and "stop_token_ids" in card.text
    for part in (
        "| 40 | 40 train | none |",
        "`align.learning_rate` | 0.05",
        "arXiv 2605.12288",
        "@misc",
        "transformers 5.",
    ):
        assert part in card.text


def test_a_card_of_a_loss_of_ones_own_that_no_paper_describes(made, run, server, monkeypatch):
    @dataclass(frozen=True)
    class Mine(Dpo):
        """The margin, as I like it."""

    monkeypatch.setitem(LOSSES, "mine", Mine)
    recipe = load_recipe(made[0], (*PUSH, "align.loss.name=mine"))
    manifests = {name: RunDir(run).manifest(name) for name in ("prepare", "align")}
    base = published_base(recipe, manifests["align"], online=False)
    card = ModelCard(render_card(recipe, base, None, manifests))
    assert "The margin, as I like it. All settings are in" in card.text and "mine" in card.data.tags
    assert "@misc" not in card.text and "arxiv.org" not in card.text


def test_a_card_without_results_says_so(made, run, server):
    shutil.rmtree(run / "eval")
    publish(made, run, allow_unevaluated=True)
    card = card_of(server)
    assert "**Not evaluated.**" in card.text and card.data.eval_results is None
    assert not (server.root / "models/me/tuned/results.json").exists()


def test_a_template_of_ones_own_makes_the_text_and_not_the_metadata(made, run, server, tmp_path):
    template = tmp_path / "card.md"
    template.write_text("# Mine, from {{ base.id }}\n")
    publish(made, run, f"push.card={template}")
    assert (
        card_of(server).text.strip() == "# Mine, from org/base"
        and card_of(server).data.base_model == "org/base"
    )
    template.write_text("fine\n{{ nothing }}\n")
    with pytest.raises(TbpoError, match="the card cannot be made"):
        publish(made, run, f"push.card={template}")


def test_a_dry_run_shows_files_and_card_and_asks_nothing(made, run, server, capsys):
    publish(made, run, dry_run=True)
    shown = capsys.readouterr().out
    assert all(name in shown for name in FILES) and "base_model: org/base" in shown
    assert server.requests == [] and not (run / "push/receipt.json").exists()


def test_a_merged_model_is_published_in_shards_with_the_licence_of_the_base(
    made, run, server, base, monkeypatch
):
    monkeypatch.setattr(push, "SHARD_SIZE", "20KB")
    (server.root / "models/org/base/LICENSE").write_text("as you like")
    publish(made, run, "push.merge=true")
    repo = server.root / "models/me/tuned"
    names = {path.name for path in repo.iterdir()}
    assert {
        "LICENSE",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    } <= names
    assert (
        sum(name.startswith("model-0000") for name in names) > 1
        and "adapter_config.json" not in names
    )
    assert (card_of(server).data.library_name, card_of(server).data.base_model_relation) == (
        "transformers",
        "finetune",
    )
    text = card_of(server).text
    assert "max_new_tokens=64)" in text and "generation_config.json" in text
    ids = torch.tensor([[5, 6, 7, 8]])
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), run / "align/adapter"
    )
    expected = adapted(input_ids=ids).logits
    assert torch.allclose(
        AutoModelForCausalLM.from_pretrained(repo)(input_ids=ids).logits, expected, atol=1e-5
    )
    (config,) = run.glob("push/merged-*/config.json")
    made_at = config.stat().st_mtime_ns
    publish(made, run, "push.merge=true")
    assert config.stat().st_mtime_ns == made_at and len(server.heads[repo]) == 1, "merged once"


def test_a_model_whose_weights_were_all_trained_is_published_whole(made, server, tmp_path):
    recipe_file = tmp_path / "whole.toml"
    shutil.copy(made[0], recipe_file)
    change_recipe(recipe_file, model={"lora": None})
    run = run_stage("align", recipe_file, tmp_path / "run", *PUSH)
    push.run(load_recipe(recipe_file, PUSH), RunDir(run), allow_unevaluated=True)
    names = {path.name for path in (server.root / "models/me/tuned").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert (
        card_of(server).data.base_model_relation == "finetune"
        and "PeftModel" not in card_of(server).text
    )


@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj"], ["lm_head", "q_proj"], ["embed_tokens"]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_merged_weights_are_those_of_the_adapter(base, tmp_path, targets, dtype):
    """In fp32 within its error; in bf16 no further from those in fp32 than the adapter's own are.
    The head is tied.
    """
    from peft import LoraConfig, get_peft_model

    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    exact = get_peft_model(exact, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in exact.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    exact.save_pretrained(tmp_path / "adapter")
    merge_adapter(
        Model(base=str(tmp_path / "base")), tmp_path / "adapter", tmp_path / "merged", "5GB"
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    adapted = PeftModel.from_pretrained(adapted, tmp_path / "adapter")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        wanted, *others = (
            model(input_ids=ids).logits.float() for model in (exact, adapted, merged, plain)
        )
    from_adapter, from_merged, from_base = (
        float((logits - wanted).norm() / wanted.norm()) for logits in others
    )
    assert merged.dtype == dtype and from_merged <= 1.2 * from_adapter + 1e-6 and from_base > 0.1


REFUSALS = {
    "no repository": ("push.repo=", "push.repo"),
    "no base": ("push.base_model=", "push.base_model"),
    "another base": ("push.base_model=org/other", "another base than was trained on"),
    "no such base": ("push.base_model=org/none", "refuses"),
    "no licence": ("push.license=", "the base's licence is not known"),
    "another recipe": (
        "align.learning_rate=0.06",
        "was made from other inputs: align.learning_rate",
    ),
    "a data set": ("push.repo=me/data", "is a dataset"),
    "a whole model": ("push.repo=org/base", "holds a whole model"),
    "a foreign namespace": ("push.repo=you/tuned", "a token that may write"),
}


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_published_is_refused_and_nothing_is_made(
    made, run, server, change, message
):
    key = change.partition("=")[0]
    server.tokens[TOKEN] = "org" if key == "push.repo" and "org" in change else "me"
    (server.root / "datasets/me/data").mkdir(parents=True)
    other = Path(shutil.copytree(server.root / "models/org/base", server.root / "models/org/other"))
    tensors = {name: tensor + 1 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    kept = [one for one in PUSH if not one.startswith(key) or key == "align.learning_rate"]
    recipe = load_recipe(made[0], (*kept, *([] if change.endswith("=") else [change])))
    with pytest.raises(TbpoError) as error:
        push.run(recipe, RunDir(run))
    assert message in str(error.value) and error.value.fix and error.value.exit_code == 2
    assert not server.heads


def test_a_run_must_be_complete_and_its_evaluation_of_these_weights(made, run, server):
    for path, message in (
        ("eval/manifest.json", "the evaluation has lost"),
        ("align/manifest.json", "align is not complete"),
    ):
        (run / path).unlink()
        with pytest.raises(TbpoError, match=message):
            publish(made, run)
    other = shutil.copytree(made[1], run.parent / "other")
    write_sealed(
        other / "eval/manifest.json", {"inputs": {"outputs": {"align": "of another adapter"}}}
    )
    with pytest.raises(TbpoError, match="older than the weights"):
        publish(made, other)
    assert not server.requests


def test_a_token_is_needed_that_may_write(made, run, server, monkeypatch, tmp_path):
    for token, role, message in (
        (TOKEN, "read", "may only read"),
        ("hf_x", "write", "Invalid user token"),
    ):
        server.tokens[TOKEN] = role
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(TbpoError, match=message):
            publish(made, run)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(TbpoError, match="no token"):
        publish(made, run)


def test_show_asks_the_hub_whether_the_token_may_write_to_the_repository(
    made, run, server, executable
):
    settings = {"HF_ENDPOINT": server.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    shown = []
    for repo in ("me/tuned", "you/tuned", "org/base"):
        sets = ("--set", f"push.repo={repo}", "--run-dir", run)
        done = executable("show", made[0], *sets, **settings)
        shown.append(" ".join(done.stdout.split()))
    assert "✓ a token for the Hub ✓ it may write to me/tuned" in shown[0]
    assert "✗ it may write to you/tuned: no repository can be made there" in shown[1]
    assert "--set push.repo=me/tuned" in shown[1]
    assert "✗ it may write to org/base: the repository holds a whole model" in shown[2]
    assert not server.heads, "nothing is made"


def test_a_private_repository_is_made_and_a_public_one_is_not_taken_for_it(made, run, server):
    publish(made, run, "push.private=true")
    assert server.private == {server.root / "models/me/tuned"}
    server.private.clear()
    with pytest.raises(TbpoError, match="is public"):
        publish(made, run, "push.private=true")


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "a1" * 15,
        "sk-" + "b2" * 12,
        "AKIA" + "Q" * 16,
        "OPENAI_API_KEY=abcdefgh123",
        '"api_key": "0123456789"',
        "-----BEGIN RSA PRIVATE KEY-----",
        "https://me:geheim@example.org/x",
        "password: correcthorse",
        "https://x.openai.azure.com/v1?api-key=0123456789abcdef",
        "https://0123456789abcdef@h/v1",
        "x-api-key: 0123456789",
        "Authorization: Bearer abcdefghijklmnop",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
        "xoxb-123456789012-abcdefghijklmnop",
        "AIzaSyA1234567890abcdefghijklmnopqrstuv",
        "glpat-abcdefghijklmnopqrst",
        "gsk_A1b2C3d4E5f6G7h8J9k0L1m2N3p4Q5r6S7t8",
        "xai-A1b2C3d4E5f6G7h8J9k0L1m2N3p4Q5",
        "dapi0123456789abcdef0123456789abcdef",
        "89abcdef0123456789abcdef0123456701234567",
        "sk-abcdefghijklmnopqrstuvwxyzABCDEFGH",
        "https://me:hunt/er2@host/v1",
        "npm_abcdefghijklmnopqrstuvwxyz0123456789",
        "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",
    ],
)
def test_a_secret_is_found_and_not_shown(made, run, server, tmp_path, secret):
    template = tmp_path / "card.md"
    template.write_text(f"# Mine\n\nrun it with {secret}\n")
    with pytest.raises(TbpoError, match="holds a secret") as error:
        publish(made, run, f"push.card={template}")
    assert re.search(r"README.md, line \d+", error.value.where) and secret not in str(error.value)
    assert not server.heads


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens_per_device = 1638400000",
        "https://huggingface.co:443/x@main",
        "sha256 " + "0a" * 32,
        "tokenizer = AutoTokenizer.from_pretrained(x)",
        '"prompt_tokens": 1234567890',
        'api_key_env = "OPENAI_API_KEY"',
        'api_key = "$OPENAI_API_KEY"',
        "KL a token: 0.12345678",
        "sk-learn-contributions",
    ],
)
def test_what_is_no_secret_passes(text):
    check_no_secret({"README.md": text})


@pytest.mark.parametrize(
    "text",
    [
        "https://discord.com/api/webhooks/123456789012345678/AbCdEfGhIjKlMnOpQrStUvWxYz012345",
        "https://s/x?X-Goog-Signature=0123abcd4567",
        "https://s/x?a=1&X-Amz-Signature=0123abcd4567ef",
        "https://f.azurewebsites.net/api/x?code=AbCdEfGhIjKlMnOpQrStUv==",
        "https://b/c?sv=2020&sig=abcdefgh%3D",
        "https://h/?pwd=hunter2",
        "https://h/?pass=hunter2",
        "https://h/?user=a&password=abc",
        "Authorization: Basic dXNlcjpwYXNz",
        "'Authorization': 'Basic dXNlcjpwYXNzd29yZA=='",
        "Authorization: Token abcdefgh12",
        "Proxy-Authorization: Digest username=abcdefgh",
        "authorization = 'AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/2015'",
        "X-Auth-Token: 0123456789",
        "Cookie: session=abcdefghijkl",
        "curl -u me:geheim https://h",
        "curl --user=me:geheim https://h",
        "basic dXNlcjpwYXNz==",
        "https://h/#access_token=abcdefghij",
        "https%3A%2F%2Fh%3Fapi_key%3Dabcdefghij",
        "AccountKey=abcdefgh12345==",
        "Ocp-Apim-Subscription-Key: 0123456789abcdef",
        "https://outlook.webhook.office.com/webhookb2/0123456789abcdef/IncomingWebhook/abcdef0123456789",
        "https://hooks.slack.com/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX",
        "https://hooks.zapier.com/hooks/catch/123456/abcdefghijkl",
        "dckr_pat_abcdefghijklmnopqrst",
        "hvs.CAESIAabcdefghijklmnop",
        "PGPASSWORD=hunter22",
        "passphrase: correct-horse",
        "https://h/?session_id=0123456789abcdef0",
    ],
)
def test_keys_in_addresses_headers_and_settings_are_secrets(text):
    with pytest.raises(TbpoError, match="holds a secret") as error:
        check_no_secret({"README.md": f"see\n{text}"})
    assert "README.md, line 2" in error.value.where and text not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "https://arxiv.org/abs/2305.18290?context=cs.LG",
        "https://h/?page=2&sort=asc",
        "https://h/search?q=password",
        "basic understanding of preference",
        "Authorization: none",
        "the bearer of this",
        "?code=200",
        "https://github.com/x/y/blob/main/webhooks/README.md",
        "max_tokens = 12345678",
        "keys: prompt, chosen",
        "pass@1 = 0.5",
        "cookie: a small cake",
        "curl -L https://h/x",
        "authorization is needed",
        "a token: 12",
        "?author=somebody-else",
        "webhooks are not used",
        "num_tokens=123456",
        "-u tbpo",
        "secret santa",
        "eos_token = <|im_end|>",
        "https://h/?state=running",
        "pad_token_id: 0",
    ],
)
def test_words_and_addresses_without_a_key_are_no_secrets(text):
    check_no_secret({"README.md": text})


@pytest.mark.parametrize(
    "text",
    [
        '"/srv/x/FILE"',
        "'/srv/x/FILE'",
        "'~/x/FILE'",
        "~me/x/FILE",
        '"../../private/FILE"',
        "'file:///home/me/FILE'",
        "file&#58;///home/me/FILE",
        "[a](file:///home/me/FILE)",
        "`/home/me/x y/FILE`",
        "at ../../x/FILE",
        "see /home/me/FILE, and",
        "see /home/me/FILE/, and",
        "'''\nrows of /home/me/x/FILE\n'''",
        r'"C:\\Users\\me\\FILE"',
        r"C:\Users\me\FILE",
        "D:/data/me/FILE",
        r'"\\\\server\\me\\FILE"',
        '"python:/home/me/FILE:score"',
        "/run dir/of me/FILE",
        "(/run dir/of me/FILE)",
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "data"])
def test_of_a_path_only_the_name_is_published(text, name):
    shown = without_folders(
        text.replace("FILE", name), [Path("/run dir/of me"), Path(f"/run dir/{name}")]
    )
    assert name in shown and not re.search(
        "me/|me\\\\|srv|private|home|~|Users|work|/x|run dir", shown
    )


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/a/b",
        "https&#58;//a.b/home/x",
        "and/or 1/2",
        "</div>",
        "POST /v1/chat/completions",
        "`org/base`",
        r"'\n\nAnswer'",
        r'"Q:\nA:\nB"',
        "a ~ b / c",
        "~0.5/s",
        "don't/do it's /x",
        '"/"',
    ],
)
def test_what_is_no_path_of_a_machine_is_published_as_it_is(text):
    assert without_folders(text, [Path("/run dir/of me")]) == text


def test_commits_that_are_known_are_no_secret():
    commit = "0123456789abcdef0123456789abcdef01234567"
    check_no_secret({"README.md": f"revision {commit}"}, {commit})


def test_servers_and_folders_of_this_machine_are_not_published(made, run, server, tmp_path):
    judge = "{endpoint = 'http://10.0.0.7:8000/v1', model = 'm', body = {seed = 123454321}}"
    sets = (f"judge={judge}", "sample.endpoint=http://inside:1/v1", "sample.endpoint_model=p")
    template = tmp_path / "card.md"
    template.write_text(f"# Mine\n\nIt is in {run}/align.\n")
    publish(made, run, *sets, f"push.card={template}")
    repo = server.root / "models/me/tuned"
    texts = "".join(path.read_text() for path in repo.iterdir() if path.suffix != ".safetensors")
    for private in ("10.0.0.7", "inside:1", "123454321", str(run), str(tmp_path)):
        assert private not in texts
    recipe = load_recipe(repo / "recipe.toml")
    assert recipe.judge.model == "m" and recipe.sample.endpoint_model == "p"


def test_results_that_were_edited_and_damaged_weights_are_not_published(made, run, server):
    path = run / "align/adapter/adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(TbpoError, match="the complete stage align is not as it was written"):
        publish(made, run)
    path.write_bytes(content)
    manifest = json.loads((run / "eval/manifest.json").read_text())
    results = run / "eval/results.json"
    hashes = {"results.json": hashlib.sha256(results.read_bytes()).hexdigest()}
    write_sealed(run / "eval/manifest.json", {"inputs": manifest["inputs"], "outputs": hashes})
    results.write_text(results.read_text().replace('"num_pairs": 8', '"num_pairs": 8000'))
    with pytest.raises(TbpoError, match="the complete stage eval is not as it was written"):
        publish(made, run)
    assert not server.heads


def test_merged_weights_that_were_damaged_are_merged_again(made, run, server):
    publish(made, run, "push.merge=true")
    (weights,) = run.glob("push/merged-*/model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(bytes(len(content)))
    publish(made, run, "push.merge=true")
    assert weights.read_bytes() == content
    assert len(server.heads[server.root / "models/me/tuned"]) == 1


FAULTS = [
    ["GET", "whoami", 429],
    ["POST", "validate-yaml", 503],
    ["POST", "repos/create", "cut"],
    ["POST", "preupload", 500],
    ["POST", "objects/batch", "cut"],
    ["PUT", "/lfs/", 503],
    ["PUT", "/lfs/", "cut"],
    ["POST", "/commit/", 502],
    ["POST", "/commit/", "cut"],
    ["POST", "/commit/", "lost"],
    ["POST", "repos/create", "lost"],
    ["GET", "/tree/", 504],
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: " ".join(map(str, fault)))
def test_a_passing_fault_is_waited_out_and_there_is_one_commit(
    made, run, server, fault, monkeypatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.faults.append(list(fault))
    publish(made, run)
    repo = server.root / "models/me/tuned"
    assert (
        not server.faults
        and len(server.heads[repo]) == 1
        and {path.name for path in repo.iterdir()} == FILES
    )


@pytest.mark.parametrize(
    "faults", [[], [["GET", "xet-write-token", 503]], [["GET", "xet-write-token", "cut"]]]
)
def test_large_files_go_by_xet_where_the_client_has_it(made, run, server, monkeypatch, faults):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    server.faults += faults
    publish(made, run)
    assert any((server.root / "xet").rglob("xorbs/*")) and not [
        line for line in server.requests if "PUT" in line
    ]
    publish(made, run)
    assert len(server.heads[server.root / "models/me/tuned"]) == 1


def test_an_upload_that_was_interrupted_goes_on_and_ends_in_one_commit(made, run, server, capsys):
    server.faults += [["POST", "/commit/", 503]] * 3
    with pytest.raises(TbpoError, match="the Hub answers 503"):
        publish(made, run)
    assert "again in 0.01 s" in capsys.readouterr().err and not server.heads
    before = len(server.requests)
    publish(made, run)
    assert not [line for line in server.requests[before:] if line.startswith("PUT")], (
        "large files are there already"
    )
    assert len(server.heads[server.root / "models/me/tuned"]) == 1


def test_pushing_again_does_nothing_and_a_change_sends_what_changed(made, run, server, capsys):
    publish(made, run)
    before, repo = len(server.requests), server.root / "models/me/tuned"
    publish(made, run)
    assert "unchanged" in capsys.readouterr().err and len(server.heads[repo]) == 1
    assert not [
        line for line in server.requests[before:] if "/commit/" in line or line.startswith("PUT")
    ]
    shutil.rmtree(run / "eval")
    publish(made, run, allow_unevaluated=True)
    assert len(server.heads[repo]) == 2 and {path.name for path in repo.iterdir()} == FILES - {
        "results.json"
    }


def test_what_is_there_is_compared_with_what_was_sent(made, run, server):
    server.faults.append(["POST", "/commit/", "spoil"])
    with pytest.raises(TbpoError, match="other content than was sent") as error:
        publish(made, run)
    assert "README.md" in error.value.where and not (run / "push/receipt.json").exists()


def test_only_the_first_process_pushes(made, run, server, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    publish(made, run)
    assert not server.requests


def test_after_sft_the_adapter_alone_makes_the_policy_of_the_base(made, tmp_path, base):
    """The adapter of SFT is trained further, so it is a part of what is published."""
    sets = (*SHORT, "sft.max_steps=2", "sft.learning_rate=0.05")
    run = run_stage("align", made[0], tmp_path / "run", *sets)
    ids = torch.tensor([[5, 6, 7, 8]])
    policy = load_trained(
        load_recipe(made[0], sets), torch.device("cpu"), run / "align/adapter", run / "sft/adapter"
    )
    with torch.no_grad():
        logits = {"policy": policy.model(input_ids=ids).logits}
        for name, folder in (("published", "align"), ("sft", "sft")):
            loaded = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(base), run / folder / "adapter"
            )
            logits[name] = loaded(input_ids=ids).logits
            with loaded.disable_adapter():
                logits["base"] = loaded(input_ids=ids).logits
        with policy.view("reference") as reference:
            logits["reference"] = reference(input_ids=ids).logits
    assert torch.allclose(logits["published"], logits["policy"], atol=1e-5)
    assert torch.allclose(logits["reference"], logits["sft"], atol=1e-5)
    assert not torch.allclose(logits["sft"], logits["base"], atol=1e-2)


def test_from_the_hub_and_back(made, base, tmp_path, executable, capsys):
    """Rows and base by id, push, and what was pushed: by peft, by transformers, as a start, in
    `sample`, offline.
    """
    root = tmp_path / "hub"
    shutil.copytree(base, root / "models/org/base")
    (root / "models/org/base/README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    (root / "datasets/org/pairs").mkdir(parents=True)
    write_jsonl(root / "datasets/org/pairs/train.jsonl", preference_rows(20, seed=5))
    sets = [
        part
        for one in (
            *SHORT,
            "model.base=org/base",
            "data.train=org/pairs",
            "push.repo=me/tuned",
            "sample.max_new_tokens=8",
        )
        for part in ("--set", one)
    ]
    with serve(root) as server:
        server.tokens[TOKEN] = "me"
        online = {
            "HF_ENDPOINT": server.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
        }
        offline = {**online, "HF_ENDPOINT": "http://127.0.0.1:1", "HF_HUB_OFFLINE": "1"}
        for command in (("align",), ("push", "--allow-unevaluated")):
            done = executable(
                command[0], made[0], "--run-dir", "run", *command[1:], *sets, **online
            )
            assert done.returncode == 0, done.stderr
        config = json.loads((root / "models/me/tuned/adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", COMMIT)
        data = card_of(server).data
        assert (data.base_model, data.datasets, data.license) == (
            "org/base",
            ["org/pairs"],
            "apache-2.0",
        )
        code = re.search(r"```python\n(.*?)```", card_of(server).text, re.DOTALL)[1]
        plain = "\nother = AutoModelForCausalLM.from_pretrained('me/tuned', dtype='auto')\n"
        code += (
            plain + "assert other(**inputs).logits.allclose(model(**inputs).logits, atol=1e-5)\n"
        )
        code += "with model.disable_adapter():\n    off = model(**inputs).logits\n"
        code += "assert not other(**inputs).logits.allclose(off)\n"
        used = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **online},
            capture_output=True,
            text=True,
        )
        assert used.returncode == 0, used.stderr
        pinned = f"me/tuned@{server.heads[root / 'models/me/tuned'][0]}"
        shown = executable(
            "sample",
            made[0],
            "--run-dir",
            "x",
            "--adapter",
            pinned,
            "--prompt",
            "red",
            *sets,
            **online,
        )
        assert shown.returncode == 0, shown.stderr
    capsys.readouterr()
    answer(
        load_recipe(made[0], (*SHORT, "sample.max_new_tokens=8")), RunDir(tmp_path / "run"), ["red"]
    )
    assert "policy: " in shown.stdout and shown.stdout == capsys.readouterr().out
    further = ("--run-dir", "further", "--set", f"model.adapter={pinned}", *sets)
    done = executable("sample", made[0], *further, **offline)
    assert done.returncode == 0, done.stderr
    assert "the reference is a frozen adapter" in done.stderr
    lines = (tmp_path / "further/align/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["kl"] == pytest.approx(0, abs=1e-6)


def test_an_adapter_is_pinned_to_a_revision_and_never_a_pickle(server, made):
    repo, api = "me/one", HfApi()
    api.create_repo(repo)
    commits = []
    for value in ("1", "2"):
        config, weights = (
            huggingface_hub.CommitOperationAdd(name, value.encode())
            for name in ("adapter_config.json", "adapter_model.safetensors")
        )
        commits.append(api.create_commit(repo, [config, weights], commit_message="x").oid)
    assert (local_adapter(f"{repo}@{commits[0]}", "x") / "adapter_config.json").read_text() == "1"
    assert (local_adapter(repo, "x") / "adapter_config.json").read_text() == "2"
    api.create_repo("me/pickle")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="adapter_model.bin", repo_id="me/pickle")
    with pytest.raises(TbpoError, match="it has no adapter_config"):
        local_adapter("me/pickle", "model.adapter")
    with pytest.raises(TbpoError, match="the adapter cannot be loaded") as error:
        local_adapter("me/none", "--adapter")
    assert "--adapter = 'me/none'" in str(error.value)


def test_an_adapter_of_another_base_and_one_without_lora_are_refused(made, run):
    weights = run / "align/adapter/adapter_model.safetensors"
    save_file({name: tensor.repeat(2, 2) for name, tensor in load_file(weights).items()}, weights)
    recipe = load_recipe(made[0], (*SHORT, f"model.adapter={run / 'align/adapter'}"))
    with pytest.raises(TbpoError, match="the adapter does not fit the base: size mismatch"):
        load_policy(recipe, torch.device("cpu"), None, True)
    with pytest.raises(TbpoError, match="adapter is not possible"):
        _, faults = validate(Model, {"base": "x", "adapter": "me/tuned"}, "x.toml", ("model",))
        gather(faults)


@pytest.mark.parametrize("lost", [True, False])
def test_an_export_says_that_it_leaves_an_evaluation_out(recipe_file, finished, tbpo, lost):
    """One that has lost its manifest, or that is of other weights."""
    (finished / "eval").mkdir()
    (finished / "eval/results.json").write_text("{}")
    if not lost:
        of_others = {"inputs": {"outputs": {"align": "of another adapter"}}}
        write_sealed(finished / "eval/manifest.json", of_others)
    folder = finished.parent / "export"
    done = tbpo("push", recipe_file, "--run-dir", finished, "--to", folder)
    assert done.returncode == 0, done.stderr
    why = f"has lost {finished / 'eval/manifest.json'}" if lost else "is older than the weights"
    warning = next(line for line in done.stderr.splitlines() if line.startswith("warning: "))
    assert f"the evaluation {why}" in warning and "tbpo eval RECIPE first" in warning
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize("merge", [False, True])
def test_an_export_to_a_folder_loads_and_says_how_it_is_served(recipe_file, finished, tbpo, merge):
    """The adapter on its base, or the merged weights alone, give the trained model's logits."""
    from transformers import AutoModelForCausalLM

    folder = finished.parent / "export"
    arguments = ("--run-dir", finished, "--to", folder, *(["--merge"] if merge else []))
    done = tbpo("push", recipe_file, *arguments)
    assert done.returncode == 0, done.stderr
    served = done.stdout.strip().replace("\n", "")
    assert served.startswith("vllm serve ") and str(folder) in served
    assert ("--max-lora-rank 4" in served) == (not merge)
    assert (folder / "model.safetensors").exists() == merge
    ids = torch.arange(5, 15)[None]
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    trained = AutoModelForCausalLM.from_pretrained(finished / "align/adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-4)
    assert "preference pairs" in (folder / "README.md").read_text(encoding="utf-8")
    again = tbpo("push", recipe_file, *arguments)
    assert again.returncode == 2 and "holds something already" in again.stderr
