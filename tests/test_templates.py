"""What is trained on is what inference will see, for the shapes of template and tokenizer that
models come with.
"""

import json
import shutil
from importlib.resources import files

import pytest
from conftest import CHATML, train_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tbpo_cli.config.recipe import Data, Source
from tbpo_cli.data.encoder import unmask
from tbpo_cli.data.pairs import RejectedRow, make_pair
from tbpo_cli.data.templates import Chat
from tbpo_cli.data.tokens import encode_pairs, render_pairs
from tbpo_cli.errors import TbpoError

DATA = Data(train=(Source("unused"),), max_length=1_000_000)
EACH = "{% for m in messages %}"
END = "{% endfor %}"
START = "{% if add_generation_prompt %}"

# name → (template, end of turn, other control tokens). Written here after the shape of the
# models' own.
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>", ["<|im_start|>"]),
    "llama3": (
        "<|begin|>"
        + EACH
        + "<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>"
        + END
        + START
        + "<|header|>assistant<|/header|>\n\n{% endif %}",
        "<|eot|>",
        ["<|begin|>", "<|header|>", "<|/header|>"],
    ),
    "mistral": (
        "<s>" + EACH + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}" + END,
        "</s>",
        ["<s>"],
    ),
    "mistral with control tokens": (
        "<s>"
        + EACH
        + "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        + "{% else %}{{ m.content }}</s>{% endif %}"
        + END,
        "</s>",
        ["<s>", "[INST]", "[/INST]"],
    ),
    "gemma": (
        "<bos>"
        + EACH
        + "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n" + END + START + "<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
        ["<bos>", "<start_of_turn>"],
    ),
    "zephyr": (
        EACH
        + "<|{{ m.role }}|>\n{{ m.content }}</s>\n"
        + END
        + START
        + "<|assistant|>\n{% endif %}",
        "</s>",
        [],
    ),
    "phi": (
        EACH
        + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
        + END
        + START
        + "<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
        "<|end|>",
        ["<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"],
    ),
    "default system prompt": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        + CHATML,
        "<|im_end|>",
        ["<|im_start|>"],
    ),
    "date": ("Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML, "<|im_end|>", ["<|im_start|>"]),
    "tools": (
        "{% if tools %}<|tools|>{{ tools | tojson }}\n{% endif %}"
        + EACH
        + "<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}<|call|>{{ call.function | tojson }}{% endfor %}"
        "<|im_end|>\n" + END + START + "<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
        ["<|im_start|>", "<|tools|>", "<|call|>"],
    ),
}
TOKENIZERS = ("byte-level BPE", "SentencePiece", "SentencePiece, legacy")


@pytest.fixture(scope="module")
def chat_of(tmp_path_factory):
    """chat_of(tokenizer's name, template's name) → Chat, made once."""
    made = {}

    def load(name):
        if name == "byte-level BPE":
            return train_tokenizer()
        folder = tmp_path_factory.mktemp("sentencepiece")
        shutil.copy(
            str(files("mistral_common") / "data" / "tokenizer.model.v1"), folder / "tokenizer.model"
        )
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": "legacy" in name, **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "config.json").write_text('{"model_type": "llama"}')
        return AutoTokenizer.from_pretrained(folder)

    def of(tokenizer_name, template_name):
        if (tokenizer_name, template_name) not in made:
            tokenizer = load(tokenizer_name)
            template, end, controls = TEMPLATES[template_name]
            tokenizer.add_special_tokens({"eos_token": end, "additional_special_tokens": controls})
            tokenizer.chat_template = template
            made[tokenizer_name, template_name] = Chat(tokenizer, "2026-01-01")
        return made[tokenizer_name, template_name]

    return of


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tokens_of(chat, prompt, answer, row=None):
    other = assistant("no" if answer["content"] != "no" else "yes")
    pair = make_pair(row or {}, tuple(prompt), answer, other)
    (result,) = encode_pairs(render_pairs([pair], chat), chat, DATA)
    return result


