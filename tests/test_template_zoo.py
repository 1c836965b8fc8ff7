"""Chat templates of all shapes × kinds of tokenizers: exact token ids, or the right refusal.

The expected ids are computed apart from the package: each template is rendered by Jinja alone, each
text is encoded by the tokenizer alone. What a response is, the shape says by itself, as text.
"""

import json
import random
from importlib.resources import files

import jinja2
import pytest
from conftest import sentence
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from tbpo_cli.config.recipe import Data, Source
from tbpo_cli.data.pairs import RejectedRow, make_pair
from tbpo_cli.data.templates import Chat
from tbpo_cli.data.tokens import encode_pairs, render_pairs

DATA = Data(train=(Source("unused"),), max_length=100_000)
EACH, END = "{% for m in messages %}", "{% endfor %}"
GO = "{% if add_generation_prompt %}"
CONTROLS = [
    "[bos]",
    "[end]",
    "[eot]",
    "[s]",
    "[/s]",
    "[u]",
    "[a]",
    "[y]",
    "[t]",
    "[ans]",
    "[/ans]",
    "[call]",
    "[/call]",
]
HEAD = "{{ {'user': '[u]', 'assistant': '[a]', 'system': '[y]', 'tool': '[t]'}[m.role] }}"
CALLS = "{% for c in m.tool_calls or [] %}[call]{{ c.function | tojson }}[/call]{% endfor %}"
TOOLS = "{% if tools %}[y]{{ tools | tojson }}[end]{% endif %}"
THINK = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
CUT = (
    "{% set c = m.content %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}"
)

