"""The shapes of the chat templates of Llama 3 and Mistral, reduced for the tests as those of stock_templates.py are."""

LLAMA32 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' }}
{{- (date_string if date_string is defined else strftime_now('%d %b %Y')) + '\\n\\n' + system + '<|eot_id|>' }}
{%- if tools %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nFunctions:\\n' + tools | tojson + '\\n\\n' }}
    {{- messages[0].content | trim + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' }}
    {%- elif 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception('only single tool-calls') }}{%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

LLAMA31 = (  # and 3.3: the date does not change, and a call of a built-in tool ends a step and not the turn
    LLAMA32.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    .replace(
        "'<|start_header_id|>system<|end_header_id|>\\n\\nToday",
        "system_header + 'Cutting Knowledge Date: 2023\\nToday",
    )
    .replace(
        "{{- bos_token }}",
        "{%- set system_header = '<|start_header_id|>system<|end_header_id|>\\n\\n' %}{{- bos_token }}",
    )
    .replace("+ '}<|eot_id|>' }}", "+ '}' + ('<|eom_id|>' if builtin_tools is defined else '<|eot_id|>') }}")
)

MISTRAL3 = """
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\\n\\n' %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if tools and messages[loop.index0:] | selectattr('role', 'equalto', 'user') | list | length == 1 %}
            {{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]' + (system if loop.first else '') + m.content + '[/INST]' }}
    {%- elif m.tool_calls is defined %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in m.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
            {%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (']' if loop.last else ', ') }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == 'assistant' %}
        {{- m.content + eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""

MISTRAL_TEKKEN = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {{- '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}{%- set messages = messages[1:] %}
{%- endif %}
{%- if tools %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '[INST]' + m.content + '[/INST]' }}
    {%- elif m.role == 'assistant' %}
        {{- m.content if m.content }}
        {%- for call in m.tool_calls or [] %}
            {%- set given = call.function.arguments %}
            {%- if given is not string %}{%- set given = given | tojson %}{%- endif %}
            {{- '[TOOL_CALLS]' + call.function.name }}
            {{- '[CALL_ID]' + call.id if version == 11 }}
            {{- '[ARGS]' + given }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + (m.tool_call_id + '[TOOL_CONTENT]' if version == 11 else '') + m.content }}
        {{- '[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception('Only system, user, assistant and tool roles') }}
    {%- endif %}
{%- endfor %}"""