SCRIPTS = [
    "hello",
    "日本語の文",
    "नमस्ते दुनिया",
    "مرحبا بالعالم",
    "Ünïcödé",
    "👩‍👩‍👧 🇪🇺",
    "e\u0301a\u0308",
    "a\x00b",
    "x  y",
    "1 + 1",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from([*SCRIPTS, "\n", "\t", " "]), min_size=1, max_size=6).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
).filter(lambda text: text.strip())


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("template_name", TEMPLATES)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(question=TEXTS, answer=TEXTS)
@example(question="  hello ", answer="\n\n hello  ")
@example(question="hello", answer="日本語")
@example(question="\ue0fa", answer="\ue0fb")
def test_prompt_and_response_are_what_inference_sees(
    chat_of, tokenizer_name, template_name, question, answer
):
    """The prompt's ids are those of the rendered prompt. The response ends with the one end of
    turn, decodes to the rest of the rendering, and where the tokenizer itself puts a boundary
    at the cut, its ids are the rest of these."""
    chat = chat_of(tokenizer_name, template_name)
    tokenizer, end = chat.tokenizer, TEMPLATES[template_name][1]
    pair = tokens_of(chat, [user(question)], assistant(answer))
    prompt = unmask(chat.render((user(question),), (), add_generation_prompt=True))
    full = unmask(chat.render((user(question), assistant(answer)), ()))
    response = full[len(prompt) : full.rindex(end) + len(end)]
    assert list(pair.prompt_ids) == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert list(pair.chosen_ids).count(end_id) == 1 and pair.chosen_ids[-1] == end_id
    control_ids = set(tokenizer.all_special_ids) | set(
        tokenizer.convert_tokens_to_ids(TEMPLATES[template_name][2])
    )
    assert not control_ids & set(pair.chosen_ids[:-1]), "no control token is invented"
    text = tokenizer.decode([*pair.prompt_ids, *pair.chosen_ids])
    assert text.endswith(response) or tokenizer_name != "byte-level BPE"
    joint = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
    if joint[: len(pair.prompt_ids)] == list(pair.prompt_ids):
        assert joint == [*pair.prompt_ids, *pair.chosen_ids]


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("template_name", TEMPLATES)
def test_control_tokens_in_a_users_text_are_text(chat_of, tokenizer_name, template_name):
    """Written by a user, every control token of the model changes no count of control tokens, and
    is still readable. So it is in an answer, but for marks of calls, which the model writes.
    """
    chat = chat_of(tokenizer_name, template_name)
    _, end, others = TEMPLATES[template_name]
    trick = f"before {end}{''.join(others)} after \ue0fa41\ue0fb"
    answer = trick.replace("<|call|>", "")
    plain = tokens_of(chat, [user("before")], assistant("before"))
    tricked = tokens_of(chat, [user(trick)], assistant(answer))
    for token in (end, *others):
        number = chat.tokenizer.convert_tokens_to_ids(token)
        for side in ("prompt_ids", "chosen_ids"):
            assert list(getattr(tricked, side)).count(number) == list(getattr(plain, side)).count(
                number
            )
    assert trick in chat.tokenizer.decode(tricked.prompt_ids)
    assert answer in chat.tokenizer.decode(tricked.chosen_ids)


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_control_tokens_that_the_vocabulary_makes_of_their_letters_are_text_in_a_text(kind):
    """BPE merges the letters of "</s>" to it; for Unigram it is the likeliest piece."""
    letters = [*"helo<>/sua "]
    if kind == "BPE":
        merges = [("<", "/"), ("</", "s"), ("</s", ">"), ("</s>", "o"), ("<", "u"), ("<u", ">")]
        vocabulary = [*letters, *map("".join, merges)]
        model = models.BPE({text: place for place, text in enumerate(vocabulary)}, merges)
    else:
        pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<u>", 0.0)]
        model = models.Unigram([*pieces, *((letter, -2.0) for letter in letters)], 0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), eos_token="</s>", additional_special_tokens=["<u>"]
    )
    tokenizer.chat_template = EACH + "<u>{{ m.content }}</s>" + END + START + "<u>{% endif %}"
    chat = Chat(tokenizer, "2026-01-01")
    plain, tricky = (
        tokens_of(chat, [user(text)], assistant(text)) for text in ("hello", "a</s>oh<u>")
    )
    seen = chat.render((user("hello"),), (), add_generation_prompt=True)
    assert list(plain.prompt_ids) == tokenizer(seen, add_special_tokens=False)["input_ids"]
    start, end = tokenizer.convert_tokens_to_ids(["<u>", "</s>"])
    for ids, controls in ((tricky.prompt_ids, [start, end, start]), (tricky.chosen_ids, [end])):
        assert [each for each in ids if each in (start, end)] == controls
        assert "".join(tokenizer.convert_ids_to_tokens(ids)).count("a</s>oh<u>") == 1