# A template, the end token, and what "it is 4." becomes as a response; None: refused outright.
TEXT = {
    "plain": (EACH + HEAD + "{{ m.content }}[end]" + END + GO + "[a]{% endif %}", "it is 4.[end]"),
    "newlines": (
        EACH + HEAD + "\n{{ m.content }}[end]\n" + END + GO + "[a]\n{% endif %}",
        "it is 4.[end]",
    ),
    "bos": (
        "[bos]" + EACH + HEAD + "{{ m.content }}[end]" + END + GO + "[a]{% endif %}",
        "it is 4.[end]",
    ),
    "trims": (
        EACH + HEAD + "\n{{ m.content | trim }}[end]" + END + GO + "[a]\n{% endif %}",
        "it is 4.[end]",
    ),
    "roles as words": (
        EACH + "[s]{{ m.role }}\n{{ m.content }}[end]\n" + END + GO + "[s]assistant\n{% endif %}",
        "it is 4.[end]",
    ),
    "header of two tokens": (
        EACH
        + "[s]{{ m.role }}[/s]\n\n{{ m.content }}[end]"
        + END
        + GO
        + "[s]assistant[/s]\n\n{% endif %}",
        "it is 4.[end]",
    ),
    "no header for the assistant": (
        EACH + "{% if m.role == 'user' %}[u] {{ m.content }} [a]{% else %} "
        "{{ m.content }}[end]{% endif %}" + END,
        " it is 4.[end]",
    ),
    "bare words around a question": (
        EACH + "{% if m.role == 'user' %}(INST) {{ m.content }} (/INST){% else %} "
        "{{ m.content }}[end]{% endif %}" + END,
        " it is 4.[end]",
    ),
    "bare words and no space": (
        EACH + "{% if m.role == 'user' %}(INST){{ m.content }}(/INST){% else %}"
        "{{ m.content }}[end]{% endif %}" + END,
        "it is 4.[end]",
    ),
    "words as headers": (
        EACH
        + "### {{ m.role }}:\n{{ m.content }}[end]\n\n"
        + END
        + GO
        + "### assistant:\n{% endif %}",
        "it is 4.[end]",
    ),
    "two closers": (
        EACH + HEAD + "{% if m.role == 'assistant' %}[ans]{% endif %}{{ m.content }}"
        "{% if m.role == 'assistant' %}[/ans]{% endif %}[end]" + END + GO + "[a][ans]{% endif %}",
        "it is 4.[/ans][end]",
    ),
    "three closers with newlines": (
        EACH
        + HEAD
        + "{{ m.content }}{% if m.role == 'assistant' %}[/ans]\n[/s]\n{% endif %}[end]\n"
        + END
        + GO
        + "[a]{% endif %}",
        "it is 4.[/ans]\n[/s]\n[end]",
    ),
    "end of the conversation": (
        EACH + HEAD + "{{ m.content }}[eot]\n" + END + GO + "[a]{% else %}[end]{% endif %}",
        "it is 4.[eot]",
    ),
    "another end for the last turn": (
        EACH + HEAD + "{{ m.content }}{% if loop.last and m.role == 'assistant' %}[end]"
        "{% else %}[eot]{% endif %}" + END + GO + "[a]{% endif %}",
        "it is 4.[end]",
    ),
    "end by a token that is not the tokenizer's": (
        EACH + HEAD + "{{ m.content }}[eot]" + END + GO + "[a]{% endif %}",
        "it is 4.[eot]",
    ),
    "a default system message": (
        "{% if messages[0].role != 'system' %}[y]You help.[end]{% endif %}"
        + EACH
        + HEAD
        + "{{ m.content }}[end]"
        + END
        + GO
        + "[a]{% endif %}",
        "it is 4.[end]",
    ),
    "system in the first question": (
        "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
        + EACH
        + "{% if m.role != 'system' %}"
        + HEAD
        + "{{ s + '\n\n' if s and loop.index0 == 1 else '' }}{{ m.content }}[end]{% endif %}"
        + END
        + GO
        + "[a]{% endif %}",
        "it is 4.[end]",
    ),
    "a date": (
        "[y]{{ strftime_now('%d %b %Y') }}[end]"
        + EACH
        + HEAD
        + "{{ m.content }}[end]"
        + END
        + GO
        + "[a]{% endif %}",
        "it is 4.[end]",
    ),
    "thinking kept": (
        EACH + HEAD + THINK + "{{ m.content }}[end]" + END + GO + "[a]{% endif %}",
        "it is 4.[end]",
    ),
    "thinking stripped": (
        EACH + HEAD + CUT + "{{ c }}[end]" + END + GO + "[a]{% endif %}",
        "it is 4.[end]",
    ),
    "an empty thought before the last answer": (
        EACH + HEAD + "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m.content }}[end]" + END + GO + "[a]{% endif %}",
        "<think>\n\n</think>\n\nit is 4.[end]",
    ),
    "thinking begun by the generation prompt": (
        EACH + HEAD + "{% if m.role == 'assistant' %}<think>\n"
        "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}[end]"
        + END
        + GO
        + "[a]<think>\n{% endif %}",
        "\n</think>\n\nit is 4.[end]",
    ),
    "tools as JSON": (
        TOOLS + EACH + HEAD + "{{ m.content }}" + CALLS + "[end]" + END + GO + "[a]{% endif %}",
        "it is 4.[end]",
    ),
    "tools listed": (
        "{% for t in tools or [] %}[y]{{ t.function.name }}: "
        "{{ t.function.description }}\n{% endfor %}"
        + EACH
        + HEAD
        + "{{ m.content }}"
        + CALLS
        + "[end]"
        + END
        + GO
        + "[a]{% endif %}",
        "it is 4.[end]",
    ),
    "calls as XML": (
        TOOLS
        + EACH
        + HEAD
        + "{{ m.content }}{% for c in m.tool_calls or [] %}[call]{{ c.function.name }}"
        "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>"
        "{% endfor %}[/call]{% endfor %}[end]" + END + GO + "[a]{% endif %}",
        "it is 4.[end]",
    ),
    "calls that want text": (
        TOOLS + EACH + HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}[call]"
        "{{ c.function.name + ' ' + c.function.arguments }}[/call]{% endfor %}[end]"
        + END
        + GO
        + "[a]{% endif %}",
        "it is 4.[end]",
    ),
    "calls that print text": (
        TOOLS
        + EACH
        + HEAD
        + "{{ m.content }}{% for c in m.tool_calls or [] %}[call]{{ c.function.name }} "
        "{{ c.function.arguments }}[/call]{% endfor %}[end]" + END + GO + "[a]{% endif %}",
        "it is 4.[end]",
    ),
    "calls are all but the first content": (
        TOOLS
        + EACH
        + HEAD
        + "{% if m.tool_calls %}"
        + CALLS
        + "{% else %}{{ m.content }}{% endif %}[end]"
        + END
        + GO
        + "[a]{% endif %}",
        "it is 4.[end]",
    ),
}
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
)
NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
)


