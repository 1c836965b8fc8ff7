"""report.html of an evaluation: its figures, its charts, that nothing in it can act, and in a
browser its search.
"""

import base64
import hashlib
import html
import re
import shutil
import subprocess
import threading
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import run_stage, write_jsonl, write_recipe

from tbpo_cli import console
from tbpo_cli.report.charts import HEIGHT, WIDTH, Panel, Series, histogram
from tbpo_cli.report.evaluation import MAX_ROWS, show, write_report
from tbpo_cli.report.pages import write_page

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
ATTACK = (
    '</script></title><script>document.title="owned"</script>'
    '<img src="{url}/img" onerror="document.title=1">'
)
VOID = {"meta", "input"}
SVG = "{http://www.w3.org/2000/svg}"


def figure(value, spread=0.05, n=40):
    return {"value": value, "low": value - spread, "high": value + spread, "n": n}


def model(loss, shift, **diversity):
    own = {
        "entropy": figure(0.5 - shift),
        "logps_chosen": figure(-0.5 - shift),
        "logps_rejected": figure(-0.6 - shift),
    }
    if loss:
        own |= {"accuracy": figure(0.7), "margin": figure(0.2 + shift), "kl": figure(0.1 + shift)}
    return {
        "source": "runs/quickstart/align/adapter",
        "loss": loss,
        "preference": {
            "all": own,
            "buckets": [
                {
                    "shortest": low,
                    "longest": high,
                    "metrics": {name: figure(f["value"] + low / 100) for name, f in own.items()},
                }
                for low, high in ((2, 5), (6, 20))
            ],
            "reliability": [
                {"predicted": 0.55, "observed": 0.6, "n": 30},
                {"predicted": 0.7, "observed": 0.8, "n": 10},
            ]
            if loss
            else [],
        },
        "diversity": {
            "self_bleu": figure(41.26, 2.0),
            "length": figure(6.84 - shift, 0.4),
            **diversity,
        },
        "suites": {},
        "score": figure(0.784, 0.02),
    }


def rate(name, against="reference", judge="world.py:score", **entries):
    return {
        **{
            "model": name,
            "against": against,
            "judge": judge,
            "raw": figure(0.742, 0.03),
            "length_controlled": None,
        },
        **{"wins": 1215, "ties": 164, "losses": 21, "unreadable": 0, "inconsistent": None},
        **{"prompt_tokens": 0, "completion_tokens": 0, "cost": None},
        **entries,
    }


def inputs(
    *others, texts=(("Say red.", "red cat.", "red dog."), ("Count to two.", "1 2.", "No idea."))
):
    """What an evaluation leaves. Texts: prompt, the policy's completion, the reference's; the first
    one is lost.
    """
    names = ("policy", "reference", *others)
    results = {
        "run": "quickstart",
        "loss": "tbpo_a",
        "training": {"base": "pocket", "learning rate": "0.0003", "time of training": "16 s"},
        "date": "2026-11-23",
        "num_pairs": 1388,
        "num_prompts": len(texts),
        "verdict": "tbpo_a is better than its reference: it wins on 74.2% (95 %: 71.5 to 77.1)",
        "gate": {"expression": "win_rate > 0.5", "value": 0.742, "passed": True},
        "models": {
            name: model(None if name == "reference" else "tbpo_a", n / 50)
            for n, name in enumerate(names)
        },
        "win_rates": [rate(name) for name in names if name != "reference"],
    }
    samples, verdicts = [], []
    for row, (prompt, *completions) in enumerate(texts):
        for name, completion in zip(
            names, [*completions, *completions[:1] * len(others)], strict=True
        ):
            sample = {
                "row": row,
                "prompt_id": f"p{row}",
                "sample": 0,
                "model": name,
                "completion": completion,
            }
            sample |= {
                "token_ids": [*range(len(completion))],
                "finish_reason": "stop" if row else "length",
            }
            samples.append(
                sample
                | ({"messages": [{"role": "user", "content": prompt}]} if name == "policy" else {})
            )
            if name != "reference":
                won = {
                    "verdict": min(row, 1),
                    "scores": [row / 10, 0.05],
                    "reason": f"{row / 10} against 0.05",
                    "consistent": None,
                }
                kind = {
                    "prompt_id": f"p{row}",
                    "sample": 0,
                    "model": name,
                    "against": "reference",
                    "judge": "world.py:score",
                }
                verdicts.append(kind | won | {"length": 3, "length_against": 4})
    metrics = [
        {"split": "eval", "step": step, "loss": 0.25, "kl": step / 100, "margin": step / 50}
        for step in (0, 5, 9)
    ]
    return results, samples, verdicts, metrics


