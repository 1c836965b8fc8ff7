"""`tbpo eval`: did it get better, and at what cost?"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.errors import GateError, TbpoError
from tbpo_cli.evaluation.answer_files import answers_to, read_answers
from tbpo_cli.evaluation.candidates import Candidate, candidates_of, check_source
from tbpo_cli.evaluation.kept import KEPT, digest
from tbpo_cli.evaluation.measures import decide
from tbpo_cli.report.diagnoses import AFTER, diagnose
from tbpo_cli.report.facts import after_evaluation
from tbpo_cli.runs.files import json_lines, write_whole
from tbpo_cli.runs.launch import ALONE, Processes, run_or_launch
from tbpo_cli.runs.rounds import with_pairs
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.runs.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tbpo_cli.data.pairs import Messages
    from tbpo_cli.evaluation.measurements import Measurement

Rows = list[dict[str, Any]]


def check(recipe: Recipe) -> None:
    """What can be known before anything is run. Raises TbpoError if a part of [eval] cannot be
    done.
    """
    from tbpo_cli.evaluation.judges import judges_of
    from tbpo_cli.evaluation.suites import check_suites

    if adapter := recipe.sample.adapter:
        what = "the samples would be of another model than the figures"
        where = f"sample.adapter = {adapter!r}"
        raise TbpoError(
            what, where, "the run's own policy", f"leave it out, and compare: --against {adapter}"
        )
    is_of_data = recipe.sample.prompts == "eval"
    if recipe.judge_of_eval is not None and "chosen" in recipe.eval.opponents and not is_of_data:
        what = 'eval.opponents cannot have "chosen" where sample.prompts is not "eval"'
        expected = "prompts of the held-out pairs, which have a chosen response"
        fix = "--set eval.opponents='[\"reference\"]'"
        raise TbpoError(what, f"sample.prompts = {recipe.sample.prompts!r}", expected, fix)
    for source in recipe.eval.against:
        check_source(source)
    for file in recipe.eval.answers:
        read_answers(file)
    check_suites(recipe.eval.suites)
    judges_of(recipe.judge_of_eval, recipe.table_of_judge)


def check_before_sampling(recipe: Recipe, run_dir: RunDir) -> None:
    """Says which of the prompts the files of answers have, and which a judge cannot read.

    Raises:
        TbpoError: if a file cannot be read, or answers none of them; if a judge can read none.
    """
    from tbpo_cli.data.prompts import conversations_of
    from tbpo_cli.evaluation.judges import check_prompts

    judge = recipe.judge_of_eval
    if judge is None or not (recipe.eval.answers or judge.reward_model):
        return
    prompts = conversations_of(with_pairs(recipe, run_dir), run_dir.stage("prepare") / "eval")
    check_prompts(judge, recipe.table_of_judge, [*prompts.values()])
    _check_answers(recipe, prompts)


def _check_answers(recipe: Recipe, prompts: Mapping[str, Messages]) -> None:
    """Says how many of the prompts each file of answers has. Raises TbpoError if it has none."""
    from tbpo_cli.data.prompts import prompt_rows
    from tbpo_cli.evaluation.comparisons import questions_of

    questions = questions_of(prompts, prompt_rows(recipe)) if recipe.eval.answers else {}
    for file in recipe.eval.answers:
        found, how = answers_to(read_answers(file), questions)
        of_all = f"{len(found):,} of {console.counted(len(questions), 'prompt')}"
        by = ", ".join(f"{number:,} by {key}" for key, number in how.items())
        left = next((one for prompt_id, one in questions.items() if prompt_id not in found), None)
        rest = f"; the first without an answer: {left.conversation[-1][1][:80]!r}" if left else ""
        console.say(f"{'WARNING: ' if left else ''}{file} answers {of_all} ({by}){rest}")


def run(recipe: Recipe, run_dir: RunDir, processes: Processes = ALONE) -> None:
    """Measures, judges, and writes eval/results.json, verdicts.jsonl and report.html.

    Raises TbpoError if a model cannot be loaded or compared or no pairs are held out, GateError, at
    last, for the gate.
    """
    from tbpo_cli.data.store import PairStore
    from tbpo_cli.evaluation.headline import headline, names_of
    from tbpo_cli.evaluation.paired import paired_tests
    from tbpo_cli.evaluation.rounds import rounds_of
    from tbpo_cli.evaluation.winrate import judge_all

    started = time.monotonic()
    check(recipe)
    check_before_sampling(recipe, run_dir)
    if not len(PairStore(run_dir.stage("prepare") / "eval")):
        raise TbpoError(
            "there are no held-out pairs", "[data]", "data.eval, or data.eval_fraction above 0"
        )
    candidates = candidates_of(recipe, run_dir)
    kept = run_dir.begin(STAGE, recipe) / KEPT
    kept.mkdir(exist_ok=True)
    if not all(one.path(kept).exists() for one in _measurements(recipe, run_dir)):
        run_or_launch(STAGE, recipe, run_dir, processes)
    samples = _samples(recipe, run_dir)
    others = [each.name for each in candidates[2:]]
    own = with_pairs(recipe, run_dir)
    cache_of = partial(_cache_of, recipe, run_dir)
    win_rates, verdicts, scores = judge_all(own, run_dir, samples, others, cache_of)
    models = {
        each.name: {**_measured(recipe, run_dir, each), "score": scores.get(each.name)}
        for each in candidates
    }
    compared = [each for each in candidates if each.view != "reference"]
    pairs = {each.name: _rows(recipe, run_dir, each, "preference") for each in compared}
    results = {
        "run": recipe.run.name,
        "names": names_of(run_dir.path.name, recipe.align.loss_name, others),
        "training": _training(recipe, run_dir),
        "loss": recipe.align.loss_name,
        "date": time.strftime("%Y-%m-%d"),
        "num_pairs": models["policy"]["preference"]["all"]["margin"]["n"],
        "num_prompts": len({sample["prompt_id"] for sample in samples}),
        "models": models,
        "win_rates": win_rates,
        "tests": paired_tests(pairs, verdicts),
        "rounds": rounds_of(recipe, run_dir) if recipe.rounds is not None else [],
        "same_judges": recipe.same_judges,
    }
    warnings = diagnose(after_evaluation(results, recipe.model.lora is not None), AFTER)
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in verdicts)
    write_whole(run_dir.stage("eval") / "verdicts.jsonl", lines)
    done = results | {"verdict": headline(results), "warnings": warnings}
    _finish(recipe, run_dir, done, round(time.monotonic() - started, 1))
    report(recipe, run_dir)


def work(recipe: Recipe, run_dir: RunDir) -> None:
    """Measures every model in this process, which may be one of several; what an earlier start has
    measured is kept.
    """
    from tbpo_cli.data.tokenizer import load_chat
    from tbpo_cli.evaluation.measurer import Measurer
    from tbpo_cli.model.policy import POLICY, REFERENCE
    from tbpo_cli.train.answering import load_measured
    from tbpo_cli.train.feed import TokenBudget
    from tbpo_cli.train.group import Group
    from tbpo_cli.train.memory import kept_bytes, tokens_that_fit

    group = Group.of_environment()
    kept = run_dir.stage("eval") / KEPT
    wanted = [one for one in _measurements(recipe, run_dir) if not one.path(kept).exists()]
    wanted = group.gather(wanted)[0]  # what the first process has seen before it writes any
    if not wanted:
        return
    sources = {one.candidate.view: one.candidate.source for one in wanted}
    helpers = {view: each for view, each in sources.items() if view not in (POLICY, REFERENCE)}
    policy, placement = load_measured(recipe, run_dir, helpers, group)
    fit = tokens_that_fit(kept_bytes(placement.shapes or policy.model, False)[0], group.device)
    tokens = recipe.align.max_tokens_per_device
    smaller = 'more --gpus with align.sharding = "fsdp", or a smaller data.max_length'
    budget = TokenBudget(tokens, fit, group, placement.together.folder, smaller=smaller)
    chat = load_chat(recipe.model, recipe.data.template_date)
    measurer = Measurer(
        with_pairs(recipe, run_dir),
        run_dir.stage("prepare") / "eval",
        chat,
        policy,
        group.share,
        budget.attempt,
        lambda one: one.known(kept, run_dir.stage("sample") / KEPT),
        placement.together,
    )
    for one in wanted:
        rows = [row for share in group.gather(measurer.measure(one)) for row in share]
        if group.is_main:
            one.write(kept, rows)


def _measurements(recipe: Recipe, run_dir: RunDir) -> list[Measurement]:
    """What the stage measures, once it is begun."""
    from tbpo_cli.evaluation.measurements import measurements_of

    candidates = candidates_of(recipe, run_dir)
    return measurements_of(recipe, run_dir, candidates, run_dir.started_from("eval"))


def _cache_of(recipe: Recipe, run_dir: RunDir, key: str) -> Path:
    """The file that keeps what a judge has said.

    The answers of a server have cost something: they outlive --restart. Those of the other judges
    hold as long as the judge is the same.
    """
    from tbpo_cli.evaluation.measurements import inputs_under

    if key == "endpoint":
        return run_dir.path / "judge-cache.jsonl"
    judge = inputs_under(run_dir.started_from("eval"), f"{recipe.table_of_judge}.{key}")
    return run_dir.stage("eval") / KEPT / f"scores-{key}-{digest(judge)}.jsonl"


def _rows(recipe: Recipe, run_dir: RunDir, candidate: Candidate, what: str) -> Rows:
    """The rows of the measurements of one kind of a model."""
    kept = run_dir.stage("eval") / KEPT
    return [
        row
        for one in _measurements(recipe, run_dir)
        if (one.candidate, one.what) == (candidate, what)
        for row in one.read(kept)
    ]


def _samples(recipe: Recipe, run_dir: RunDir) -> Rows:
    """What all models have answered to the prompts of the sample stage."""
    answers = [
        {"model": each.name, **row}
        for each in candidates_of(recipe, run_dir)
        for row in _rows(recipe, run_dir, each, "answers")
    ]
    return json_lines(run_dir.stage("sample") / "samples.jsonl") + answers


def _training(recipe: Recipe, run_dir: RunDir) -> dict[str, str]:
    """What the policy was made from, in words; of what lies here only the names."""
    from tbpo_cli.train.metrics import read_metrics

    sources = [recipe.model.base, *(source.path for source in recipe.data.train)]
    base, *data = (Path(path).name if Path(path).is_absolute() else path for path in sources)
    lines = read_metrics(run_dir.stage("align") / "metrics.jsonl")
    steps = max((line["step"] for line in lines), default=0)
    return {
        "base": base,
        "data": " + ".join(data),
        "learning rate": f"{recipe.align.learning_rate:g}",
        "steps": f"{steps:,}",
        "time of training": console.duration(run_dir.manifest("align").get("seconds", 0.0)),
    }


def _measured(recipe: Recipe, run_dir: RunDir, candidate: Candidate) -> dict[str, Any]:
    """The figures of a model."""
    from tbpo_cli.evaluation import diversity, preference

    samples = _rows(recipe, run_dir, candidate, "diversity")
    pairs = _rows(recipe, run_dir, candidate, "preference")
    suites = _rows(recipe, run_dir, candidate, "suite")
    source = Path(candidate.source)
    here = Path.cwd()
    return {
        "source": str(source.relative_to(here) if source.is_relative_to(here) else source),
        "loss": candidate.loss,
        "preference": preference.summarise(pairs, candidate.beta),
        "diversity": diversity.summarise(samples) if samples else {},
        "suites": {row["suite"]: row["figures"] for row in suites},
    }


def _finish(recipe: Recipe, run_dir: RunDir, results: dict[str, Any], seconds: float) -> None:
    """Writes results.json with the gate's decision, report.html, and that the stage is complete."""
    from tbpo_cli.report.evaluation import write_report
    from tbpo_cli.train.metrics import read_metrics
    from tbpo_cli.train.placement import placed

    folder = run_dir.stage("eval")
    samples = _samples(recipe, run_dir)
    metrics = read_metrics(run_dir.stage("align") / "metrics.jsonl")
    results |= {"gate": decide(recipe.eval.gate, results)}
    write_whole(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_report(
        folder / "report.html", results, samples, json_lines(folder / "verdicts.jsonl"), metrics
    )
    outputs = [folder / name for name in ("results.json", "verdicts.jsonl", "report.html")]
    run_dir.finish("eval", outputs, {"seconds": seconds, **placed(folder)})


def report(recipe: Recipe, run_dir: RunDir) -> None:
    """Shows the complete stage's results. Raises GateError if `eval.gate` does not hold."""
    from tbpo_cli.report.evaluation import show

    folder = run_dir.stage("eval")
    manifest = run_dir.manifest("eval")
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
        measured += _whose(gate)
        what = f"the gate failed: {gate['expression']} does not hold, {measured}"
        raise GateError(
            what,
            str(folder / "results.json"),
            gate["expression"],
            "train better, or change eval.gate",
        )
    if gate:
        measured = f"measured {gate['value']:.4g}{_whose(gate)}"
        console.say(f"the gate is passed: {gate['expression']}, {measured}")


def _whose(gate: dict[str, Any]) -> str:
    """Against whom and by which judge a gate's win rate is; "" for other figures."""
    if "against" not in gate:
        return ""
    of_several = gate["comparisons"] > 1
    least = f", the least of {gate['comparisons']} comparisons" if of_several else ""
    by = f", by {gate['judge']}" if gate["judge"] else ""
    return f" against {gate['against']}{by}{least}"


STAGE = Stage(
    name="eval",
    needs=lambda recipe: ("prepare", *recipe.training_stages, "sample"),
    keys=("run.seed", "model.", "data.template_date", "judge.", "eval."),
    run=run,
    report=report,
    work=work,
    renews=lambda run_dir: True,
    checks_before={"sample": check_before_sampling},
)