def by_bytes(text):
    """A byte-level tokenizer, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def by_metaspace(text, scheme):
    """A tokenizer that writes spaces as ▁ and puts one first: of the whole text, or everywhere."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme=scheme)
    alphabet = [chr(code) for code in range(32, 127)] + ["\n", "\x01", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def like_tekken(text):
    """Byte-level behind the pattern of Mistral's tekken, whose file mistral_common ships."""
    newest = sorted((files("mistral_common") / "data").glob("tekken*.json"))[-1]
    pattern = json.loads(newest.read_text(encoding="utf-8"))["config"]["pattern"]
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


KINDS = {
    "byte-level": by_bytes,
    "metaspace first": lambda text: by_metaspace(text, "first"),
    "metaspace always": lambda text: by_metaspace(text, "always"),
    "tekken": like_tekken,
}


@pytest.fixture(scope="module")
def tokenizers():
    rng = random.Random(0)
    text = [
        f"{sentence(rng)} it is {rng.randint(0, 9)}.\n(INST) assistant user: <think>"
        for _ in range(300)
    ]
    made = {}
    for kind, train in KINDS.items():
        tokenizer = train(text)
        tokenizer.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t in CONTROLS]
        )
        made[kind] = tokenizer
    return made


def chat_of(tokenizers, kind, template):
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizers[kind], eos_token="[end]")
    fast.chat_template = template
    return Chat(fast, "2026-01-01")


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tokens_of(chat, prompt, answer, tools=()):
    pair = make_pair({"tools": [*tools]}, tuple(prompt), answer, assistant("no."))
    (result,) = encode_pairs(render_pairs([pair], chat), chat, DATA)
    return result