def test_a_beginning_of_sequence_token_stands_once_where_the_template_puts_it(chat_of):
    for name in ("llama3", "mistral", "gemma"):
        chat = chat_of("SentencePiece", name)
        bos = chat.tokenizer.convert_tokens_to_ids(TEMPLATES[name][2][0])
        pair = tokens_of(chat, [user("hello"), assistant("hi"), user("again")], assistant("yes"))
        assert (pair.prompt_ids[0], [*pair.prompt_ids, *pair.chosen_ids].count(bos)) == (bos, 1)


def test_sentencepiece_invents_no_space_before_an_answer(chat_of):
    """After "[/INST]", " hello" is the token ▁hell…, not a space and then one; after a newline,
    "hello" has none.
    """
    for tokenizer_name in TOKENIZERS[1:]:
        for name, first in (("mistral", "▁hell"), ("zephyr", "hello")):
            chat = chat_of(tokenizer_name, name)
            pair = tokens_of(chat, [user("x")], assistant("hello"))
            assert chat.tokenizer.convert_ids_to_tokens(list(pair.chosen_ids))[0] == first


def test_a_template_that_trims_leaves_no_difference_between_answers_that_it_trims_alike(chat_of):
    chat = chat_of("byte-level BPE", "llama3")
    pair = make_pair({}, (user("x"),), assistant("hi"), assistant(" hi\n"))
    (result,) = encode_pairs(render_pairs([pair], chat), chat, DATA)
    assert result.reason == "identical"


def test_a_template_that_refuses_a_role_rejects_the_row(chat_of):
    chat = chat_of("byte-level BPE", "gemma")
    result = tokens_of(
        chat, [{"role": "system", "content": "Be kind."}, user("x")], assistant("hi")
    )
    assert isinstance(result, RejectedRow) and result.reason == "template_error"
    assert "System role not supported" in result.detail


def test_a_default_system_prompt_and_a_date_are_in_the_prompt_once(chat_of):
    for name, said in (("default system prompt", "You help."), ("date", "Today is 01 Jan 2026.")):
        chat = chat_of("byte-level BPE", name)
        pair = tokens_of(chat, [user("x")], assistant("hi"))
        assert chat.tokenizer.decode(pair.prompt_ids).count(said) == 1
        assert said not in chat.tokenizer.decode(pair.chosen_ids)


def test_tools_and_their_replies_are_rendered_and_an_answer_may_be_a_call(chat_of):
    chat = chat_of("byte-level BPE", "tools")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    prompt = [user("x"), assistant("", tool_calls=[call]), {"role": "tool", "content": "2"}]
    row = {"tools": json.dumps([{"type": "function", "function": {"name": "add"}}])}
    said = chat.tokenizer.decode(tokens_of(chat, prompt, assistant("two"), row).prompt_ids)
    assert '<|tools|>[{"type": "function", "function": {"name": "add"}}]' in said
    assert (
        '<|call|>{"name": "add", "arguments": {"a": 1}}<|im_end|>' in said
        and "tool\n2<|im_end|>" in said
    )
    answer = tokens_of(chat, [user("x")], assistant("", tool_calls=[call]), row)
    assert (
        chat.tokenizer.decode(answer.chosen_ids)
        == '<|call|>{"name": "add", "arguments": {"a": 1}}<|im_end|>'
    )


def test_a_line_of_a_megabyte_is_tokenized(chat_of):
    chat = chat_of("byte-level BPE", "chatml")
    text = "red dog " * 125_000
    assert (
        chat.tokenizer.decode(tokens_of(chat, [user("x")], assistant(text)).chosen_ids)
        == text + "<|im_end|>"
    )


def test_a_template_that_renders_the_prompt_differently_is_refused_with_both_renderings(chat_of):
    chat = chat_of("byte-level BPE", "chatml")
    template = "{% if messages[-1].role == 'user' %}Question: {% endif %}" + CHATML
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(TbpoError, match="differently once an answer follows") as error:
        tokens_of(Chat(tokenizer, chat.template_date), [user("x")], assistant("hi"))
    assert "prompt alone: …'Question: <|im_start|>user" in error.value.where
    assert "with answer:  …'<|im_start|>user" in error.value.where
    assert "model.chat_template" in error.value.fix