class Page(HTMLParser):
    """Its elements as (tag, attributes), and its text; fails if they are not properly nested."""

    def __init__(self, path):
        super().__init__()
        self.source, self.elements, self.texts, self.open = (
            path.read_text(encoding="utf-8"),
            [],
            [],
            [],
        )
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open += [tag] if tag not in VOID else []

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts += (
            [data.strip()] if data.strip() and self.open[-1] not in ("style", "script") else []
        )

    def follows(self, *texts):
        """Whether the texts stand in the page one after the other."""
        return any(tuple(self.texts[n : n + len(texts)]) == texts for n in range(len(self.texts)))


@pytest.fixture
def written(tmp_path):
    def write(*parts):
        write_report(tmp_path / "report.html", *parts)
        return Page(tmp_path / "report.html")

    return write


def test_the_page_says_the_verdict_and_every_figure_with_its_interval(written):
    page = written(*inputs())
    assert page.follows("loss", "tbpo_a", "base", "pocket", "learning rate", "0.0003")
    assert page.follows("time of training", "16 s", "evaluated on", "2026-11-23")
    assert (
        "tbpo_a is better than its reference: it wins on 74.2% (95 %: 71.5 to 77.1)" in page.texts
    )
    assert any(
        "1,388 held-out pairs" in text and "Gate win_rate > 0.5: 0.742, passed." in text
        for text in page.texts
    )
    assert page.follows(
        "policy – reference, by world.py:score", "74.2%", "71.2 to 77.2%", "1,215", "164", "21"
    )
    assert page.follows("policy", "70.0%", "65.0 to 75.0%", "0.200", "0.150 to 0.250"), (
        "accuracy and margin"
    )
    assert page.follows(
        "reference", "–", "–", "–", "0.480", "0.430 to 0.530", "−0.520", "−0.570 to −0.470"
    )
    assert page.follows(
        "policy", "0.784", "0.764 to 0.804", "41.3", "39.3 to 43.3", "6.8", "6.4 to 7.2"
    )
    assert page.follows("6 to 20", "76.0%", "71.0 to 81.0%"), "by length"
    assert "length controlled" not in page.texts and "cost" not in page.texts, (
        "columns that hold nothing"
    )
    assert "Methods" not in page.texts, (
        "with the policy and its reference alone there is nothing to compare"
    )


def test_several_runs_stand_in_a_table_of_methods_and_what_a_judge_cost_is_shown(written):
    results, *rest = inputs("dpo", "runs/other")
    results["win_rates"][1] |= {
        "raw": figure(0.61),
        "cost": 1.5,
        "prompt_tokens": 12345,
        "inconsistent": figure(0.1),
    }
    results["models"]["dpo"] |= {"loss": "dpo", "suites": {"open-llm-v1": {"gsm8k": figure(0.2)}}}
    page = written(results, *rest)
    assert page.follows(
        "Methods", "loss", "win rate", "score of the completions", "reward accuracy"
    )
    assert page.follows("dpo", "dpo", "61.0%", "56.0 to 66.0%", "0.784")
    assert page.follows("other verdict in the other order", "prompt tokens", "cost")
    assert page.follows("10.0%", "5.0 to 15.0%", "12,345", "1.50")
    assert page.follows(
        "open-llm-v1, without a chat template",
        "gsm8k",
        "●",
        "policy",
        "–",
        "●",
        "reference",
        "–",
        "●",
        "dpo",
        "20.0%",
        "15.0 to 25.0%",
    )


def test_the_charts_show_each_model_at_its_place_with_error_bars_and_the_way_of_the_training(
    written,
):
    page = written(*inputs("dpo"))
    charts = [
        ElementTree.fromstring(chart)
        for chart in re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    ]
    frontier = next(
        chart for chart in charts if chart.get("aria-label").startswith("reward margin by KL")
    )
    assert {"reward margin", "nats", "KL from the reference, nats a token"} <= {
        text.text for text in frontier.iter("text")
    }
    places = [
        (dot.get("r"), float(dot.get("cx")), float(dot.get("cy")))
        for dot in frontier.iter("circle")
    ]
    way, ends = (
        [place for place in places if place[0] == "1.5"],
        [place for place in places if place[0] == "4"],
    )
    assert len(way) == 3 and [x for _, x, _ in way] == sorted(x for _, x, _ in way)
    assert len(ends) == 3 and ends[1][1:] == way[0][1:], (
        "the reference is where the training starts"
    )
    assert ends[2][1] > ends[0][1] and ends[2][2] < ends[0][2], (
        "dpo has the larger KL and the larger margin"
    )
    labels = [chart.get("aria-label").split(" by ")[0] for chart in charts]
    assert labels[:2] == ["74.2 %", "74.2 %"], "each win rate has a bar"
    assert labels[2:9] == [
        "win rate against reference",
        "reward margin",
        "reliability",
        "reward accuracy",
        "entropy",
        "length of the answers",
        "score of the answers",
    ]
    assert "loss" in labels[9:], "the training's curves"


