"""Writes the pages that are made of the code: recipe, losses, troubleshooting, other tools' keys.

python docs/generate.py            tests/test_docs.py says when it has to be run again
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tbpo_cli.cli.losses import FROZEN_HEAD, WHERE_MEASURED, as_markdown
from tbpo_cli.config import choosing, evaluation, judging, rounds, training
from tbpo_cli.config.other_tools import LOSS_NAMES, THEIRS
from tbpo_cli.config.recipe import DEFAULT_RATES
from tbpo_cli.core import GENERATORS, LOSSES
from tbpo_cli.report.diagnoses import AFTER, BEFORE, ROUNDS

DOCS = Path(__file__).parent
# Table of the recipe: its class, in the order of the page.
TABLES = {
    "[run]": training.Run,
    "[model]": training.Model,
    "[model.lora]": training.Lora,
    "[data]": training.Data,
    "[[data.train]]": training.Source,
    "[rounds]": rounds.Rounds,
    "[choose]": choosing.Choose,
    "[judge]": judging.Judge,
    "[sft]": training.Sft,
    "[align]": training.Align,
    "[sample]": evaluation.Sample,
    "[eval]": evaluation.Eval,
    "[push]": evaluation.Push,
}
NOTE = "*Made by `python docs/generate.py`.*"


def sentences(cls: type) -> dict[str, str]:
    """{field: the text under it} of a class, without what it inherits."""
    (node,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(node, ast.ClassDef)
    found: dict[str, str] = {}
    for first, second in zip(node.body, node.body[1:], strict=False):
        is_text = isinstance(second, ast.Expr) and isinstance(second.value, ast.Constant)
        if isinstance(first, ast.AnnAssign) and is_text:
            found[ast.unparse(first.target)] = inspect.cleandoc(second.value.value)
    return found


def default(each: dataclasses.Field) -> str:
    """A field's default as TOML has it; "" if it has none or it is not set."""
    value = each.default
    if each.default_factory is not dataclasses.MISSING:
        value = each.default_factory()
    if value is dataclasses.MISSING or value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, tuple):
        return "`[" + ", ".join(map(json.dumps, value)) + "]`"
    if isinstance(value, dict):
        return "`{" + ", ".join(f"{key} = {part}" for key, part in value.items()) + "}`"
    return f"`{value}`" if isinstance(value, int | float) else ""


