"""Chat templates of the shapes that models have, small, over one tiny tokenizer."""

# ruff: noqa: RUF001 - DeepSeek's control tokens are written with full-width bars
from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CORPUS = [
    "the user asks and the assistant answers: yes or no",
    "system tools function name arguments parameters think",
]


@dataclass(frozen=True)
class Shape:
    """A chat template and its tokens.

    Attributes:
        template: the template, or several by name; None for none.
        special: its control tokens; the first is the end token.
        ordinary: tokens that it writes and that are not marked special.
        refused: what cannot be rendered, by the name of a conversation, or by it and the switch (`plain/True`), and a
            part of the reason.
        switch: whether reasoning can be switched.
        sentencepiece: tokens of SentencePiece's kind, where a space belongs to the word after it.
    """

    template: Any
    special: tuple[str, ...]
    ordinary: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    switch: bool = False
    sentencepiece: bool = False


NO_TOOLS = dict.fromkeys(("tools", "call", "call beside text", "loop"), "knows no tools")
NO_REASONING = {"reasoning": "leaves out the reasoning_content"}
_SEVERAL = dict.fromkeys(("several", "several with system"), "writes a conversation differently once it continues")

_ASSISTANT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_HERMES = (
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ '# Tools\n<tools>' }}{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "DEFAULT{% endif %}"
)
_CALLS = (
    "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments | tojson'
    " + '}\n</tool_call>' }}{% endfor %}"
)
_RESULT = (
    "{% elif m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{ '<|im_start|>user' }}{% endif %}{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + _ASSISTANT
)
QWEN_25 = (
    _HERMES.replace("DEFAULT", "{% else %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}")
    + "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + m.content }}"
    + _CALLS
    + "{{ '<|im_end|>\n' }}"
    + _RESULT
    + "{% endif %}{% endfor %}"
    + _ASSISTANT
)
_QWEN_3 = (
    _HERMES.replace("DEFAULT", "") + "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{% set content = m.content %}{% set reasoning = '' %}"
    "{% if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or reasoning) %}"
    "{{ '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}" + _CALLS + "{{ '<|im_end|>\n' }}" + _RESULT + "{% endif %}{% endfor %}"
)
QWEN_3 = (
    _QWEN_3 + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
QWEN_3_THINKING = _QWEN_3 + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
QWEN_35 = (
    _QWEN_3 + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
SMOLLM3 = (
    "{% set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' %}"
    "{{ '<|im_start|>system\nReasoning Mode: ' + mode + '\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}"
    "{% if tools %}{{ '### Tools\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' }}"
    "{% if mode == '/no_think' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.lstrip('\n') }}" + _CALLS + "{{ '<|im_end|>\n' }}{% endgeneration %}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if mode == '/no_think' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}{% if tools %}{{ 'Environment: ipython\n' }}{% endif %}"
    "{{ 'Cutting Knowledge Date: December 2023\n\n' + system + '<|eot_id|>' }}"
    "{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('This model only supports single tool-calls') }}{% endif %}"
    '{{ \'<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "\' + m.tool_calls[0].function.name'
    " + '\", \"parameters\": ' + m.tool_calls[0].function.arguments | tojson + '}<|eot_id|>' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}"
    "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if tools and loop.first %}{% for t in tools %}{{ t | tojson(indent=4) + '\n\n' }}{% endfor %}{% endif %}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL_V1 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{{ bos_token }}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)


def _mistral(space: str, system: str, call_space: str) -> str:
    """Mistral's templates from version 3 on: tools and, in version 3, the system text stand at the last question."""
    return (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}"
        + (
            "{% if system %}{{ '[SYSTEM_PROMPT]" + space + "' + system + '[/SYSTEM_PROMPT]' }}{% endif %}"
            if system
            else ""
        )
        + "{% for m in messages %}{% if m.role == 'user' %}"
        "{% if tools and loop.index0 == ns.last %}"
        "{{ '[AVAILABLE_TOOLS]" + space + "' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
        "{{ '[INST]"
        + space
        + "' }}"
        + ("" if system else "{% if system and loop.index0 == ns.last %}{{ system + '\n\n' }}{% endif %}")
        + "{{ m.content + '[/INST]' }}"
        "{% elif m.tool_calls %}{{ '[TOOL_CALLS]" + call_space + "[' }}{% for c in m.tool_calls %}"
        "{% if c.id is not defined or c.id | length != 9 %}"
        "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
        '{{ \'{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments | tojson'
        " + ', \"id\": \"' + c.id + '\"}' }}{{ '' if loop.last else ', ' }}{% endfor %}{{ ']' + eos_token }}"
        "{% elif m.role == 'assistant' %}{{ '" + space + "' + m.content | trim + eos_token }}"
        "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]" + space + '{"content": \' + m.content'
        " + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
    )


GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
    " + (system if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_2 = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + GEMMA
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI_4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
HARMONY = (
    "{{ '<|start|>system<|message|>Valid channels: analysis, commentary, final.<|end|>' }}"
    "{% if messages[0].role == 'system' or tools %}{{ '<|start|>developer<|message|>' }}"
    "{% if messages[0].role == 'system' %}{{ '# Instructions\n\n' + messages[0].content }}{% endif %}"
    "{% if tools %}{{ '\n\n# Tools\n\nnamespace functions {' }}{% for t in tools %}"
    "{{ '\ntype ' + t.function.name + ' = (_: ' + t.function.parameters | tojson + ') => any;' }}{% endfor %}"
    "{{ '\n}' }}{% endif %}{{ '<|end|>' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start|>functions to=assistant<|channel|>commentary<|message|>'"
    " + m.content | tojson + '<|end|>' }}"
    "{% elif m.tool_calls %}"
    "{% if m.content and m.thinking %}{{ raise_exception('Give content or thinking beside a call') }}{% endif %}"
    "{% if m.content or m.thinking %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.thinking) + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant to=functions.' + m.tool_calls[0].function.name"
    " + '<|channel|>commentary json<|message|>' + m.tool_calls[0].function.arguments | tojson + '<|call|>' }}"
    "{% elif m.role == 'assistant' %}{% if loop.last and not add_generation_prompt %}"
    "{% if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
_COMMAND = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}TOOLS"
    "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + messages[0].content + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + m.content | trim + '<|END_OF_TURN_TOKEN|>' }}"
    "{% elif m.role == 'assistant' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + m.content | trim }}CALLS{{ '<|END_OF_TURN_TOKEN|>' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><results>\n' + m.content + '</results><|END_OF_TURN_TOKEN|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
COMMAND_R = {
    "default": _COMMAND.replace("TOOLS", "").replace("CALLS", ""),
    "tool_use": "{% for t in tools %}{{ t | tojson }}{% endfor %}"
    + _COMMAND.replace("TOOLS", "").replace(
        "CALLS",
        "{% for c in m.tool_calls or [] %}{{ '\nAction: ' + c.function.name + c.function.arguments | tojson }}"
        "{% endfor %}",
    ),
}
COMMAND_R7B = _COMMAND.replace("TOOLS", "").replace(
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + m.content | trim }}CALLS",
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' + m.content | trim + '<|END_RESPONSE|>' }}",
)
DEEPSEEK_V3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% for t in tools or [] %}{{ '\n' + t | tojson }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}"
    "{% elif m.role == 'assistant' %}"
    "{% if messages[loop.index0 - 1].role == 'user' %}{{ '<｜Assistant｜>' }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<｜tool▁call▁begin｜>' + c.function.name"
    " + '\n```json\n' + c.function.arguments + '\n```<｜tool▁call▁end｜>' }}{% endfor %}"
    "{{ '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role == 'user' %}{{ '<｜Assistant｜>' }}{% endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