def test_runs_bear_their_names_and_the_win_rates_are_a_chart_with_the_tests_beside(tmp_path):
    results, samples, verdicts, metrics = inputs("dpo")
    test = {"model": "policy", "against": "dpo", "measure": "accuracy", "difference": figure(0.1)}
    test |= {"p": 0.0123, "p_holm": 0.0246}
    results |= {"names": {"policy": "mine"}, "tests": [test, test | {"measure": "win rate"}]}
    write_report(tmp_path / "r.html", results, samples, verdicts, metrics)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "mine – dpo, accuracy" in page and "0.0123" in page and "0.0246" in page
    assert "win rate against reference" in page and ">policy<" not in page


def test_what_changed_is_marked_and_each_verdict_stands_with_its_completion(written):
    results, samples, verdicts, metrics = inputs("dpo")
    verdicts[0] |= {"reason": "the cat & all", "verdict": None, "scores": None, "consistent": False}
    page = written(results, samples, verdicts, metrics)
    assert "red <ins>cat</ins>." in page.source and "red <del>dog</del>." in page.source
    assert page.follows("Say red.", "●", "policy, 8 tokens, cut off", "red", "cat", ".")
    said = "no verdict against reference, by world.py:score, not in both orders:"
    assert page.follows(said, "the cat & all", "●", "reference, 8 tokens, cut off")
    assert page.follows("wins against reference, by world.py:score:", "0.1 against 0.05")
    rows = [attributes for tag, attributes in page.elements if tag == "article"]
    assert rows == [
        {"data-place": "1", "data-verdict": "1", "data-score": "0.1"},
        {"data-place": "0", "data-verdict": "", "data-score": ""},
    ], "what changed most is first"


def test_a_table_with_many_figures_has_them_as_rows(written):
    many = {f"distinct_{n}": figure(n / 10) for n in range(1, 5)}
    many |= {f"length_p{n}": figure(n) for n in (5, 50, 95)} | {"repetition": figure(0.3)}
    results, *rest = inputs("dpo")
    for entry in results["models"].values():
        entry["diversity"] |= many
    page = written(results, *rest)
    assert page.follows("Diversity", "●", "policy", "●", "reference", "●", "dpo")
    assert page.follows("self-BLEU", "41.3", "39.3 to 43.3", "41.3", "39.3 to 43.3", "41.3")


def test_of_too_many_samples_the_worst_and_the_best_are_kept(written):
    results, samples, verdicts, metrics = inputs(
        texts=[(f"Say {n}.", f"{n}.", "x") for n in range(MAX_ROWS + 50)]
    )
    for number, verdict in enumerate(verdicts):
        verdict["verdict"] = 0.5 if 100 <= number < 200 else 1.0 if number % 2 else 0.0
    page = written(results, samples, verdicts, metrics)
    shown = [int(number) for number in re.findall(r">Say (\d+)\.<", page.source)]
    assert len(shown) == MAX_ROWS and shown == sorted(shown), "all of them changed as much"
    assert set(range(MAX_ROWS + 50)) - set(shown) < set(range(100, 200)), "only ties are left out"
    assert any(
        "300 of 350, the worst and the best; 50 between them are left out." in text
        for text in page.texts
    )


def test_an_evaluation_without_judge_samples_and_training_has_a_page_too(written):
    results, *_ = inputs()
    results |= {"win_rates": [], "gate": None}
    for entry in results["models"].values():
        entry |= {"diversity": {}, "score": None}
    page = written(results, [], [], [])
    assert (
        page.follows("Held-out pairs", "reward accuracy")
        and "Win rates" not in page.texts
        and "Training" not in page.texts
    )


