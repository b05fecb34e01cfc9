"""A template of a downloaded model that would use all time or memory is refused; any other is rendered as before."""

import time

import pytest

from jaxtrain.data import template_limits
from jaxtrain.data.tracing import trace

DOUBLED = "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = DOUBLE %}{% endfor %}{{ ns.x }}"
LONG = "{% set a = 'a' * 10000000 %}"

HOSTILE = {
    "nested loops": "{% for a in range(9999) %}{% for b, c in [[1, 2]] * 9999 %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "addition": DOUBLED.replace("DOUBLE", "ns.x + ns.x"),
    "addition to the right": DOUBLED.replace("DOUBLE", "(ns.x + (ns.x + ns.x))[1:]"),
    "addition in a macro": "{% macro f(n, x) %}{{ f(n - 1, x + x) if n else x | length }}{% endmacro %}"
    "{{ f(60, 'a') }}",
    "long sum": LONG + "{{ (" + " + ".join(["a"] * 99) + ") | length }}",
    "joining": DOUBLED.replace("DOUBLE", "ns.x ~ ns.x"),
    "joining within": DOUBLED.replace("DOUBLE", "('b' ~ (ns.x ~ ns.x))[1:]"),
    "format": DOUBLED.replace("DOUBLE", "'%s%s' % (ns.x, ns.x)"),
    "format method": DOUBLED.replace("DOUBLE", "'{0}{0}'.format(ns.x)"),
    "format filter": DOUBLED.replace("DOUBLE", "'%s%s' | format(ns.x, ns.x)"),
    "lists": DOUBLED.replace("DOUBLE", "[ns.x, ns.x]"),
    "tojson": DOUBLED.replace("DOUBLE", "[ns.x, ns.x]").replace("{{ ns.x }}", "{{ ns.x | tojson | length }}"),
    "namespace": DOUBLED.replace("DOUBLE", "[ns.x, ns.x]").replace("{{ ns.x }}", "{{ ns }}"),
    "mapping": DOUBLED.replace("DOUBLE", "{'k': ns.x, 'l': ns.x}").replace("{{ ns.x }}", "{{ ns.x.items() }}"),
    "join": DOUBLED.replace("DOUBLE", "[ns.x, ns.x] | join"),
    "join method": DOUBLED.replace("DOUBLE", "''.join([ns.x, ns.x])"),
    "replace": DOUBLED.replace("DOUBLE", "ns.x | replace('a', 'aa')"),
    "replace method": DOUBLED.replace("DOUBLE", "ns.x.replace('a', 'aa')"),
    "block": "{% set x = 'a' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60 + "{{ x | length }}",
    "product": "{{ ('a' * 10 ** 12) | length }}",
    "power": "{{ (9 ** (9 ** 9)) > 1 }}",
    "squares": DOUBLED.replace("DOUBLE", "ns.x * ns.x").replace("'a'", "2"),
    "width": "{{ '%9999999999d' % 1 }}",
    "width of a field": "{{ '{:9999999999}'.format(1) }}",
    "width as an argument": "{{ '{:{}}'.format(1, 9999999999) }}",
    "center": "{{ 'a' | center(9999999999) }}",
    "ljust": "{{ 'a'.ljust(9999999999) }}",
    "tabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "translate": LONG + "{{ a.translate({97: a}) | length }}",
    "indent": LONG + "{{ ('\n' * 99999) | indent(99999) | length }}",
    "round": "{{ 1.5 | round(999999999, 'ceil') }}",
    "sum": "{{ ([[1]] * 99999) | sum(start=[]) | length }}",
    "written": LONG + "{{ a }}" * 9,
    "lipsum": "{{ lipsum(n=999999999) }}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_would_use_all_time_or_memory_is_refused(monkeypatch, template):
    monkeypatch.setattr(template_limits, "MAX_STEPS", 100_000)
    start = time.thread_time()
    with pytest.raises(ValueError, match=r"refuses the conversation: (it |'lipsum' is undefined)"):
        trace(template, [{"role": "user", "content": "a"}], {})
    assert time.thread_time() - start < 5


def test_a_template_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.0)
    with pytest.raises(ValueError, match="it takes more than 0 seconds"):
        trace("{% for a in range(5000) %}{% endfor %}", [], {})


HARMLESS = """{% macro show(x, y=1) %}<{{ x ~ y ~ none ~ missing }}>{% endmacro %}{{ show('a') }}{{ lipsum is defined }}
{%- set text %}b{{ 1 + 2 }}{{ missing }}{% endset %}{{ text }}{{ [1, 'x'] }}{{ {'k': 'v'} | tojson(indent=2) }}
{%- for k, v in {'p': 1, 'q': 2.5}.items() %}{{ k + '=' ~ v }}{{ loop.index }}{% else %}none{% endfor %}
{{- ', '.join(['a', 'b']) }}{{ ['a', 3] | join('-') }}
{{- [{'n': 1}] | map(attribute='n') | join }}
{{- 'a\\nb' | indent(2) }}
{{- 'abab'.replace('a', 'cc', 1) }}{{ 'abab' | replace('b', 'd') }}{{ '%s-%d' % ('a', 3) }}
{{- '{}{x}'.format(1, x=2) }}
{{- [1, 2] + [3] }}{{ 1 + 2.5 + 3 }}{{ ('a' + ('b' + 'c')) | upper }}{{ 'ab' * 2 }}
{{- 7 % 4 }}{{ 2 ** 3 }}{{ 1.25 | round(1) }}{{ [1, 2] | sum }}{{ 5 // 2 }}
{{- 'a' | center(3) }}
{{- messages | map(attribute='content') | list | string }}
{%- for m in messages if m.content %}{{ m.content | trim }}{% endfor %}
{%- filter upper %}up{{ 'x' }}{% endfilter %}{% call(z) show2() %}{{ z }}{% endcall %}"""


def test_any_other_template_is_rendered_as_transformers_does():
    from transformers.utils.chat_template_utils import render_jinja_template

    template = "{% macro show2() %}[{{ caller('z') }}]{% endmacro %}" + HARMLESS.replace("{{ lipsum is defined }}", "")
    messages = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}]
    (expected,), _ = render_jinja_template([messages], chat_template=template)
    assert trace(template, messages, {}).text == expected
