"""A reward that a random model can climb: the share of digits in what it wrote."""


def digits(completions, **_):
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [sum(character.isdigit() for character in text) / 8 for text in texts]
