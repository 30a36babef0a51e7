"""Words that may be another machine's, made fit for a terminal and for a log that somebody shows in one."""


def plain(words: str) -> str:
    """Words in one line, without what a terminal would obey: whatever is not printable becomes a space."""
    return "".join(letter if letter.isprintable() else " " for letter in words)


def plain_lines(words: str) -> str:
    """The same line by line."""
    return "\n".join(map(plain, words.split("\n")))
