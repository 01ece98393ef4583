"""The instruction template: what stands before the response, as text.

The wording is Stanford Alpaca's, which LLaMA-Adapter was trained with (OpenGVLab/LLaMA-Adapter,
alpaca_finetuning_v1), so adapters meet the same prompt here and there. One departure: the template ends with
a newline after ``### Response:``, so that the first token of the response never merges with the colon and the
ids of the prompt are always a prefix of the ids of prompt and response together.
"""

_REQUEST = "Write a response that appropriately completes the request."
_PLAIN = f"Below is an instruction that describes a task. {_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n"
_WITH_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    f"{_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n### Input:\n{{context}}\n\n"
)
_RESPONSE = "### Response:\n"


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """Return the text that precedes a response; ``context`` (Dolly) or ``input`` (Alpaca) may be empty."""
    template = _WITH_CONTEXT if context else _PLAIN
    return template.format(instruction=instruction, context=context) + _RESPONSE


def next_turn_prompt(instruction: str) -> str:
    """Return what precedes the response of a later turn of a conversation."""
    return f"### Instruction:\n{instruction}\n\n{_RESPONSE}"
