"""Functions for templates that know none: shown in the system message, called and answered in a form of plain text.

The form is the one that most models with functions were trained on, Hermes': a call is JSON between ``<tool_call>`` and
``</tool_call>``, its result a text of the user's between ``<tool_response>`` and ``</tool_response>``. The other half,
reading such calls, is ``generic_parser()`` of the core.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mullama.types import ToolChoice

_SHOWN = """\
You can call functions. Each line between <tools> and </tools> describes one as JSON:
<tools>
{tools}
</tools>
To call one, write its name and its arguments as JSON between <tool_call> and </tool_call>, in this form:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument's name": "its value"}}}}
</tool_call>
{choice}"""
_CHOICES = {
    ToolChoice.AUTO: "Where no function helps, answer in plain words.",
    ToolChoice.REQUIRED: "Answer with a call.",
}


def with_functions(
    messages: Sequence[dict[str, Any]], tools: Sequence[Any], choice: ToolChoice
) -> list[dict[str, Any]]:
    """The messages of a chat (OpenAI's) without calls and results in them, and with the functions in the system's."""
    found: list[dict[str, Any]] = []
    is_result = False
    for message in messages:
        before, is_result = is_result, message["role"] == "tool"
        text = message.get("content") or ""
        if is_result:
            text = f"<tool_response>\n{text}\n</tool_response>"
            if before:
                found[-1]["content"] += f"\n{text}"
                continue
            found.append({"role": "user", "content": text})
            continue
        calls = [_call(call["function"]) for call in message.get("tool_calls") or ()]
        more = {name: value for name, value in message.items() if name != "tool_calls"}
        found.append({**more, "content": "\n".join([*filter(None, [text]), *calls])})
    if tools and choice is not ToolChoice.NONE:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        shown = _SHOWN.format(tools=lines, choice=_CHOICES[choice])
        if found and found[0]["role"] in ("system", "developer"):
            found[0]["content"] = f"{found[0]['content']}\n\n{shown}".strip()
        else:
            found.insert(0, {"role": "system", "content": shown})
    return found


def _call(function: dict[str, Any]) -> str:
    arguments = function.get("arguments") or "{}"
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": {text}}}\n</tool_call>'
