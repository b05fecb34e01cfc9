"""The shapes of stock chat templates with tools, thoughts and dates, reduced and written for the tests.

Each keeps what matters for the mask: where a turn begins and ends, what a prompt holds, what is left out of earlier
turns, and what the template reads of a tool call.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from chat_templates import GEMMA, QWEN3, QWEN25, tokenizer
from instruct_templates import LLAMA31, LLAMA32, MISTRAL3, MISTRAL_TEKKEN


class Stock(NamedTuple):
    template: str
    special: dict[str, str]
    tokens: tuple[str, ...] = ()


_LAST_USER = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"""
_SPLIT_THOUGHT = """
{%- set content = m.content if m.content is string else '' %}
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
{%- if not thought and '</think>' in content %}
    {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}"""
_IM_SYSTEM = """
{%- if tools %}
    {{- '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else '') + '# Tools' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}"""
_IM_TOOL = """
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user' if messages[loop.index0 - 1].role != 'tool' }}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}"""
_XML_CALLS = """
    {%- for call in m.tool_calls or [] %}
        {{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
        {%- for key, value in call.function.arguments | items %}
            {{- '<parameter=' + key + '>\\n' + value | string + '\\n</parameter>\\n' }}
        {%- endfor %}
        {{- '</function>\\n</tool_call>' }}
    {%- endfor %}"""

QWEN35 = (  # the prompt opens a thought; earlier turns have none
    _IM_SYSTEM
    + _LAST_USER
    + "{%- for m in messages %}"
    + _SPLIT_THOUGHT
    + """
    {%- if m.role == 'user' %}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' if loop.index0 > ns.last }}
        {{- content }}"""
    + _XML_CALLS
    + "{{- '<|im_end|>\\n' }}"
    + _IM_TOOL
    + """
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {{- '\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking }}
{%- endif %}"""
)

NEMOTRON3 = (  # an empty thought of another form than the prompt's
    QWEN35.replace(
        "{{- '<think>\\n' + thought + '\\n</think>\\n\\n' if loop.index0 > ns.last }}",
        "{%- if thought and (loop.index0 > ns.last or truncate_history_thinking is false) %}"
        "{{- '<think>\\n' + thought + '\\n</think>\\n' }}{%- else %}{{- '<think></think>' }}{%- endif %}",
    )
    .replace("assistant\\n<think>\\n' }}", "assistant\\n<think>' }}")
    .replace(
        "'\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking",
        "'</think>' if enable_thinking is defined and not enable_thinking else '\\n'",
    )
)

GEMMA3 = (
    GEMMA.replace("{{ raise_exception('System role not supported') }}", "{% set messages = messages[1:] %}")
    .replace(
        "{{ bos_token }}",
        "{{ bos_token }}{% set first = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}",
    )
    .replace("role + '\\n' + message", "role + '\\n' + (first if loop.first else '') + message")
)

GEMMA4 = """{{- bos_token }}
{%- if tools or messages[0].role == 'system' %}
    {{- '<|turn>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content | trim }}{%- set messages = messages[1:] %}
    {%- endif %}
    {%- for tool in tools or [] %}{{- '<|tool>' + tool.function.name + '<tool|>' }}{%- endfor %}
    {{- '<turn|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1, before='', result=false) %}
{%- for i in range(messages | length) %}
    {%- if messages[i].role == 'user' %}{% set ns.last = i %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role != 'tool' %}
        {%- set ns.result = false %}
        {%- if not (m.role == 'assistant' and ns.before == 'assistant') %}
            {{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
        {%- endif %}
        {%- if m.get('reasoning_content') and loop.index0 > ns.last %}
            {{- '<|channel>thought\\n' + m.reasoning_content + '\\n<channel|>' }}
        {%- endif %}
        {%- for call in m.get('tool_calls') or [] %}
            {{- '<|tool_call>call:' + call.function.name + '{' }}
            {%- if call.function.arguments is not mapping %}{{- raise_exception('no mapping') }}{%- endif %}
            {%- for key, value in call.function.arguments | dictsort %}{{- key ~ ':' ~ value }}{%- endfor %}
            {{- '}<tool_call|>' }}
        {%- endfor %}
        {%- set inner = namespace(open=m.get('tool_calls')) %}
        {%- for k in range(loop.index0 + 1, messages | length) %}
            {%- if messages[k].role != 'tool' %}{% set inner.open = false %}{% endif %}
            {%- if inner.open %}
                {{- '<|tool_response>response:' + messages[k].content + '<tool_response|>' }}
                {%- set ns.result = true %}
            {%- endif %}
        {%- endfor %}
        {{- (m.get('content') or '') | trim }}
        {%- if m.get('tool_calls') and not ns.result %}
            {{- '<|tool_response>' }}
        {%- elif not ns.result %}
            {{- '<turn|>\\n' }}
        {%- endif %}
        {%- set ns.before = m.role %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.result %}{{- '<|turn>model\\n' }}{%- endif %}"""

