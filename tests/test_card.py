"""The model card under hostile names: they are shown, and are never markup or metadata."""

from dataclasses import replace

import pytest
from conftest import write_jsonl
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from tbpo_cli.config.recipe import Recipe, load_recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.hub.base import Base
from tbpo_cli.hub.card import render_card
from tbpo_cli.hub.markdown import code, escaped, unescaped
from tbpo_cli.hub.secrets import check_no_secret

HOSTILE = [
    "a|b|c",
    "it`s ``code``",
    "```\n# a heading\n```python",
    "x\n---\nlicense: evil\n---\n# y",
    "\n\n## New section\n\n- item",
    "<img src=x onerror=alert(1)><!-- ",
    "[click](javascript:alert(1)) ![i](http://x/y.png)",
    "*bold* **b** _i_ __u__ ~~gone~~ tbpo_a_b",
    "{{ 7 * 7 }}{% for x in y %}",
    "key: value # comment",
    "- !!python/object:os.system {a: [b]}",
    "&anchor *alias %TAG @at ? | >",
    "'single' \"double\" \\ \\n",
    "\u202egnp.exe\x1b[31m\x85next\u2028line",
    "1. one\n2) two\n+ three\n=====",
    "$$x^2$$ &lt;b&gt; &#124;",
    "null",
    "0x1F",
]
TAME = "plain"
FIGURE = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 8}


def card_with(name: str, recipe: Recipe, text: str = "") -> str:
    """A card in which all that may come from elsewhere is `name`, its text from `text` if given."""
    recipe = replace(
        recipe,
        push=replace(recipe.push, repo="me/tuned", card=text or None),
        model=replace(recipe.model, adapter=f"/folder/{name}"),
        data=replace(recipe.data, train=(replace(recipe.data.train[0], path=f"/folder/{name}"),)),
    )
    count = {"rows": 9, "kept": {name: 8}, "rejected": {name: 1}, "noted": {name: 1}}
    stage = {"seconds": 1.0, "finished": name, "device": name, "versions": {name: name}}
    counts = [count | {"key": name, "source": source} for source in (f"/x/{name}", f"org/{name}")]
    model = {
        "preference": {"all": {name: FIGURE}},
        "score": None,
        "diversity": {name: FIGURE},
        "suites": {name: {name: FIGURE}},
    }
    rate = {"against": name, "judge": name, "raw": FIGURE, "length_controlled": None}
    results = {
        "verdict": name,
        "num_pairs": 8,
        "models": {"policy": model, "reference": model},
        "win_rates": [rate | {"model": "policy"}, rate | {"model": name, "raw": None}],
    }
    base = Base(f"org/{name}", name, (), {"license": name, "license_name": name})
    return render_card(
        recipe, base, results, {"prepare": stage | {"counts": counts}, "align": stage}
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    rows = write_jsonl(folder / "rows.jsonl", [])
    text = f'[model]\nbase = "org/base"\n[model.lora]\n[data]\ntrain = "{rows}"\n[align]\n'
    (folder / "recipe.toml").write_text(text)
    return load_recipe(folder / "recipe.toml")


def markup(card: str) -> tuple[list[str], str]:
    """The kinds of a card's Markdown elements in their order, and its texts."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    kinds, texts = [], []
    for token in parser.parse(ModelCard(card).text):
        kinds.append(f"{token.type} {token.tag}")
        texts.append(token.content if token.type in ("fence", "html_block") else "")
        for part in token.children or ():
            # A name in code is `code`, or, if that cannot hold it, text between <code> and </code>.
            is_code = part.type == "html_inline" and part.content in ("<code>", "</code>")
            if part.type not in ("text", "text_special", "code_inline") and not is_code:
                kinds.append(part.type)
            texts.append("" if is_code else part.content)
    return kinds, "".join(texts)


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_is_markup_and_each_can_be_read(recipe, name):
    kinds, text = markup(card_with(name, recipe))
    assert kinds == markup(card_with(TAME, recipe))[0]
    shown = " ".join(name.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e").split())
    shown = shown.replace("\x85", "\\x85").replace("\u2028", "\\u2028")
    assert not any(character in text for character in "\x1b\u202e\x85\u2028")
    if "\u202e" not in name:  # where marks are codes, white space is another one
        assert text.count(shown) > 15, "as verdict, dataset, judge, suite, metric and device"


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_adds_to_the_metadata(recipe, name):
    data = ModelCard(card_with(name, recipe)).data
    tame = ModelCard(card_with(TAME, recipe)).data
    assert data.to_dict().keys() == tame.to_dict().keys()
    assert (data.base_model, data.license, data.license_name) == (f"org/{name}", name, name)
    assert data.library_name == "peft"
    assert {one.metric_name for one in data.eval_results} >= {f"{name}: {name}"}
    assert f"win rate against {name} by {name}" in {one.metric_name for one in data.eval_results}


def test_the_program_of_the_card_is_a_program_whatever_the_names_are(recipe):
    parser = MarkdownIt("commonmark")
    for name in HOSTILE:
        tokens = parser.parse(ModelCard(card_with(name, recipe)).text)
        program = next(token for token in tokens if token.type == "fence").content
        strings = compile(program, "card", "exec").co_consts
        assert "me/tuned" in strings and f"org/{name}" in strings


def test_a_template_of_ones_own_is_escaped_unless_it_says_safe(recipe, tmp_path):
    template = tmp_path / "card.md"
    template.write_text("{{ base.id }}\n\n{{ base.id | safe }}\n")
    text = ModelCard(card_with("*x*", recipe, str(template))).text
    assert text.strip() == "org/\\*x\\*\n\norg/*x*"


@pytest.mark.parametrize(
    "text", ["https://me:secret@host/v1?x=1", "https://host/?a=1&api-key=abcdefgh12"]
)
@pytest.mark.parametrize("form", [escaped, code])
def test_escaping_hides_no_secret(text, form):
    assert "://" not in escaped(text), "no address becomes a link"
    with pytest.raises(TbpoError, match="holds a secret"):
        check_no_secret({"README.md": unescaped(form(f"at {text} | now"))})