def attacked(url="http://x"):
    """Everything that others write, with markup in it."""
    attack = ATTACK.format(url=url)
    results, samples, verdicts, metrics = inputs(
        attack, texts=[(attack, attack, "plain words"), ("Say red.", "red", "dog")]
    )
    results |= {"run": attack, "verdict": attack}
    results["models"][attack]["suites"] = {attack: {attack: figure(0.5)}}
    results["models"][attack]["loss"] = attack
    for verdict in verdicts:
        verdict |= {"judge": attack, "reason": attack}
    results["win_rates"] = [
        rate("policy", judge=attack),
        rate(attack, against=attack, judge=attack),
    ]
    return results, samples, verdicts, metrics


def test_what_models_and_users_write_stays_text_and_only_the_page_s_own_script_may_run(written):
    page, clean = written(*attacked()), written(*inputs("dpo"))
    kinds = {tag for tag, _ in page.elements}
    assert kinds == {tag for tag, _ in clean.elements} and not kinds & {
        "img",
        "a",
        "link",
        "iframe",
        "object",
        "form-action",
    }
    assert not {
        name for _, attributes in page.elements for name in attributes if name.startswith("on")
    }
    (script,) = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(
        a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.split("; ")[:3] == [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{own}'",
    ]
    assert ATTACK.format(url="http://x") in page.texts, "it can be read as it was written"


def test_rows_and_names_stay_text_in_the_page_of_prepared_pairs(tmp_path, base):
    def prepared(text, folder):
        folder.mkdir()
        row = {"prompt": text, "chosen": f"{text} yes", "rejected": text}
        rows = write_jsonl(folder / f"{text.replace('/', '_')[:99]}.jsonl", [row] * 3)
        held_out = write_jsonl(folder / "eval.jsonl", [row | {"prompt": "other"}])
        recipe = write_recipe(folder / "recipe.toml", base, (rows, held_out))
        return Page(run_stage("prepare", recipe, folder / "run") / "prepare/report.html")

    attack = ATTACK.format(url="http://x")
    page, clean = prepared(attack, tmp_path / "attacked"), prepared("plain", tmp_path / "plain")
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in clean.elements}
    assert not {name for _, names in page.elements for name in names if name.startswith("on")}
    assert any("<img src=" in text and text.endswith(".jsonl") for text in page.texts), "the source"
    assert "".join(page.texts).count("document.title") > 6, "the rows' tokens"


def test_a_panel_has_round_ticks_that_span_its_values_and_leaves_out_what_is_not_finite(tmp_path):
    points = [(1.0, 0.11), (9.0, 0.93), (4.0, float("nan")), (float("inf"), 0.5)]
    panel = Panel("a <b>", "%", 'x "y"', [Series(points, dots=3), Series([], 7, line=1)])
    write_page(tmp_path / "one.svg", "curves.svg", panels=[panel])
    (drawn,) = ElementTree.parse(tmp_path / "one.svg").iterfind(f".//{SVG}svg")
    assert drawn.get("aria-label") == 'a <b> by x "y"'
    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    assert texts == [
        "a <b>",
        "%",
        "0",
        "0.2",
        "0.4",
        "0.6",
        "0.8",
        "1.0",
        "0",
        "2",
        "4",
        "6",
        "8",
        "10",
        'x "y"',
    ]
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in drawn.iter(f"{SVG}circle")]
    assert len(dots) == 2 and all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in dots)
    assert [group.get("class") for group in drawn.iter(f"{SVG}g")] == ["series-0", "series-1"], (
        "colours are used in turn"
    )


@pytest.mark.parametrize(
    "low, high, labels",
    [
        (0.2471, 0.2499, ["0.247", "0.248", "0.249", "0.250"]),
        (-0.03, 0.01, ["−0.03", "−0.02", "−0.01", "0", "0.01"]),
        (0, 5e-7, ["0", "1e−7", "2e−7", "3e−7", "4e−7", "5e−7"]),
        (0, 1.5e-6, ["0", "5e−7", "1.0e−6", "1.5e−6"]),
        (0, 40_000, ["0", "10,000", "20,000", "30,000", "40,000"]),
    ],
)
def test_an_axis_has_as_many_digits_as_tell_its_numbers_apart(low, high, labels):
    panel = Panel("", "", "", [Series([(0.0, low), (1.0, high)])])
    assert [label for _, label in panel.y_labels] == labels


def test_the_lengths_of_both_responses_lie_over_each_other_with_their_names():
    values = {0: np.array([3, 3, 5]), 1: np.array([4, 90])}
    panel = histogram("length", "pairs", "tokens", values, ["chosen", "rejected"])
    assert [series.name for series in panel.series] == ["chosen", "rejected"]