PHI4 = (  # the user's turn ends with the prompt
    "{% for m in messages %}{% if m.role == 'system' %}{{ '<|im_start|>system<|im_sep|>' + m.content + '<|im_end|>' }}"
    "{% elif m.role == 'user' %}"
    "{{ '<|im_start|>user<|im_sep|>' + m.content + '<|im_end|><|im_start|>assistant<|im_sep|>' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)

GPT_OSS = """
{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- if messages[0].role in ('system', 'developer') %}
    {%- set instructions = messages[0].content %}{%- set messages = messages[1:] %}
{%- endif %}
{%- if instructions or tools %}
    {{- '<|start|>developer<|message|>' + (instructions or '') + (tools | tojson if tools else '') + '<|end|>' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and 'tool_calls' in m %}
        {%- if '<|channel|>' in m.content %}{{- raise_exception('channel tags in the content') }}{%- endif %}
        {%- set ahead = namespace(final=false) %}
        {%- for later in messages[loop.index:] %}
            {%- if later.role == 'assistant' and 'tool_calls' not in later %}{% set ahead.final = true %}{% endif %}
        {%- endfor %}
        {%- if (m.content or m.thinking) and not ahead.final %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.thinking) + '<|end|>' }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
        {{- call.arguments | tojson + '<|call|>' }}
    {%- elif m.role == 'assistant' %}
        {%- if loop.last and 'thinking' in m %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' + m.content | tojson + '<|end|>' }}
    {%- else %}
        {{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

GLM45 = (  # no token ends a turn: the next role's does
    "[gMASK]<sop>{% if tools %}{{ '<|system|>\\n# Tools\\n' + tools | tojson }}{% endif %}"
    + _LAST_USER
    + "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|user|>\\n' + m.content }}"
    + "{%- elif m.role == 'system' %}{{- '<|system|>\\n' + m.content }}{%- elif m.role == 'assistant' %}"
    + _SPLIT_THOUGHT.replace("m.content if m.content is string else ''", "m.content | string")
    + """
    {{- '<|assistant|>\\n<think>' + (thought if loop.index0 > ns.last else '') + '</think>' }}
    {{- '\\n' + content.strip() if content.strip() }}
    {%- for call in m.tool_calls or [] %}
        {{- '\\n<tool_call>' + call.function.name }}
        {%- for key, value in call.function.arguments.items() %}{{- '\\n' ~ key ~ '=' ~ value }}{%- endfor %}
        {{- '\\n</tool_call>' }}
    {%- endfor %}
    {%- elif m.role == 'tool' %}
        {{- '<|observation|>' if messages[loop.index0 - 1].role != 'tool' }}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' + ('\\n<think></think>' if enable_thinking is defined and not enable_thinking else '') }}
{%- endif %}"""
)

DEEPSEEK_V3 = """
{%- set ns = namespace(system='', first=true, result=false) %}
{%- for m in messages %}{% if m.role == 'system' %}{% set ns.system = ns.system + m.content %}{% endif %}{% endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- set ns.result = false %}{{- '<|User|>' + m.content }}
    {%- elif m.role == 'assistant' and m.tool_calls is defined %}
        {%- set ns.result = false %}
        {%- for call in m.tool_calls %}
            {%- if loop.first %}
                {{- '<|Assistant|>' + ('' if m.content is none else m.content) + '<|tool_calls_begin|>' }}
            {%- else %}{{- '\\n' }}{%- endif %}
            {{- '<|tool_call_begin|>' + call.type + '<|tool_sep|>' + call.function.name + '\\n```json\\n' }}
            {{- call.function.arguments + '\\n```<|tool_call_end|>' }}
        {%- endfor %}
        {{- '<|tool_calls_end|>' + eos_token }}
    {%- elif m.role == 'assistant' %}
        {{- ('<|tool_outputs_end|>' if ns.result else '<|Assistant|>') + m.content + eos_token }}
        {%- set ns.result = false %}
    {%- elif m.role == 'tool' %}
        {{- ('' if ns.result else '<|tool_outputs_begin|>') + '<|tool_output_begin|>' + m.content }}
        {{- '<|tool_output_end|>' }}
        {%- set ns.result = true %}
    {%- endif %}
{%- endfor %}
{%- if ns.result %}{{- '<|tool_outputs_end|>' }}{%- endif %}
{%- if add_generation_prompt and not ns.result %}{{- '<|Assistant|>' }}{%- endif %}"""

DEEPSEEK_R1 = DEEPSEEK_V3.replace(  # also what TRL ships as DeepSeek-V3's: that template, whose prompt opens a thought
    "+ m.content + eos_token", "+ m.content.split('</think>')[-1] + eos_token"
).replace("not ns.result %}{{- '<|Assistant|>' }}", "not ns.result %}{{- '<|Assistant|><think>\\n' }}")

R1_DISTILL = (  # cuts thoughts that its prompt opens, and writes calls only where the content is null
    DEEPSEEK_V3.replace("m.tool_calls is defined", "m.content is none")
    .replace("{%- else %}{{- '\\n' }}{%- endif %}", "{%- endif %}")
    .replace("        {{- '<|tool_calls_end|>' + eos_token }}\n", "")
    .replace("+ m.content + eos_token", "+ m.content.split('</think>')[-1] + eos_token")
    .replace("not ns.result %}{{- '<|Assistant|>' }}", "not ns.result %}{{- '<|Assistant|><think>\\n' }}")
)

SMOLLM3 = """
{%- set thinking = enable_thinking is not defined or enable_thinking %}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if '/no_think' in system %}{%- set thinking = false %}{%- endif %}
{{- '<|im_start|>system\\nToday Date: ' ~ strftime_now('%d %B %Y') ~ '\\n' + system.replace('/no_think', '') }}
{{- (xml_tools or 'None') ~ '<|im_end|>\\n' }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- generation %}
            {{- '<|im_start|>assistant\\n' + ('' if thinking else '<think>\\n\\n</think>\\n') }}
            {{- (m.content or '').lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + ('' if thinking else '<think>\\n\\n</think>\\n') }}
{%- endif %}"""

LFM2 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{%- set messages = messages[1:] %}
{%- endif %}
{%- if system or tools %}
    {{- '<|im_start|>system\\n' + (system or '') }}
    {{- 'List of tools: <|tool_list_start|>' + tools | tojson + '<|tool_list_end|>' if tools }}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- set content = m.get('content') %}
    {%- if content is not string %}{%- set content = content | tojson %}{%- endif %}
    {%- if m.role == 'tool' %}
        {%- set content = '<|tool_response_start|>' + content + '<|tool_response_end|>' %}
    {%- endif %}
    {%- if m.get('tool_calls') %}
        {{- content if content != 'null' }}
        {{- '<|tool_call_start|>[' }}
        {%- for call in m.tool_calls %}
            {{- call.function.name + '(' }}
            {%- for key, value in call.function.arguments.items() %}{{- key ~ '=' ~ value }}{%- endfor %}
            {{- ')' + ('' if loop.last else ', ') }}
        {%- endfor %}
        {{- ']<|tool_call_end|>' }}
    {%- else %}{{- content }}{%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

GRANITE4 = (
    QWEN25.replace("<|im_start|>' + message.role + '\\n'", "<|start_of_role|>' + message.role + '<|end_of_role|>'")
    .replace("'<|im_start|>system\\n'", "'<|start_of_role|>system<|end_of_role|>'")
    .replace("'<|im_start|>' + message.role }}", "'<|start_of_role|>' + message.role + '<|end_of_role|>' }}")
    .replace("'\\n' + message.content }}", "message.content }}")
    .replace("'<|im_start|>assistant\\n'", "'<|start_of_role|>assistant<|end_of_role|>'")
    .replace("'<|im_start|>user'", "'<|start_of_role|>user<|end_of_role|>'")
    .replace("<|im_end|>", "<|end_of_text|>")
)

_IM = {"eos_token": "<|im_end|>"}
_LLAMA = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
_TEKKEN = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CONTENT]")
_DEEPSEEK = {"bos_token": "<|begin_of_sentence|>", "eos_token": "<|end_of_sentence|>"}
_DEEPSEEK_TOKENS = (
    *("<|User|>", "<|Assistant|>", "<|tool_calls_begin|>", "<|tool_call_begin|>", "<|tool_sep|>"),
    *("<|tool_call_end|>", "<|tool_calls_end|>", "<|tool_outputs_begin|>", "<|tool_output_begin|>"),
    *("<|tool_output_end|>", "<|tool_outputs_end|>"),
)
STOCK = {
    "qwen2.5": Stock(QWEN25, _IM),
    "qwen3": Stock(QWEN3, _IM),
    "qwen3.5": Stock(QWEN35, _IM),
    "llama3.1": Stock(LLAMA31, _LLAMA, ("<|eom_id|>",)),
    "llama3.2": Stock(LLAMA32, _LLAMA),
    "gemma3": Stock(GEMMA3, {"bos_token": "<bos>", "eos_token": "<eos>"}),
    "gemma4": Stock(
        GEMMA4,
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        ("<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|channel>",
         "<channel|>", "<|tool>", "<tool|>"),
    ),
    "mistral3": Stock(MISTRAL3, {"eos_token": "</s>"}, ("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")),
    "mistral-v11": Stock("{%- set version = 11 %}" + MISTRAL_TEKKEN, {"eos_token": "</s>"}, _TEKKEN),
    "mistral-v13": Stock("{%- set version = 13 %}" + MISTRAL_TEKKEN, {"eos_token": "</s>"}, _TEKKEN),
    "phi4": Stock(PHI4, _IM, ("<|im_sep|>",)),
    "gpt-oss": Stock(
        GPT_OSS,
        {"eos_token": "<|return|>"},
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"),
    ),
    "glm4.5": Stock(
        GLM45,
        {"eos_token": "<|endoftext|>"},
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
    ),
    "deepseek-v3": Stock(DEEPSEEK_V3, _DEEPSEEK, _DEEPSEEK_TOKENS),
    "deepseek-r1": Stock(DEEPSEEK_R1, _DEEPSEEK, _DEEPSEEK_TOKENS),
    "r1-distill": Stock(R1_DISTILL, _DEEPSEEK, _DEEPSEEK_TOKENS),
    "smollm3": Stock(SMOLLM3, _IM),
    "lfm2": Stock(LFM2, _IM, ("<|tool_call_start|>", "<|tool_call_end|>")),
    "nemotron3": Stock(NEMOTRON3, _IM),
    "granite4": Stock(GRANITE4, {"eos_token": "<|end_of_text|>"}, ("<|start_of_role|>", "<|end_of_role|>")),
}  # fmt: skip


def made(name):
    """The tokenizer with a stock template."""
    stock = STOCK[name]
    return tokenizer(stock.template, tokens=stock.tokens, **stock.special)


def trained(tok, chat):
    """The runs of tokens with weight, as text."""
    edges = np.flatnonzero(np.diff((chat.loss_weights > 0).astype(int), prepend=0, append=0))
    return [tok.decode(chat.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
