"""What to look for in an image when a question about it was answered."""

import re

# Words of English questions that name nothing to be seen. Of other languages none is left out.
ENGLISH = """
a an any the this that these those there here it its is are was were be been being am do does did
has have had having can could may might will would shall should must what which who whom whose where
when why how many much kind type of in on at by to for from with within without and or as if not no
yes you your i we us our me my they their see seen seeing show shows shown showing image images
picture pictures scan photo please tell describe present visible located appear appears
"""
UNSEEN = frozenset(ENGLISH.split())
YES_NO = {"yes", "no"}


def key_phrase(question: str, answer: str) -> str:
    """The question's content words, and those of an answer other than yes or no.

    A text is kept word by word, as it was written, without `UNSEEN`; what has no words but those
    (or is in a language that does not part them) stays the whole question.
    """
    words = _content(question)
    if answer.strip(" .!").lower() not in YES_NO:
        words += [word for word in _content(answer) if word not in words]
    return " ".join(words) or question


def _content(text: str) -> list[str]:
    words = re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text)
    return [word for word in words if word.lower() not in UNSEEN]