def rows(cls: type, own: set[str] | None = None) -> list[str]:
    """The lines of a table of keys; `own`: the fields to take, all if None."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        texts |= sentences(base)
    lines = ["| key | default | |", "|---|---|---|"]
    for each in dataclasses.fields(cls):
        if own is None or each.name in own:
            text = " ".join(texts[each.name].split()).replace("|", "\\|")
            lines.append(f"| `{each.name}` | {default(each)} | {text} |")
    return lines


def recipe() -> str:
    """The page of all keys."""
    page = [
        "# The recipe",
        "",
        NOTE,
        "",
        "A recipe is a TOML file. Only `model.base` and `data.train` have no default.",
        "Relative paths are",
        "relative to the recipe; those of `--set table.key=value` to the current folder.",
        "`tbpo show` prints",
        "every value of a recipe and where it comes from.",
    ]
    shared = {each.name for each in dataclasses.fields(training.Training)}
    for name, cls in TABLES.items():
        meaning = inspect.getdoc(cls).partition("\n")[0].partition("] ")[2].lstrip("] ")
        page += ["", f"## {name}", "", meaning, ""]
        own = {each.name for each in dataclasses.fields(cls)} - shared
        page += rows(cls, own if issubclass(cls, training.Training) else None)
    page += ["", "## Keys of both [sft] and [align]", "", *rows(training.Training), ""]
    page += ["Default learning rates:", "", "| stage | with [model.lora] | all weights |"]
    page += ["|---|---|---|"]
    for stage in ("align", "sft"):
        lora, full = DEFAULT_RATES[stage, True], DEFAULT_RATES[stage, False]
        page.append(f"| `{stage}` | {lora:g} | {full:g} |")
    page += ["", "The keys of `[align.loss]` depend on the loss: see [losses](losses.md).", ""]
    return "\n".join(page)


def described(table: dict[str, type]) -> list[str]:
    """A section for each loss or generator: its docstring and its keys."""
    lines: list[str] = []
    for name, cls in table.items():
        lines += ["", f"### {name}", "", inspect.cleandoc(cls.__doc__ or "")]
        keys = [each for each in dataclasses.fields(cls) if each.name != "generator"]
        given = ", ".join(f"`{each.name}` {default(each)}".strip() for each in keys)
        if "generator" in {each.name for each in dataclasses.fields(cls)}:
            given += ", a table `[align.loss.generator]`"
        lines += ["", f"Keys: {given or 'none'}."]
    return lines


def losses() -> str:
    """The page of losses and generators."""
    begin = [
        "# Losses and generators",
        "",
        NOTE,
        "",
        '`[align.loss] name = "dpo"`, or `--set align.loss=dpo`; `tbpo losses` lists them.',
        "Notation: z is the",
        "logarithm of the model's ratio of rejected to chosen, R = e^z, r = log π_θ − log",
        "π_ref of a token,",
        "K = KL(π_ref ‖ π_θ) at its prefix, A = r + K; w is chosen, l rejected. Which one to",
        "take, and what",
        "they come to in one small world: [evidence](evidence.md).",
        "",
        as_markdown().strip(),
        "",
        "The times of a step were measured by `tests/benchmarks/loss_costs.py`,",
        f"{WHERE_MEASURED} ([results](../tests/benchmarks/results/loss_costs.md)); what makes",
        "the difference is how many models a step runs, and whether it computes the policy's",
        "logits.",
        FROZEN_HEAD.replace("tbpo_a", "`tbpo_a`"),
        "From the second epoch on, losses that read nothing of the reference but log π_ref take it",
        "from disk.",
        "",
        "## The formulas",
    ]
    named = {name: cls for name, cls in LOSSES.items() if name != "sft"}
    page = [*begin, *described(named), "", "## Generators", "", "Of `bpo`, `tbpo_a` and `tbpo_q`."]
    return "\n".join([*page, *described(dict(GENERATORS)), ""])


def plain(text: str) -> str:
    """A sentence of a diagnosis with example words in the place of its figures."""
    text = text.replace("{or_a_higher_rate}", ", or a higher {stage}.learning_rate")
    text = text.replace("{or_the_first_reference}", ', or rounds.reference = "first"')
    text = text.replace("{stage}", "align").replace("{trained}", "LoRA")
    text = text.replace("{counted_steps}", "N steps").replace("{counted_pairs}", "N pairs")
    text = text.replace("{usual}", "N to N")
    return re.sub(r"\{\w+(:[^}]*)?\}", "N", text).replace("|", "\\|")


def troubleshooting() -> str:
    """The page of diagnoses, around the table that the program itself reads."""
    page = [
        "# When something is wrong",
        "",
        NOTE,
        "",
        "`tbpo show` says the first group before a training, `tbpo align`, `tbpo eval` and",
        "the report the",
        "second one after it: a sentence, and the key to change.",
        "",
        "`tbpo show` also lists what the stages will need, such as packages, files, servers, disk",
        "and tokens. It exits with 2 if one of them is lacking (a line with ✗), else with 0.",
    ]
    titles = {"Before the training": BEFORE, "After the training": AFTER, "After rounds": ROUNDS}
    for title, table in titles.items():
        page += ["", f"## {title}", "", "| when | what it says | what to try |"]
        page.append("|---|---|---|")
        for each in table:
            page.append(f"| {each.condition} | {plain(each.sentence)} | {plain(each.change)} |")
    return "\n".join([*page, "", (DOCS / "is-this-a-bug.part").read_text(encoding="utf-8")])


def other_tools() -> str:
    """The page of other tools' keys."""
    page = [
        "# Coming from TRL, axolotl or LLaMA-Factory",
        "",
        NOTE,
        "",
        "```bash",
        "tbpo init from-trl --from dpo.yaml",
        "```",
        "",
        "writes `from-trl.toml` from a config in YAML or JSON, a Python file with",
        "`DPOConfig(…)`, or a shell",
        "script with `--flags`, and lists what was taken over and what was left out. Rows",
        "with `prompt`,",
        "`chosen` and `rejected` are read as they are. A key of these tools in a recipe is",
        "answered with ours.",
        "",
        "| theirs | whose | here |",
        "|---|---|---|",
    ]
    for name, each in THEIRS.items():
        note = f" ({each.note})" if each.note and each.ours else each.note
        here = f"`{each.ours}`{note}" if each.ours else note
        page.append(f"| `{name}` | {each.tool} | {here} |")
    pairs = [f"`{theirs}` is `{ours}`" for theirs, ours in LOSS_NAMES.items() if theirs != ours]
    return "\n".join([*page, "", f"Names of losses: {', '.join(pairs)}.", ""])