def test_a_histogram_counts_whole_numbers_in_bins_of_whole_numbers():
    panel = histogram("length", "pairs", "tokens", {0: np.array([3, 3, 5]), 1: np.array([4, 90])})
    steps = [series.points for series in panel.series]
    assert steps[0][:4] == [(3, 3), (6, 3), (6, 0), (9, 0)] and steps[1][-1] == (93, 1)
    alike = histogram("length", "pairs", "tokens", {0: np.array([7, 7])}).series[0].points
    assert alike == [(7, 2), (8, 2)]
    assert (
        sum(
            y
            for _, y in histogram("score", "", "", {0: np.array([0.0, 0.3, 1.0])}).series[0].points
        )
        == 6
    )


def dump(path, tmp_path, *flags):
    """The document as the browser has it once the page is loaded."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'browser'}",
        *flags,
    ]
    done = subprocess.run(
        [*command, "--dump-dom", path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown_prompts(document):
    rows = re.findall(
        r"<article ([^>]*)>\s*<p class=\"prompt text\">(.*?)</p>", document, re.DOTALL
    )
    return [html.unescape(prompt) for attributes, prompt in rows if "hidden" not in attributes]


@in_browser
def test_the_search_and_the_order_work_and_can_be_linked_to(written, tmp_path):
    texts = [
        ("Say red.", "red cat.", "x"),
        ("Say <b>two</b>.", "a Word", "x"),
        ("Say blue.", "x", "a word"),
    ]
    written(*inputs(texts=texts))
    url = (tmp_path / "report.html").as_uri()
    document = dump(f"{url}#search=WORD&order=-score", tmp_path)
    assert shown_prompts(document) == ["Say blue.", "Say <b>two</b>."]
    assert ">2 shown</output>" in document and '<form id="controls">' in document
    assert shown_prompts(dump(f"{url}#order=verdict", tmp_path)) == [prompt for prompt, *_ in texts]
    assert shown_prompts(dump(f"{url}#search=policy", tmp_path)) == [], (
        "labels of the page are not searched"
    )


@in_browser
def test_markup_of_a_model_does_nothing_in_a_browser_and_no_request_leaves_the_page(
    written, tmp_path
):
    """Not even if it were not escaped: then the page's policy stops it. The same on a page without
    one is seen.
    """
    asked = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    page, attack = tmp_path / "report.html", ATTACK.format(url=url)
    written(*attacked(url))
    document = dump(page.as_uri(), tmp_path)
    assert (
        asked == []
        and "<title>Evaluation of &lt;/script&gt;" in document
        and "owned</title>" not in document
    )
    link = f'<link rel="stylesheet" href="{url}/css">'
    raw = f'{link}<iframe src="{url}/frame"></iframe>{attack}</body>'
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", raw), encoding="utf-8")
    document = dump(page.as_uri(), tmp_path)
    assert asked == [] and "<title>Evaluation of" in document
    page.write_text(f"<title>bare</title><body>{raw}", encoding="utf-8")
    document = dump(page.as_uri(), tmp_path)
    assert {"/css", "/frame", "/img"} <= set(asked) and "<title>bare" not in document
    server.shutdown()
    server.server_close()


def test_paired_tests_of_many_models_fit_into_80_columns_without_a_cut_word(capsys, monkeypatch):
    """A line each, also where there are more tests than columns could stand beside each other."""
    results, *_ = inputs("runs/dpo", "other/dpo")
    others = [("policy", "runs/dpo"), ("policy", "other/dpo"), ("runs/dpo", "other/dpo")]
    results["tests"] = [
        {"model": model, "against": against, "measure": measure, "p": 0.5, "p_holm": 1.0}
        | {"difference": figure(0.1, 0.05)}
        for model, against in others
        for measure in ("accuracy", "win rate, by world.py:score")
    ]
    monkeypatch.setattr(console.out, "width", 80)
    show(results)
    text = capsys.readouterr().out.split("Paired tests")[1].split("Held-out pairs")[0]
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines if "p, after Holm" in line] == [
        ["difference", "p", "p,", "after", "Holm"]
    ]
    for model, against in others:
        start = f"{model} – {against}, accuracy "
        assert any(line.startswith(start) and "+10.0%" in line for line in lines), start
    assert text.count("0.5000") == 6 and text.count("1.0000") == 6
