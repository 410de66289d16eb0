r"""The last `\boxed{...}` of a text, as data sets, graders and answer positions all define it."""

import re

BOX_OPENING = r"\\boxed[ \t\r\n]*\{"
r"""Pattern of a box up to and including its brace; LaTeX allows white space before the brace."""

_OPENING = re.compile(BOX_OPENING)


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` of the text, stripped; None without a box, or when the last is not closed.

    The last box is the one that opens last, so of nested boxes it is the inner one. `\{` and `\}` are printed braces
    and are not counted.
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
