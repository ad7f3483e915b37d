"""What is wrong with a svmlight file."""

from bilevax._frontend.words import is_number, quote


def find_fault(text: str) -> str | None:
    """Say which line of a svmlight file is wrong, in the user's words, not in the reader's."""
    for number, line in enumerate(text.split("\n"), start=1):
        label, *pairs = line.partition("#")[0].split() or ["0"]
        if pairs and pairs[0].startswith("qid:"):
            pairs = pairs[1:]
        keys, values = [pair.partition(":")[0] for pair in pairs], [label]
        values += [pair.partition(":")[2] for pair in pairs]
        whole = all(key.isdecimal() and len(key) < 10 for key in keys)
        if not whole or not all(map(is_number, values)):
            return f"line {number} is {quote(line)}, expected 'label index:value index:value ...'"
        indices = [int(key) for key in keys]
        if indices != sorted(set(indices)):
            return f"the indices in line {number} must increase, got {quote(line)}"
    return None
