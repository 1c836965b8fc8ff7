"""Has the model collapsed? Several completions of each prompt, and how much they differ.

Source: arXiv 2605.12288, its evaluation of diversity: 100 test prompts, 5 samples each, temperature
1, top_p 0.95, 128 new tokens.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tbpo_cli.evaluation.measures import NUM_GRAMS, PERCENTILES
from tbpo_cli.evaluation.stats import (
    Figure,
    figure,
    figure_of,
    jackknife_figure,
    mean_of_groups,
    rate_figure,
)

PROTOCOL: dict[str, Any] = {
    "num_samples": 5,
    "temperature": 1.0,
    "top_p": 0.95,
    "max_new_tokens": 128,
}  # of [sample]
WORD = re.compile(r"\w+|[^\w\s]")
# Characters of scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer; Chinese
# and Japanese with their punctuation; full-width forms.
UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2e80-\u312f\u31a0-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef"
    "\U00020000-\U0003ffff]"
)


def summarise(samples: list[dict[str, Any]]) -> dict[str, Figure]:
    """The figures; prompts are what is resampled.

    predictive_entropy (nats) of the full distributions that tokens were drawn from, a mean over
    tokens, then samples, then prompts; self_bleu (0 to 100), the sentence BLEU of ordered pairs of
    a prompt's samples; distinct_n, the share of different n-grams among those of the first samples
    of all prompts, of words and punctuation in lower case; both take each character of a script
    without spaces, as Chinese, for a word; repetition, seq-rep-4 of Welleck et al.,
    "Neural Text Generation with Unlikelihood Training" (2020): 1 − the share of different 4-grams
    among the 4-grams of a sample's tokens, 0 for fewer than 4 tokens; truncated, the share of
    samples that did not end by themselves; length, tokens, and its percentiles.
    """
    samples = sorted(samples, key=lambda sample: (sample["prompt_id"], sample["sample"]))
    by_prompt = [
        list(group)
        for _, group in itertools.groupby(samples, key=lambda sample: sample["prompt_id"])
    ]

    def mean_of(value: Callable[[Any], float], made: Callable[..., Figure] = figure) -> Figure:
        prompts = [sample["prompt_id"] for sample in samples]
        return mean_of_groups(prompts, [value(sample) for sample in samples], made)

    first = [WORD.findall(spaced(group[0]["completion"]).lower()) for group in by_prompt]
    lengths = [[len(sample["token_ids"]) for sample in group] for group in by_prompt]
    return {
        "predictive_entropy": mean_of(lambda sample: sample["entropy"]),
        "self_bleu": figure(
            [self_bleu([sample["completion"] for sample in group]) for group in by_prompt]
        ),
        **{f"distinct_{size}": distinct(first, size) for size in range(1, NUM_GRAMS + 1)},
        "repetition": mean_of(lambda sample: repetition(sample["token_ids"]), rate_figure),
        "truncated": mean_of(lambda sample: sample["finish_reason"] == "length", rate_figure),
        "length": figure_of(np.mean, lengths),
        **{
            f"length_p{q}": figure_of(functools.partial(np.percentile, q=q), lengths)
            for q in PERCENTILES
        },
    }


def self_bleu(texts: Sequence[str]) -> float:
    """Mean sentence BLEU of each text against each other one, 0 to 100: the lower, the more they
    differ.

    Source: Zhu et al., "Texygen" (2018); BLEU as sacrebleu computes it, with its exponential
    smoothing, of the words of its tokenizer "13a". In scripts without spaces each character is a
    word, as in its tokenizers "zh" and, for Japanese, "char".
    """
    from sacrebleu import sentence_bleu

    pairs = itertools.permutations(map(spaced, texts), 2)
    # Two texts without a word are the same, and BLEU, which has nothing to count, gives 0.
    return float(np.mean([100.0 if a == b else sentence_bleu(a, [b]).score for a, b in pairs]))


def spaced(text: str) -> str:
    """The text, with spaces around each character of a script that has none between words."""
    return UNSPACED.sub(r" \g<0> ", text)


def distinct(texts: Sequence[Sequence[str]], size: int) -> Figure:
    """Different n-grams over n-grams of all texts together, with a jackknife interval over the
    texts, within 0 to 1.

    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models"
    (2016).
    """
    counts = [Counter(_grams(text, size)) for text in texts]
    total = Counter(itertools.chain.from_iterable(count.elements() for count in counts))
    different = len(total)
    grams = total.total()
    left_out = [
        (different - sum(total[gram] == times for gram, times in count.items()))
        / max(1, grams - count.total())
        for count in counts
    ]
    found = jackknife_figure(different / max(1, grams), left_out)
    if found["low"] is None:
        return found
    return found | {"low": max(0.0, found["low"]), "high": min(1.0, found["high"])}


def repetition(token_ids: Sequence[int]) -> float:
    """seq-rep-4 of one sample, see `summarise`."""
    grams = list(_grams(token_ids, 4))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(items: Sequence[Any], size: int) -> Iterator[tuple[Any, ...]]:
    return zip(*(items[start:] for start in range(size)), strict=False)
