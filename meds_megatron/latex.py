r"""The last `\boxed{...}` of a text: one rule for the data, the graders and the fingerprint's position."""

import re

BOX_OPENING = r"\\boxed[ \t\r\n]*\{"
r"""Pattern of a box up to and including its brace; LaTeX lets white space stand before the brace."""

_OPENING = re.compile(BOX_OPENING)


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` of the text holds, stripped; None without a box, or when the last one never closes.

    The last box is the one that opens last, so of nested boxes it is the inner one. `\{` and `\}` are printed braces:
    they open and close nothing.
    """
    start = text.rfind("\\boxed")
    opening = None
    while start >= 0 and not (opening := _OPENING.match(text, start)):
        start = text.rfind("\\boxed", 0, start)
    if not opening:
        return None
    depth = 1
    position = opening.end()
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2
            continue
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[opening.end() : position].strip()
        position += 1
    return None