def models() -> str:
    """The page of architectures, made from the table of tests/benchmarks/architectures.py."""
    path = DOCS.parent / "tests/benchmarks/results/architectures.md"
    head, _, *lines = path.read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    groups: dict[tuple[str, str], list[str]] = {}
    for kind, outcome, details in table:
        details = re.sub(r" in \w+ a token", " a token", details)
        groups.setdefault((outcome, details), []).append(f"`{kind}`")
    page = [
        "# Models",
        "",
        NOTE,
        "",
        "A model is taken if transformers loads it by `AutoModelForCausalLM` and if it is",
        "causal; what is not known to be safe is tried as it is loaded, with the message and the",
        "key where it is refused. Every causal architecture that transformers registers was made",
        "small, with random weights, and went through scoring in each layout that it can take,",
        "three steps of `tbpo_a`, `tbpo_q` and `dpo`, LoRA, saving, loading, merging, sampling at",
        "two batch sizes and `tbpo show`, on the CPU in fp32. An architecture *agrees* if all",
        "figures and answers are those of plain transformers and peft, one sequence a pass",
        "(to 2e-4 after three steps; `tbpo_q` to 1e-3). One command does it:",
        "`python tests/benchmarks/architectures.py`. Large published checkpoints were not tried.",
        "",
        head,
    ]
    titles = {
        "agree": "Agree, by the layout of their rows",
        "refused": "Refused, with an error message",
        "left out": "Not tried, since no small checkpoint of them could be made",
        "FAULT": "Do not agree",
    }
    for outcome, title in titles.items():
        found = {why: kinds for (name, why), kinds in groups.items() if name == outcome}
        if found:
            page += ["", f"## {title}", "", "| why | architectures |", "|---|---|"]
        for why, kinds in sorted(found.items(), key=lambda each: -len(each[1])):
            page.append(f"| {why} | {', '.join(kinds)} |")
    page += [
        "",
        "In `shared_prompt` rows a prompt is read once for both of its responses, in `packed` rows",
        "sequences stand one behind the other, in `padded` rows each has a line of its own. The",
        "values are the same; padded rows take longer.",
        "",
        "## LoRA",
        "",
        'By default (`target_modules = "all-linear"`) an adapter is put on the linear layers of',
        "the language part: on no layer for images or sound, no router of a mixture of experts,",
        "no output head, not on experts that are one tensor (nor, where peft takes their names for",
        "those of such experts, on the dense layers and shared experts beside them, as in",
        "Qwen3-Next and DeepSeek-V3), and not on layers that share one weight. A training says at",
        "its start which linear layers have no adapter.",
        "",
        "## Chat templates",
        "",
        "Prompt and response are tokenized by the template of the tokenizer, and each response",
        "ends with the token at which generation stops. `tests/test_template_zoo.py` compares the",
        "token ids with an independent computation for templates of 28 shapes (text that is",
        "trimmed, reasoning that is kept or left out, tools, a system message that is merged,",
        "needed or refused, dates, one or several closing tokens or none, reasoning begun by the",
        "generation prompt), each with byte-level, SentencePiece-like and tekken-like tokenizers.",
        "What a template does not render (reasoning, a tool call, a system message) is never left",
        "out in silence: the row is rejected, with that reason.",
        "",
    ]
    return "\n".join(page)


PAGES = {
    "models.md": models,
    "recipe.md": recipe,
    "losses.md": losses,
    "troubleshooting.md": troubleshooting,
    "other-tools.md": other_tools,
}

if __name__ == "__main__":
    for file, make in PAGES.items():
        (DOCS / file).write_text(make(), encoding="utf-8")
