"""What the devices of a compiled program send to each other."""

import math
import re


def collectives(compiled):
    """The collectives of a program: name, and the sizes of what they send."""
    found = re.findall(
        r"= (\S+|\([^)]*\)) ((?:all|collective|reduce-scatter|ragged)[a-z-]*)\(", compiled.as_text()
    )
    numbers = r"\w+\[([\d,]*)\]"
    return [
        (name, [math.prod(map(int, filter(None, s.split(",")))) for s in re.findall(numbers, sent)])
        for sent, name in found
    ]
