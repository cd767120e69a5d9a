"""A table of figures as text: columns for a terminal, or Markdown for a report."""

from collections.abc import Collection, Sequence


def table(
    rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,), markdown: bool = False
) -> str:
    """`rows` of equal length, the first the head; `left` are the columns of text.

    >>> print(table([["run", "loss"], ["a", "2.5"], ["b", "10.25"]]))
    run   loss
    a      2.5
    b    10.25
    """
    if markdown:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    if not markdown:
        return "\n".join("  ".join(cells).rstrip() for cells in lines)
    rule = [
        "-" * width if column in left else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))