def rendered(template, messages, **given):
    """By Jinja alone, with what transformers gives to a template."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["strftime_now"] = lambda form: "01 Jan 2026"
    return environment.from_string(template).render(messages=messages, **given)


def encoded_alone(tokenizer, kind, text):
    """A text as it is where other text stands before it: without the space of SentencePiece.

    Behind an unknown character, which is never merged with what follows it.
    """
    if not kind.startswith("metaspace"):
        return tokenizer.encode(text, add_special_tokens=False).ids
    before = tokenizer.encode("\x01", add_special_tokens=False).ids
    both = tokenizer.encode("\x01" + text, add_special_tokens=False).ids
    assert both[: len(before)] == before
    return both[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEXT)
def test_prompt_and_response_have_the_ids_of_an_independent_computation(tokenizers, name, kind):
    template, response = TEXT[name]
    chat, tokenizer = chat_of(tokenizers, kind, template), tokenizers[kind]
    for question in ("what is 2 + 2", "red (cat)\n", "(dog)"):
        pair = tokens_of(chat, [user(question)], assistant("it is 4."))
        prompt = rendered(template, [user(question)], add_generation_prompt=True, tools=None)
        assert pair.prompt_ids == tokenizer.encode(prompt, add_special_tokens=False).ids
        ids = encoded_alone(tokenizer, kind, response)
        if kind == "metaspace always" and prompt.endswith("]"):  # a space behind a control token
            ids = tokenizer.encode("[a]" + response, add_special_tokens=False).ids[1:]
        assert pair.chosen_ids == ids
        assert pair.chosen_ids[-1] == chat.end_ids[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEXT)
def test_a_control_token_in_a_users_text_changes_no_other_token(tokenizers, name, kind):
    """What stands before it and behind it is encoded as if it were any other word."""
    template, _ = TEXT[name]
    chat, tokenizer = chat_of(tokenizers, kind, template), tokenizers[kind]
    controls = {tokenizer.token_to_id(token) for token in CONTROLS}
    plain = tokens_of(chat, [user("one dog")], assistant("it is 4.")).prompt_ids
    tricked = tokens_of(chat, [user("one [end] dog")], assistant("it is 4.")).prompt_ids
    assert [i for i in tricked if i in controls] == [i for i in plain if i in controls]
    before = next(i for i, (a, b) in enumerate(zip(plain, tricked, strict=False)) if a != b)
    behind = next(
        i for i, (a, b) in enumerate(zip(plain[::-1], tricked[::-1], strict=False)) if a != b
    )
    assert "end" in tokenizer.decode(tricked[before : len(tricked) - behind]), "it is readable"
    assert len(plain) - before - behind <= 3, "all but the neighbourhood is the same"


@pytest.mark.parametrize("opening", ["(", "<", "*", "[", "#", "1", "\n", " "])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_begins_without_a_stray_space_behind_bare_words(tokenizers, kind, opening):
    template, _ = TEXT["bare words and no space"]
    chat, tokenizer = chat_of(tokenizers, kind, template), tokenizers[kind]
    answer = f"{opening}cat runs."
    pair = tokens_of(chat, [user("dog")], assistant(answer))
    assert pair.chosen_ids == encoded_alone(tokenizer, kind, f"{answer}[end]")


TOOL = {
    "type": "function",
    "function": {"name": "look_up", "description": "finds", "parameters": {}},
}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"q": "two cats", "n": 3}}}
CALLING = {
    "tools as JSON",
    "tools listed",
    "calls as XML",
    "calls that want text",
    "calls that print text",
    "calls are all but the first content",
}


@pytest.mark.parametrize("name", TEXT)
def test_a_call_of_a_tool_is_in_the_tokens_or_the_row_is_refused(tokenizers, name):
    chat = chat_of(tokenizers, "byte-level", TEXT[name][0])
    with_tools = tokens_of(chat, [user("look")], assistant("", tool_calls=[CALL]), [TOOL])
    without = tokens_of(chat, [user("look")], assistant("", tool_calls=[CALL]))
    if name not in CALLING:
        assert with_tools.reason == without.reason == "not_rendered"
        assert 'the tool: "look_up"' in with_tools.detail
        assert 'the call of the tool: "look_up"' in without.detail
        return
    said = chat.tokenizer.decode(with_tools.chosen_ids)
    assert "look_up" in chat.tokenizer.decode(with_tools.prompt_ids)
    assert said.startswith("[call]") and said.endswith("[/call][end]")
    assert "two cats" in said and "3" in said and "'" not in said, "not in Python's notation"


@pytest.mark.parametrize("name", TEXT)
def test_reasoning_is_in_the_tokens_or_the_row_is_refused(tokenizers, name):
    chat = chat_of(tokenizers, "byte-level", TEXT[name][0])
    apart = tokens_of(chat, [user("x")], assistant("it is 4.", reasoning_content="two and two"))
    if name in ("thinking kept", "thinking begun by the generation prompt"):
        assert "two and two" in chat.tokenizer.decode(apart.chosen_ids)
    else:
        assert apart.reason == "not_rendered" and "reasoning_content" in apart.detail
    within = tokens_of(chat, [user("x")], assistant("<think>two and two</think>it is 4."))
    if name == "thinking stripped":
        assert within.reason == "not_rendered" and '"two and two"' in within.detail
    else:
        assert "two and two</think>it is 4." in chat.tokenizer.decode(within.chosen_ids)


@pytest.mark.parametrize("name", TEXT)
def test_a_system_message_is_in_the_prompt_or_the_row_is_refused(tokenizers, name):
    chat = chat_of(tokenizers, "byte-level", TEXT[name][0])
    system = {"role": "system", "content": "be red"}
    found = tokens_of(chat, [system, user("x")], assistant("it is 4."))
    if name in (
        "bare words around a question",
        "bare words and no space",
        "no header for the assistant",
    ):
        assert found.prompt_ids, "rendered as if it were an answer, but there"
    assert "be red" in chat.tokenizer.decode(found.prompt_ids)


def test_a_dropped_system_message_and_dropped_text_are_refused(tokenizers):
    plain = TEXT["plain"][0]
    drops = plain.replace(EACH, "{% for m in messages if m.role != 'system' %}")
    system = {"role": "system", "content": "be red"}
    found = tokens_of(chat_of(tokenizers, "byte-level", drops), [system, user("x")], assistant("4"))
    assert (found.reason, '"be red"' in found.detail) == ("not_rendered", True)
    shortens = plain.replace("{{ m.content }}", "{{ m.content[:4] }}")
    chat = chat_of(tokenizers, "byte-level", shortens)
    assert tokens_of(chat, [user("dog")], assistant("it is 4.")).reason == "not_rendered"
    assert tokens_of(chat, [user("a longer question")], assistant("4")).reason == "not_rendered"


def called(*calls):
    return [
        {"type": "function", "function": {"name": name, "arguments": given}}
        for name, given in calls
    ]


FIRST_CALL = "{% for c in (m.tool_calls or [])[:1] %}[call]{{ c.function.name }} "
ONE_CALL = FIRST_CALL + "{{ c.function.arguments | tojson }}[/call]{% endfor %}"
SHOWN = "{{ m.content }}"
# What a template drops, of which the text is in the rendering for another reason.
DROPS = {
    "a message that begins a later one": (
        ("{% for m in messages %}", "{% for m in messages[-2:] %}"),
        [user("red"), assistant("cat"), user("red cat")],
        assistant("it is 4."),
        "the message of user",
    ),
    "a system message of a role's name": (
        ("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
        [{"role": "system", "content": "[u]"}, user("red cat")],
        assistant("it is 4."),
        "the message of system",
    ),
    "the second of two calls that are the same": (
        (SHOWN, SHOWN + ONE_CALL),
        [user("x")],
        assistant("", tool_calls=called(("w", {"n": 1}), ("w", {"n": 1}))),
        "the call of the tool",
    ),
    "a second call within the first one": (
        (SHOWN, SHOWN + ONE_CALL),
        [user("x")],
        assistant("", tool_calls=called(("w", {"n": 12}), ("w", {"n": 1}))),
        "the call of the tool",
    ),
    "a number that is in the answer": (
        (SHOWN, SHOWN + FIRST_CALL + "n[/call]{% endfor %}"),
        [user("x")],
        assistant("it is 4.", tool_calls=called(("w", {"n": 4}))),
        "an argument of the call of w",
    ),
    "a short name of a tool": (
        (SHOWN, SHOWN),
        [user("x")],
        assistant("we see 4.", tool_calls=called(("w", {}))),
        "the call of the tool",
    ),
    "reasoning that the answer repeats": (
        (SHOWN, SHOWN),
        [user("x")],
        assistant("red cat.", reasoning_content="red"),
        "the answer's reasoning_content",
    ),
}


@pytest.mark.parametrize("name", DROPS)
def test_what_a_template_drops_is_missed_though_its_text_stands_elsewhere(tokenizers, name):
    (text, changed), prompt, answer, what = DROPS[name]
    plain = TEXT["plain"][0]
    assert text in plain
    found = tokens_of(
        chat_of(tokenizers, "byte-level", plain.replace(text, changed, 1)), prompt, answer
    )
    assert isinstance(found, RejectedRow), found
    assert found.reason == "not_rendered"
    assert f"leaves out {what}" in found.detail


def test_short_and_repeated_texts_that_are_rendered_are_taken(tokenizers):
    every = (
        FIRST_CALL.replace("[:1]", "") + "{{ c.function.arguments | tojson }}[/call]{% endfor %}"
    )
    chat = chat_of(tokenizers, "byte-level", TEXT["plain"][0].replace(SHOWN, SHOWN + every, 1))
    twice = called(("w", {"n": 1, "of": ["a", "a"]}), ("w", {"n": 1, "is": True, "x": 0.5}))
    found = tokens_of(
        chat, [user("a"), assistant("a"), user("a")], assistant("a", tool_calls=twice)
    )
    assert chat.tokenizer.decode(found.chosen_ids) == (
        'a[call]w {"n": 1, "of": ["a", "a"]}[/call]'
        '[call]w {"n": 1, "is": true, "x": 0.5}[/call][end]'
    )


@pytest.mark.parametrize("is_special", [True, False])
def test_marks_of_reasoning_in_answers_are_seen_by_the_template_and_are_their_tokens(
    tokenizers, is_special
):
    text = str(tokenizers["byte-level"].to_str())
    tokenizer = Tokenizer.from_str(text)
    tokenizer.add_tokens(
        [AddedToken(mark, special=is_special) for mark in ("<think>", "</think>", "<tool_call>")]
    )
    earlier = "{% if m.role == 'assistant' and not loop.last %}"
    strips = earlier + "{{ m.content.split('</think>')[-1] }}{% else %}" + SHOWN + "{% endif %}"
    template = TEXT["plain"][0].replace(SHOWN, strips, 1)
    chat = chat_of({"byte-level": tokenizer}, "byte-level", template)
    history = [user("</think> red"), assistant("<think>old</think>it is 4."), user("x")]
    answer = "<think>two</think><tool_call>four"
    found = tokens_of(chat, history, assistant(answer))
    think, closed, call = map(tokenizer.token_to_id, ("<think>", "</think>", "<tool_call>"))
    two, four = (tokenizer.encode(word).ids for word in ("two", "four"))
    end = [tokenizer.token_to_id("[end]")]
    assert found.chosen_ids == [think, *two, closed, call, *four, *end]
    assert chat.encoder.decode(found.chosen_ids) == answer
    prompt = chat.tokenizer.decode(found.prompt_ids)
    assert "old" not in prompt and "it is 4." in prompt
    # In a user's text a special token stays text.
    assert (closed in found.prompt_ids) is not is_special


def test_an_answer_without_the_reasoning_that_its_template_wants_is_one_rejected_row(tokenizers):
    begun = TEXT["plain"][0].replace("[a]{% endif %}", "[a]<think>\n{% endif %}")
    chat = chat_of(tokenizers, "byte-level", begun)
    with_it = tokens_of(chat, [user("x")], assistant("<think>\ntwo</think>it is 4."))
    assert isinstance(with_it, RejectedRow)  # the answer of the other side has none
    assert with_it.reason == "template_error"
    assert "\ue0fa" not in with_it.detail


def test_a_rejected_answer_that_was_cut_has_no_end(tokenizers):
    chat = chat_of(tokenizers, "byte-level", TEXT["three closers with newlines"][0])
    cut = assistant("red cat", is_cut=True)
    pairs = [
        make_pair({}, (user("x"),), assistant("it is 4."), rejected)
        for rejected in (cut, assistant("red cat"))
    ]
    without, whole = encode_pairs(render_pairs(pairs, chat), chat, DATA)
    said = tokenizers["byte-level"].encode("red cat").ids
    assert without.rejected_ids == said
    assert whole.rejected_ids[: len(said)] == said and len(whole.rejected_ids) > len(said)
    assert without.chosen_ids == whole.chosen_ids


def test_a_template_that_reads_only_lists_of_parts_is_given_them(tokenizers):
    parts = "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"
    of_parts = TEXT["plain"][0].replace(SHOWN, parts, 1)
    want, found = (
        tokens_of(chat_of(tokenizers, "byte-level", template), [user("red cat")], assistant("4."))
        for template in (TEXT["plain"][0], of_parts)
    )
    assert found.prompt_ids == want.prompt_ids
    assert found.chosen_ids == want.chosen_ids


def test_a_template_that_refuses_or_needs_a_system_message_still_says_where_it_ends(tokenizers):
    system, plain = {"role": "system", "content": "be red"}, TEXT["two closers"][0]
    for check, with_system, without in (
        (REFUSES_SYSTEM, "template_error", None),
        (NEEDS_SYSTEM, None, "template_error"),
    ):
        chat = chat_of(tokenizers, "byte-level", check + plain)
        for prompt, reason in (([system, user("x")], with_system), ([user("x")], without)):
            found = tokens_of(chat, prompt, assistant("it is 4."))
            assert (found.reason if isinstance(found, RejectedRow) else None) == reason
        assert chat.end_ids[0] == chat.tokenizer.convert_tokens_to_ids("[end]")


def test_generation_stops_at_all_end_tokens_of_template_base_and_tokenizer(tokenizers):
    template, _ = TEXT["end by a token that is not the tokenizer's"]
    chat = chat_of(tokenizers, "byte-level", template)
    ids = chat.tokenizer.convert_tokens_to_ids(["[eot]", "[/s]", "[end]"])
    with_base = Chat(chat.tokenizer, chat.template_date, base_end_ids=(ids[1],))
    assert list(with_base.end_ids) == ids
    stops_early = Chat(chat.tokenizer, chat.template_date, base_end_ids=(ids[1],))
    stops_early.tokenizer.chat_template = TEXT["three closers with newlines"][0]
    pair = tokens_of(
        Chat(stops_early.tokenizer, "2026-01-01", (ids[1],)), [user("x")], assistant("4")
    )
    assert chat.tokenizer.decode(pair.chosen_ids) == "4[/ans]\n[/s]", "the base stops there"


def test_one_row_that_a_template_renders_otherwise_does_not_stop_the_others(tokenizers):
    """The template prints another header before an answer with a call."""
    template = (
        EACH
        + HEAD
        + "{% if m.tool_calls %}!{% endif %}{{ m.content }}"
        + CALLS
        + "[end]"
        + END
        + GO
        + "[a]{% endif %}"
    )
    template = template.replace(HEAD, "{{ '[t]' if m.tool_calls else '' }}" + HEAD)
    chat = chat_of(tokenizers, "byte-level", template)
    assert tokens_of(chat, [user("x")], assistant("it is 4.")).chosen_ids
    found = tokens_of(chat, [user("x")], assistant("", tool_calls=[CALL]))
    assert (found.reason, "differently" in found.detail) == ("template_error", True)
