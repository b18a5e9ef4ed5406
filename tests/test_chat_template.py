import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizer_fixtures import write_byte_level

from pyllm.chat_template import MAX_SECONDS, MAX_TEMPLATE_CHARS, render_chat
from pyllm.errors import TokenizerError
from pyllm.tokenizer import Tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "  Grüße 🦙 <b>&amp;</b>"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "And {{ 7 * 7 }}?"},
]
TOOLS = [{"type": "function", "function": {"name": "wetter", "parameters": {"größe": [1, 2.5, None, True]}}}]

TEMPLATES = {
    "chatml": """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}""",
    "headers": """{{- bos_token }}
{%- set date = date if date is defined else "26 Jul 2024" %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date + "\n\n" ~ system_message ~ "<|eot_id|>" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}{{ "\n\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}""",
    "instructions": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {% generation %}{{- " " + message["content"] + eos_token}}{% endgeneration %}
    {%- endif %}
{%- endfor %}""",
    "features": """{% macro show(x, depth=1) %}{{ "%03d|%s" | format(depth, x) }}{% endmacro %}
{% for m in messages if m.role != 'system' %}
  {% if loop.index > 2 %}{% break %}{% endif %}
  {{ loop.index0 }}/{{ loop.length }} {{ show(m.role | upper, depth=loop.index) }} {{ loop.cycle('a', 'b') }}
{% else %}none{% endfor %}
{{ messages | map(attribute='role') | unique | join(', ') }} {{ [1, 2] + [3] }} {{ {'k': (1, 'x')} }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ 'a,b'.split(',')[::-1] }} {{ tools | tojson }}
{% set ns = namespace(found=false, text='') %}{% for i in range(5) %}{% set ns.text = ns.text ~ i %}{% endfor %}
{{ ns.text }}
{% set block %}<{{ 'x' * 3 }}>{% endset %}{{ block }}
{{ dict(a=1).items() | list }} {{ undefined_name }} {{ none }} {{ 7 // 2 }}
{% macro wrap() %}<{{ caller('c') }}>{% endmacro %}{% call(x) wrap() %}{{ x }}{% endcall %}
{{ 'abc'.replace('b', 'B').startswith('aB') }}
{{ "{} and {n:>4}".format(1, n=2) }} {{ 1.5 | round }}
{% filter upper %}shout{% endfilter %}{{ messages[0].content.strip() | indent(2) }}
{{ 'x' if tools else 'y' }} {{ -3 | abs }}""",
}


@pytest.mark.oracle
@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(name: str, tools: Any, generate: bool) -> None:
    from transformers.utils import chat_template_utils

    extra = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = chat_template_utils.render_jinja_template(
        [MESSAGES], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=generate, **extra
    )
    variables = {"messages": MESSAGES, "tools": tools, "documents": None, "add_generation_prompt": generate, **extra}
    assert render_chat(TEMPLATES[name], variables) == expected[0]


def test_known_text() -> None:
    text = render_chat(TEMPLATES["chatml"], {"messages": MESSAGES[2:], "add_generation_prompt": True})
    assert text == (
        "<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nAnd {{ 7 * 7 }}?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_raise_exception_reaches_the_user() -> None:
    with pytest.raises(TokenizerError, match="roles must alternate"):
        render_chat(TEMPLATES["instructions"], {"messages": MESSAGES[2:], "bos_token": ""})


def test_strftime_now() -> None:
    assert render_chat("{{ strftime_now('%Y') }}", {}) == time.strftime("%Y")


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('_' ~ '_class__') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|map('attr', '__class__')|list }}",
    "{{ messages|groupby('__class__') }}",
    "{{ messages|sum(attribute='__class__') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ dict.__globals__ }}",
    "{{ dict.__init__ }}",
    "{{ range.__class__ }}",
    "{{ strftime_now.__closure__ }}",
    "{% set ns = namespace() %}{{ ns.__init__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(__class__=1) }}",
    "{{ namespace({'__class__': 1}) }}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% for i in [1] %}{{ loop.__class__ }}{% endfor %}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ ('{0.__class__}'|format)(1) }}",
    "{{ ''|attr('format')('{0.__class__}') }}.{{ '{.__class__}'|attr('format')(1) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ (1).__class__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages.__class__.__base__ }}",
    "{{ 'a'.encode() }}",
    "{{ (1).to_bytes(10) }}",
    "{{ meter_tick.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
    "{{ config.items() }}",
    "{{ request.application.__globals__ }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{% if ''.__class__ %}{% endif %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_escapes_fail_closed(template: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(TokenizerError):
        render_chat(template, {"messages": messages})
    assert messages == [{"role": "user", "content": "hi"}]


GREEDY = [
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ 9**9**9**9**9 }}",
    "{{ (2**4000)**4000 }}",
    "{{ range(10**9)|list }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) if false %}{% endfor %}" * 500,
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% set ns = namespace(x='a') %}{% for i in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(100) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(100) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(100) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}",
    "{% set ns = namespace(x=(1,)) %}{% for i in range(100) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=9) %}{% for i in range(100) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}" + "a" * 10_000 + "{% endfor %}{% endset %}",
    "{% set x %}{% for i in range(99999) %}{{ '" + "a" * 10_000 + "' }}{% endfor %}{% endset %}",
    "{% set a = 'a' * 4000000 %}{% for i in range(99999) %}{% set b = a[1:] %}{% endfor %}",
    "{% set a = 'a' * 4000000 %}{% for i in range(99999) %}{% if 'b' in a %}{% endif %}{% endfor %}",
    "{{ 'a'|center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.zfill(10**10) }}",
    "{{ '%10000000000d'|format(1) }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**10) }}",
    "{{ ('{0}' * 100000).format('a' * 1000000) }}",
    "{{ ('%(a)s' * 100000) % {'a': 'a' * 1000000} }}",
    "{{ ('a' * 10000).replace('', 'b' * 10000) }}",
    "{{ ('a' * 10000)|replace('a', 'b' * 10000) }}",
    "{{ ('a' * 10000)|replace(new='b' * 10000, old='a') }}",
    "{{ ('a' * 1000000).join(range(10000)|map('string')|list) }}",
    "{{ range(99999)|join('a' * 10000) }}",
    "{{ range(99999)|join(d='a' * 10000) }}",
    "{{ [1]|tojson(indent=10**10) }}",
    "{{ [1]|tojson(indent='a' * 4000000, separators=('a' * 4000000, 'b')) }}",
    "{{ 'a\nb'|indent(10**10) }}",
    "{{ [1]|batch(10**10, 'a')|list }}",
    "{{ [1]|slice(10**10)|list }}",
    "{{ 1.5|round(10**10) }}",
    "{{ 1.5|round(10**7, 'ceil') }}",
    "{{ ([[1] * 3000] * 3000)|sum(start=[]) }}",
    "{{ ('\t' * 1000).expandtabs(10**9) }}",
    "{{ lipsum(10**9) }}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ range(2000)|map('center', 1000000)|list }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ 1" + "+1" * 30_000 + " }}",
    "{{ x" + ".a" * 30_000 + " }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    " " * (MAX_TEMPLATE_CHARS + 1),
]


@pytest.mark.parametrize("template", GREEDY, ids=range(len(GREEDY)))
def test_greedy_templates_are_stopped(template: str) -> None:
    start = time.monotonic()
    with pytest.raises(TokenizerError) as caught:
        render_chat(template, {"messages": []}, max_seconds=0.3)
    assert time.monotonic() - start < MAX_SECONDS
    assert len(str(caught.value)) < 2000


def test_values_with_methods_are_refused() -> None:
    with pytest.raises(TokenizerError, match=r"messages\[0\].*Path"):
        render_chat("", {"messages": [Path("x")]})
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(TokenizerError, match="nested"):
        render_chat("", {"messages": nested})


def test_template_of_the_folder(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    tokenizer = Tokenizer.load(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.apply_chat_template(MESSAGES)
    assert tokenizer.apply_chat_template(MESSAGES, chat_template="{{ eos_token }}") == "<|endoftext|>"

    write_byte_level(tmp_path, chat_template="plain {{ messages|length }} {{ name }}")
    assert Tokenizer.load(folder).apply_chat_template(MESSAGES, name="x") == "plain 4 x"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write_byte_level(tmp_path, chat_template=named)
    assert Tokenizer.load(folder).apply_chat_template(MESSAGES) == "d"
    (tmp_path / "chat_template.jinja").write_text("from file {{ add_generation_prompt }}")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False) == "from file False"


def test_special_tokens_of_a_rendered_chat(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_byte_level(tmp_path, chat_template=TEMPLATES["chatml"]))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert [tokenizer.token_of(token) for token in (ids[0],)] == ["<|im_start|>"]
    assert ids.count(tokenizer.id_of("<|im_start|>")) == 2
    assert json.dumps(tokenizer.decode(ids)).count("im_") == 0
