"""Chat templates that write the prompts of LLaVA's conversations: vicuna_v1, mistral_instruct and chatml.

    A chat between ... USER: <image>\\nWhat is this? ASSISTANT:                        # llama
    [INST] <image>\\nWhat is this? [/INST]                                             # mistral
    <|im_start|>user\\n<image>\\nWhat is this?<|im_end|>\\n<|im_start|>assistant\\n    # qwen2

The images of a message stand before its text, wherever they were, as LLaVA trains.
"""

from hidrop_fx.checkpoints.original_config import END_TOKEN, START_TOKEN
from hidrop_fx.checkpoints.vocabulary import IMAGE

_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)
_SPOKEN = (
    "{%- macro spoken(message) -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{- 'IMAGE\n' -}}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
)
_VICUNA = (
    "{%- if not messages or messages[0]['role'] != 'system' -%}{{- SYSTEM + ' ' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- spoken(message) + ' ' -}}"
    "{%- elif message['role'] == 'user' -%}{{- 'USER: ' + spoken(message) + ' ' -}}"
    "{%- else -%}{{- 'ASSISTANT: ' -}}{%- generation -%}{{- spoken(message) + eos_token -}}{%- endgeneration -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
_MISTRAL = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- ' ' -}}"
    "{%- generation -%}{{- spoken(message) + ' ' + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- '[INST] ' + spoken(message) + ' [/INST]' -}}{%- endif -%}"
    "{%- endfor -%}"
)
_CHATML = (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- spoken(message) + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}"
    "{%- else -%}{{- spoken(message) + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
NAMES: dict[str, str] = {"llama": "vicuna_v1", "mistral": "mistral_instruct", "qwen2": "chatml"}
"""Type of the text model -> LLaVA's name of its conversation."""
_TEMPLATES: dict[str, str] = {"llama": _VICUNA, "mistral": _MISTRAL, "qwen2": _CHATML}


def chat_template(text_type: str, *, wrapped: bool) -> str:
    """Return the template for a type of text model; an image stands between two tokens of its own where it is `wrapped`."""
    image = f"{START_TOKEN}{IMAGE}{END_TOKEN}" if wrapped else IMAGE
    template = (_SPOKEN + _TEMPLATES[text_type]).replace("SYSTEM", repr(_VICUNA_SYSTEM))
    return template.replace("'IMAGE\n'", repr(f"{image}\n"))