DEEPSEEK_V31 = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜></think>' + m.content.split('</think>')[-1]"
    " + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif %}"
)
GRANITE = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = 'You are Granite.' %}{% endif %}"
    "{% if thinking %}{% set system = system + ' Write your thoughts between <think> and </think>.' %}{% endif %}"
    "{{ '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}"
    "{% if tools %}{{ '<|start_of_role|>available_tools<|end_of_role|>' + tools | tojson + '<|end_of_text|>\n' }}"
    "{% endif %}{% for m in messages %}"
    "{{ '<|start_of_role|>' + ('tool_response' if m.role == 'tool' else m.role) + '<|end_of_role|>' + m.content }}"
    "{% if m.tool_calls %}{{ '<|tool_call|>' + m.tool_calls | tojson }}{% endif %}{{ '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
HEADERLESS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"

_IM = ("<|im_end|>", "<|im_start|>")
_THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_INST = ("</s>", "<s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]")
_MISTRAL = (*_INST, "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
_HARMONY = ("<|return|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>")
_DEEPSEEK = (
    "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
)  # fmt: skip
_TURN = ("<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>")
_ROLES = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")
_BESIDE_CALLS = {"call beside text": "leaves out the text"}
_ALL = ("plain", "lines", "system", "several", "several with system", "tools", "call", "call beside text", "loop")


def _opens(*switches: str) -> dict[str, str]:
    """Every conversation without reasoning, refused where the template opens one before each answer."""
    return {name + switch: "opens reasoning (<think>)" for name in _ALL for switch in switches}


_ONE_OFF = {
    f"{name}/False": "writes a conversation differently"
    for name in ("several", "several with system", "loop", "reasoning", "think")
}
"""What Qwen 3 writes differently later, or after an empty reasoning block."""

SHAPES = {
    "chatml": Shape(CHATML, _IM, refused=NO_TOOLS | NO_REASONING),
    "headerless": Shape(HEADERLESS, _IM, refused=NO_TOOLS | NO_REASONING | _SEVERAL),
    "llama3": Shape(
        LLAMA_3,
        ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        refused=NO_REASONING | _BESIDE_CALLS,
    ),
    "mistral-v1": Shape(MISTRAL_V1, ("</s>", "<s>"), refused=NO_TOOLS | NO_REASONING, sentencepiece=True),
    "mistral-v3": Shape(
        _mistral(" ", "", " "),
        _MISTRAL,
        refused=NO_REASONING | _BESIDE_CALLS | {"several with system": "writes a conversation differently"},
        sentencepiece=True,
    ),
    "mistral-v7": Shape(_mistral(" ", "yes", ""), _MISTRAL, refused=NO_REASONING | _BESIDE_CALLS, sentencepiece=True),
    "mistral-tekken": Shape(
        _mistral("", "", ""),
        _MISTRAL,
        refused=NO_REASONING | _BESIDE_CALLS | {"several with system": "writes a conversation differently"},
    ),
    "gemma3": Shape(
        GEMMA, ("<end_of_turn>", "<bos>", "<start_of_turn>"), refused=NO_TOOLS | NO_REASONING, sentencepiece=True
    ),
    "gemma2": Shape(
        GEMMA_2,
        ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        refused=NO_TOOLS | NO_REASONING | dict.fromkeys(("system", "several with system"), "System role not supported"),
    ),
    "qwen2.5": Shape(QWEN_25, _IM, _THINK, refused=NO_REASONING),
    "qwen3": Shape(QWEN_3, _IM, _THINK, refused=_ONE_OFF, switch=True),
    "qwen3-thinking": Shape(QWEN_3_THINKING, _IM, _THINK, refused=_opens("")),
    "qwen3.5": Shape(QWEN_35, _IM, _THINK, refused=_opens("/None", "/True") | _ONE_OFF, switch=True),
    "smollm3": Shape(SMOLLM3, _IM, _THINK, refused=NO_REASONING, switch=True),
    "phi3": Shape(
        PHI_3, ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"), refused=NO_TOOLS | NO_REASONING | _SEVERAL
    ),
    "phi4": Shape(PHI_4, (*_IM, "<|im_sep|>"), refused=NO_TOOLS | NO_REASONING),
    "gpt-oss": Shape(HARMONY, _HARMONY, refused=_SEVERAL),
    "command-r": Shape(COMMAND_R, _TURN, refused=NO_REASONING),
    "command-r7b": Shape(
        COMMAND_R7B, (*_TURN, "<|START_RESPONSE|>", "<|END_RESPONSE|>"), refused=NO_TOOLS | NO_REASONING
    ),
    "deepseek-v3": Shape(DEEPSEEK_V3, _DEEPSEEK, refused=NO_REASONING),
    "deepseek-r1": Shape(
        DEEPSEEK_R1,
        _DEEPSEEK,
        ("<think>", "</think>"),
        refused=_opens("") | NO_TOOLS | NO_REASONING | {"think": "leaves out the reasoning"},
    ),
    "deepseek-v3.1": Shape(
        DEEPSEEK_V31,
        _DEEPSEEK,
        ("<think>", "</think>"),
        refused=_opens("/True") | NO_TOOLS | NO_REASONING | {"think": "leaves out the reasoning"},
        switch=True,
    ),
    "granite": Shape(GRANITE, _ROLES, refused=NO_REASONING, switch=True),
    "sentencepiece": Shape(
        None,
        ("</s>", "<s>"),
        refused=dict.fromkeys(("several", "several with system"), "cannot be given a conversation")
        | {"tools": "knows no tools", "reasoning": "reasoning_content cannot be written"}
        | dict.fromkeys(("call", "call beside text", "loop"), "tool_calls cannot be written"),
        sentencepiece=True,
    ),
}


def tokenizer_of(shape: Shape) -> PreTrainedTokenizerBase:
    """A tokenizer of a few hundred tokens with a shape's template and control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if shape.sentencepiece:
        made = Tokenizer(models.BPE(byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = [chr(code) for code in range(33, 127)]
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(_CORPUS, trainer)
    if shape.sentencepiece:
        model = json.loads(made.to_str())["model"]
        vocabulary = {**model["vocab"], **{f"<0x{at:02X}>": len(model["vocab"]) + at for at in range(256)}}
        made.model = models.BPE(vocab=vocabulary, merges=list(map(tuple, model["merges"])), byte_fallback=True)
    end, *others = shape.special
    begin = next(
        (token for token in ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>") if token in others), end
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, bos_token=begin)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(one, normalized=False) for one in others]})
    tokenizer.add_tokens([AddedToken(one, normalized=False) for one in shape.ordinary])
    tokenizer.chat_template = shape.template
    return tokenizer
