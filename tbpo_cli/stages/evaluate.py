"""`tbpo eval`: did it get better, and at what cost?"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.errors import GateError, TbpoError
from tbpo_cli.evaluation.candidates import Candidate, candidates_of, check_source
from tbpo_cli.evaluation.measures import decide
from tbpo_cli.report.diagnoses import AFTER, diagnose
from tbpo_cli.report.facts import after_evaluation
from tbpo_cli.runs.files import json_lines, write_whole
from tbpo_cli.runs.launch import ALONE, Processes, run_or_launch
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.runs.stage import Stage

Rows = list[dict[str, Any]]

OPPONENTS = {"reference": "its reference", "chosen": "the preferred answers of the data"}


def check(recipe: Recipe) -> None:
    """What can be known before anything is run. Raises TbpoError if a part of [eval] cannot be
    done.
    """
    from tbpo_cli.evaluation.judges import judges_of
    from tbpo_cli.evaluation.suites import check_suites

    if adapter := recipe.sample.adapter:
        what, where = (
            "the samples would be of another model than the figures",
            f"sample.adapter = {adapter!r}",
        )
        raise TbpoError(
            what, where, "the run's own policy", f"leave it out, and compare: --against {adapter}"
        )
    is_of_data = recipe.sample.prompts == "eval"
    if recipe.eval.judged and "chosen" in recipe.eval.opponents and not is_of_data:
        what = 'eval.opponents cannot have "chosen" where sample.prompts is not "eval"'
        expected = "prompts of the held-out pairs, which have a chosen response"
        fix = "--set eval.opponents='[\"reference\"]'"
        raise TbpoError(what, f"sample.prompts = {recipe.sample.prompts!r}", expected, fix)
    for source in recipe.eval.against:
        check_source(source)
    check_suites(recipe.eval.suites)
    judges_of(recipe)


def run(recipe: Recipe, run_dir: RunDir, processes: Processes = ALONE) -> None:
    """Measures, judges, and writes eval/results.json, verdicts.jsonl and report.html.

    Raises TbpoError if a model cannot be loaded or compared or no pairs are held out, GateError, at
    last, for the gate.
    """
    from tbpo_cli.data.store import PairStore
    from tbpo_cli.evaluation.winrate import judge_all

    started = time.monotonic()
    check(recipe)
    if not len(PairStore(run_dir.stage("prepare") / "eval")):
        raise TbpoError(
            "there are no held-out pairs", "[data]", "data.eval, or data.eval_fraction above 0"
        )
    candidates = candidates_of(recipe, run_dir)
    run_or_launch(STAGE, recipe, run_dir, processes)
    samples = _samples(run_dir, candidates)
    win_rates, verdicts, scores = judge_all(
        recipe, run_dir, samples, [each.name for each in candidates[2:]]
    )
    models = {
        each.name: {**_measured(run_dir, each), "score": scores.get(each.name)}
        for each in candidates
    }
    results = {
        "run": recipe.run.name,
        "loss": recipe.align.loss_name,
        "date": time.strftime("%Y-%m-%d"),
        "num_pairs": models["policy"]["preference"]["all"]["margin"]["n"],
        "num_prompts": len({sample["prompt_id"] for sample in samples}),
        "models": models,
        "win_rates": win_rates,
    }
    warnings = diagnose(after_evaluation(results, recipe.model.lora is not None), AFTER)
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in verdicts)
    write_whole(run_dir.stage("eval") / "verdicts.jsonl", lines)
    _finish(
        recipe,
        run_dir,
        results | {"verdict": verdict(results), "warnings": warnings},
        round(time.monotonic() - started, 1),
    )
    report(recipe, run_dir)


def work(recipe: Recipe, run_dir: RunDir) -> None:
    """Measures every model in this process, which may be one of several; what an earlier start has
    measured is kept.
    """
    from tbpo_cli.data.tokenizer import load_chat
    from tbpo_cli.evaluation.measurer import Measurer
    from tbpo_cli.model.load import add_helper, load_trained
    from tbpo_cli.train.feed import TokenBudget
    from tbpo_cli.train.group import Group
    from tbpo_cli.train.memory import kept_bytes, tokens_that_fit

    group = Group.of_environment()
    folder = run_dir.begin(STAGE, recipe) if group.is_main else run_dir.stage("eval")
    (folder / "parts").mkdir(exist_ok=True)
    candidates, settings = candidates_of(recipe, run_dir), recipe.eval
    wanted = [
        (each, what)
        for each in candidates
        for what, is_wanted in {
            "preference": True,
            "diversity": settings.diversity_prompts,
            "answers": settings.judged and each.name not in recipe.sample.models,
            "suites": settings.suites,
        }.items()
        if is_wanted and not _part(run_dir, each, what).exists()
    ]
    wanted = group.gather(wanted)[0]  # what the first process has seen before it writes any
    if not wanted:
        return
    sft_output, device = run_dir.weights("sft") if recipe.sft is not None else None, group.device
    policy = load_trained(recipe, device, run_dir.weights("align"), sft_output)
    for each in candidates[2:]:
        add_helper(policy, each.view, each.source, recipe.model, device, key="eval.against")
    fit = tokens_that_fit(kept_bytes(policy.model, False)[0], device)
    budget = TokenBudget(recipe.align.max_tokens_per_device, fit, group)
    chat = load_chat(recipe.model, recipe.data.template_date)
    measurer = Measurer(
        recipe, run_dir.stage("prepare") / "eval", chat, policy, group.share, budget.attempt
    )
    for each, what in wanted:
        rows = [row for share in group.gather(getattr(measurer, what)(each)) for row in share]
        if group.is_main:
            write_whole(_part(run_dir, each, what), json.dumps(rows, ensure_ascii=False))


def _part(run_dir: RunDir, candidate: Candidate, what: str) -> Path:
    return run_dir.stage("eval") / "parts" / f"{what}-{candidate.view}.json"


def _rows(run_dir: RunDir, candidate: Candidate, what: str) -> Rows:
    path = _part(run_dir, candidate, what)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _samples(run_dir: RunDir, candidates: list[Candidate]) -> Rows:
    """What all models have answered to the prompts of the sample stage."""
    answers = [
        {"model": each.name, **row}
        for each in candidates
        for row in _rows(run_dir, each, "answers")
    ]
    return json_lines(run_dir.stage("sample") / "samples.jsonl") + answers


def _measured(run_dir: RunDir, candidate: Candidate) -> dict[str, Any]:
    """The figures of a model."""
    from tbpo_cli.evaluation import diversity, preference

    samples, pairs = (_rows(run_dir, candidate, what) for what in ("diversity", "preference"))
    source, here = Path(candidate.source), Path.cwd()
    return {
        "source": str(source.relative_to(here) if source.is_relative_to(here) else source),
        "loss": candidate.loss,
        "preference": preference.summarise(pairs, candidate.beta),
        "diversity": diversity.summarise(samples) if samples else {},
        "suites": {row["suite"]: row["figures"] for row in _rows(run_dir, candidate, "suites")},
    }


def verdict(results: dict[str, Any]) -> str:
    """The results in a sentence: better or not, with the 95 % interval, and at what cost."""
    loss, models, wins = results["loss"], results["models"], results["win_rates"]
    own = models["policy"]["preference"]["all"]
    if wins:  # the first one is the policy's
        raw, opponent = wins[0]["raw"], OPPONENTS.get(wins[0]["against"], wins[0]["against"])
        word = (
            "beats"
            if raw["low"] > 0.5
            else "loses to"
            if raw["high"] < 0.5
            else "is not clearly different from"
        )
        said = f"{loss} {word} {opponent}: it wins {_share(raw, 'prompts')}, by {wins[0]['judge']}"
    else:
        said = f"{loss} prefers the chosen response of {_share(own['accuracy'], 'held-out pairs')}"
    before, after = (
        models[name]["preference"]["all"]["entropy"]["value"] for name in ("reference", "policy")
    )
    moved = f"KL from the reference {own['kl']['value']:.3f} nats a token"
    return f"{said}; {moved}, entropy {before:.3f} → {after:.3f}"


def _share(figure: dict[str, Any], of: str) -> str:
    low, high = 100 * figure["low"], 100 * figure["high"]
    return f"{figure['value']:.1%} of {figure['n']} {of} (95 %: {low:.1f} to {high:.1f})"


def _finish(recipe: Recipe, run_dir: RunDir, results: dict[str, Any], seconds: float) -> None:
    """Writes results.json with the gate's decision, report.html, and that the stage is complete."""
    from tbpo_cli.report.evaluation import write_report
    from tbpo_cli.train.metrics import read_metrics

    folder, samples = run_dir.stage("eval"), _samples(run_dir, candidates_of(recipe, run_dir))
    metrics = read_metrics(run_dir.stage("align") / "metrics.jsonl")
    results |= {"gate": decide(recipe.eval.gate, results)}
    write_whole(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_report(
        folder / "report.html", results, samples, json_lines(folder / "verdicts.jsonl"), metrics
    )
    outputs = [folder / name for name in ("results.json", "verdicts.jsonl", "report.html")]
    run_dir.finish("eval", outputs, {"seconds": seconds})


def report(recipe: Recipe, run_dir: RunDir) -> None:
    """Shows the complete stage's results. Raises GateError if `eval.gate` does not hold."""
    from tbpo_cli.report.evaluation import show

    folder, manifest = run_dir.stage("eval"), run_dir.manifest("eval")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    gate = decide(recipe.eval.gate, results)
    if manifest and gate != results["gate"]:  # the recipe has another one since
        with run_dir.lock():
            run_dir.reopen("eval")
            _finish(recipe, run_dir, results, manifest["seconds"])
    show(results)
    for sentence in results["warnings"]:
        console.say(f"WARNING: {sentence}")
    console.say(f"look at it: {folder / 'report.html'}   every number: {folder / 'results.json'}")
    if gate and not gate["passed"]:
        measured = (
            "it was not measured" if gate["value"] is None else f"measured {gate['value']:.4g}"
        )
        what = f"the gate failed: {gate['expression']} does not hold, {measured}"
        raise GateError(
            what,
            str(folder / "results.json"),
            gate["expression"],
            "train better, or change eval.gate",
        )
    if gate:
        console.say(f"the gate is passed: {gate['expression']}, measured {gate['value']:.4g}")


STAGE = Stage(
    name="eval",
    needs=lambda recipe: ("prepare", *recipe.training_stages, "sample"),
    keys=("run.seed", "model.", "data.template_date", "eval."),
    run=run,
    report=report,
    work=work,
)
