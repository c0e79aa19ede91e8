"""Text of unknown origin made safe to print: file names, keys, captions and messages of other libraries may hold
commands to the terminal."""


def printable(text: str, lines: bool = False) -> str:
    """The text with all that is not printable escaped, as in "\\x1b[2J": control characters, those that change the
    direction of writing, code points without a character, and halves of surrogate pairs.

    lines: whether line breaks stay, for text of several lines that is lift-fast's own, with foreign words in it.
    """
    return "".join(c if c.isprintable() or (lines and c == "\n") else ascii(c)[1:-1] for c in text)
