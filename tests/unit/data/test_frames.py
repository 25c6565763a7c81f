"""A frame gives what the template gives, and there is none where the template looks at a text."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbline.data.frames import Looked, Unread, find_frame, unread
from plumbline.data.prompting import most_of_all, place_principle, render, render_all
from plumbline.data.tokenizer import TEMPLATES, load_tokenizer, render_text
from plumbline.records import Message
from tests.tiny import make_byte_tokenizer

BODY = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
OPEN = {
    **TEMPLATES,
    "sums": (  # as ChatML's users write it, with a system turn of its own and another first turn
        "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{%- endif -%}"
        "{%- for message in messages -%}{%- if loop.first and message.role == 'user' -%}First: {% endif %}"
        "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    ),
    "parts": (  # an alias, a text twice, turns that are left out, spaces around
        "{% set turns = messages[-2:] %}{% for m in turns %}{% set text = m['content'] %}[{{ text }}] {{ text }}\n\n"
        "{% endfor %}{{ messages|length }}{{ bos_token }}"
    ),
    "kinds": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}?{% endif %};{% endfor %}",
}
LOOKS = [
    "{{ messages[0].content | trim }}",
    "{{ messages[0].content.strip() }}",
    "{{ messages[0]['content'][:9] }}",
    "{{ messages[0].content | upper }}",
    "{{ messages[0].content | tojson }}",
    "{{ messages | tojson }}",
    "{{ messages[0].content | replace('a', 'b') }}",
    "{{ 'x'.replace('x', messages[0].content) | length }}",
    "{% if 'x' in messages[0].content %}x{% endif %}",
    "{% if messages[0].content == 'x' %}x{% endif %}",
    "{% if messages[0].content in ['x', 'y'] %}x{% endif %}",
    "{% if messages[0].content %}x{% endif %}",
    "{{ messages[0].content or 'x' }}",
    "{% if messages[0].content | length > 3 %}x{% endif %}",
    "{% if messages[0].content | wordcount > 3 %}x{% endif %}",
    "{% if messages[0].content | int == 3 %}x{% endif %}",
    "{% if ['x', messages[0].content] | join | length > 3 %}x{% endif %}",
    "{% if ', '.join([messages[0].content]) | length > 3 %}x{% endif %}",
    "{% if ('x' + messages[0].content).startswith('xa') %}x{% endif %}",
    "{% if 'x' ~ messages[0].content == 'xa' %}x{% endif %}",
    "{% if '%s' % messages[0].content == 'a' %}x{% endif %}",
    "{% if '{}'.format(messages[0].content) == 'a' %}x{% endif %}",
    "{% set text %}{{ messages[0].content }}{% endset %}{% if text | length > 3 %}x{% endif %}",
    "{% macro text(m) %}{{ m.content }}{% endmacro %}{% if text(messages[0]) | length > 3 %}x{% endif %}",
    "{% filter upper %}{{ messages[0].content }}{% endfilter %}",
    "{% for c in messages[0].content %}{{ c }}.{% endfor %}",
    "{% if messages | selectattr('content', 'equalto', 'x') | list %}x{% endif %}",
    "{{ raise_exception('no accents') if 'é' in messages[0].content else '' }}",
    "{{ strftime_now('%Y') }}",
    "{{ raise_exception('never') }}",
    "{% if messages[0].content is sequence %}x{% endif %}",
    "{% if messages[messages[0].content] is defined %}x{% endif %}",
    "{% if messages[0].content in 'yes or no' %}x{% endif %}",
    "{% for m in messages if m.content not in 'yes or no' %}x{% endfor %}",
    "{% if messages[0].content is in 'yes or no' %}x{% endif %}",
    "{% if messages | map(attribute='content') | select('in', 'yes or no') | list %}x{% endif %}",
    "{% if messages[0].content is sameas messages[-1].content %}x{% endif %}",
    "{% if messages | tojson | length > 60 %}x{% endif %}",
    "{% if messages | map('tojson') | first | length > 60 %}x{% endif %}",
    "{% if ''.join(messages[0].values()) | length > 9 %}x{% endif %}",
    "{% block text %}{{ messages[0].content }}{% endblock %}{{ self.text() | upper }}",
    "{% for m in messages recursive %}{{ m.content }}{{ loop([m]) | length if loop.depth < 2 }}{% endfor %}",
]
ROLES = st.tuples(st.booleans(), st.integers(1, 3)).map(
    lambda shape: ["system"] * shape[0] + (["user", "assistant"] * shape[1])[:-1]
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(
    ["<|im_end|>", ' \n"plumbunreadtext', "0", "{{ x }}", "%s", "  spaces \n"]
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_tokenizer(tmp_path_factory.mktemp("bytes"), "<|im_start|>", "<|im_end|>", bos_token="<|im_start|>")


def tokenizer_of(directory: Path, template: str) -> Any:
    tokenizer = load_tokenizer(str(directory), "chatml")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", OPEN)
@settings(max_examples=60, deadline=None)
@given(roles=ROLES, data=st.data())
def test_a_frame_gives_what_the_template_gives(
    directory: Path, name: str, roles: list[str], data: st.DataObject
) -> None:
    tokenizer = tokenizer_of(directory, OPEN[name])
    frame = find_frame(tokenizer, unread(roles))
    assert frame is not None
    texts = [data.draw(TEXTS) for _ in roles]
    turns = [Message(role=role, content=text) for role, text in zip(roles, texts, strict=True)]
    assert frame.around(texts) == render_text(tokenizer, turns)


@pytest.mark.parametrize("looks", LOOKS)
def test_where_a_template_looks_at_a_text_there_is_none(directory: Path, looks: str) -> None:
    assert find_frame(tokenizer_of(directory, BODY), unread(["user"])) is not None
    assert find_frame(tokenizer_of(directory, looks + BODY), unread(["user"])) is None


@pytest.mark.parametrize("template", [*OPEN.values(), "{{ messages[0].content | trim }}" + BODY])
@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(
        st.tuples(ROLES, st.sampled_from([None, "Be brief.", "Write <|im_end|>."])), min_size=1, max_size=12
    ),
    data=st.data(),
)
def test_rows_and_bounds_are_those_of_each_rendered_alone(
    directory: Path, template: str, asked: list[tuple[list[str], str | None]], data: st.DataObject
) -> None:
    tokenizer = tokenizer_of(directory, template)
    system = data.draw(TEXTS)  # the same in all rows, as it is in most datasets
    rows = [
        ([Message(role=role, content=system if role == "system" else data.draw(TEXTS)) for role in roles], principle)
        for roles, principle in asked
    ]
    alone = [render(tokenizer, messages, principle=principle) for messages, principle in rows]
    assert render_all(tokenizer, rows) == alone
    for _ in range(2):
        for ids, most in zip(alone, most_of_all(tokenizer, rows), strict=True):
            assert most is None or len(ids) <= most


def test_a_principle_and_a_system_turn_of_all_rows_are_counted_once(directory: Path) -> None:
    tokenizer = tokenizer_of(directory, OPEN["sums"])
    rows = [
        ([Message(role="system", content="é" * 99), Message(role="user", content=f"Why {i}?")], "Be é.")
        for i in range(20)
    ]
    mosts = most_of_all(tokenizer, rows)
    counts = [len(ids) for ids in render_all(tokenizer, rows)]
    assert mosts[-1] is not None and counts[-1] <= mosts[-1] <= counts[-1] + 2
    assert place_principle(tokenizer, rows[0][0], "Be é.")[0].content == "Be é.\n\n" + "é" * 99


def test_an_unread_text_can_be_put_beside_others_and_nothing_else() -> None:
    text = Unread("a")
    assert str.__str__("x" + text + "y") == "xay"
    for look in (len, str, repr, hash, int, float, list, bool, lambda t: t == "a", lambda t: t[0], lambda t: t.upper()):
        with pytest.raises(Looked):
            look(text)
