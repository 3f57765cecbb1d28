"""What the model is asked, and how a stranger's alt-text gets into the question unharmed.

A prompt is a text file with two marks: `{{image}}`, where the picture goes, and after it
`{{caption}}`, where the alt-text goes. All fixed text stands before the picture, because an engine
keeps what it has computed for a common beginning, and behind a picture nothing is common. Which
special tokens a turn is wrapped in is the business of the model's own chat template.

Published: a long prompt with in-context examples for the teacher and a short one for the student.
The wording here is ours.
"""

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from refine.errors import RefineError

BUILT_IN = Path(__file__).parent / "prompt_texts"
IMAGE, CAPTION = "{{image}}", "{{caption}}"
NO_CAPTION = "none"

INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn"}
# Drawn as nothing, though their category says letter, mark or symbol.
BLANKS = re.compile(
    "[\u034f\u115f\u1160\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# Every chat template's tokens and marks are spelled with one of these: <|im_end|>, </s>, <image>,
# [INST], {{ }}, |ENDOFTEXT|; and so are the forms that a tokenizer's normaliser turns into them.
HARMLESS = {"‹": "<＜﹤≮", "›": ">＞﹥≯", "(": "[［﹇{｛﹛︷", ")": "]］﹈}｝﹜︸", "/": "|｜"}
DEFUSED = {ord(bad): good for good, all_bad in HARMLESS.items() for bad in all_bad}
# LLaVA's and Vicuna's turns begin with plain words.
TURN = re.compile(r"\b(system|user|human|assistant|gpt)\s*[:：]", re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """A question with a place for the picture and one for the alt-text.

    Attributes:
        name: what it is called in records and messages.
        text: the template, with each mark once, the picture's first.

    Raises:
        RefineError: a mark is missing, doubled or out of place.
    """

    name: str
    text: str

    def __post_init__(self) -> None:
        for mark, what in ((IMAGE, "the picture"), (CAPTION, "the alt-text")):
            count = self.text.count(mark)
            if count != 1:
                raise RefineError(
                    f"prompt {self.name!r} has the mark {mark} {count} times: "
                    f"write it once, where {what} goes"
                )
        if self.text.index(CAPTION) < self.text.index(IMAGE):
            raise RefineError(
                f"prompt {self.name!r} has {CAPTION} before {IMAGE}: put the picture first, so "
                "that the text before it is the same for every pair and computed once"
            )

    @property
    def digest(self) -> str:
        """12 hex digits that stand for the text in every record."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    def messages(self, caption: str) -> list[dict]:
        """The question about one pair, as chat templates take it.

        Args:
            caption: the alt-text, fenced by `fence`; it is quoted as a JSON string, which it can't
                end, and "" becomes the word none without quotation marks.
        """
        before, after = self.text.split(IMAGE)
        quoted = json.dumps(caption, ensure_ascii=False) if caption else NO_CAPTION
        content: list[dict] = [{"type": "text", "text": before}] if before else []
        content += [{"type": "image"}, {"type": "text", "text": after.replace(CAPTION, quoted)}]
        return [{"role": "user", "content": content}]


def load_prompt(name_or_path: str) -> Prompt:
    """A prompt that comes with the program, by name, or a file of one's own.

    Raises:
        RefineError: there is neither, it is no text in UTF-8, or its marks are wrong.
    """
    names = sorted(path.stem for path in BUILT_IN.glob("*.txt"))
    built_in = name_or_path in names
    path = BUILT_IN / f"{name_or_path}.txt" if built_in else Path(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise RefineError(
            f"--prompt {name_or_path}: there is no such file, and no prompt of that name comes "
            f"with the program: name a file, or one of {', '.join(names)}"
        ) from e
    except (OSError, UnicodeDecodeError) as e:
        raise RefineError(f"--prompt {name_or_path} is no text file in UTF-8: {e}") from e
    return Prompt(name_or_path if built_in else path.stem, text.strip())


def fence(caption: str, limit: int = 512) -> str:
    """Alt-text that is nothing but words: safe to stand in a prompt, and the same if fenced again.

    What can't be seen is removed, white space folded; brackets and bars become others that no chat
    template gives a meaning to, and a word that would begin a turn loses its colon. What the words
    say is not touched: that it is no instruction, the prompt says.

    Args:
        caption: whatever was found beside the picture.
        limit: characters of the result, which is cut at the end of a word, or inside of one that
            fills half of it.
    """
    caption = caption[: 64 * limit]  # as far as any text with something to see in it reaches
    if not (caption.isascii() and caption.isprintable()):
        caption = BLANKS.sub("", "".join(map(_visible, caption)))
    text = TURN.sub(r"\1 -", " ".join(caption.translate(DEFUSED).split()))
    if len(text) <= limit:
        return text
    whole, _, _ = text[: limit + 1].rpartition(" ")
    return whole if len(whole) > limit // 2 else text[:limit]


def _visible(character: str) -> str:
    if character.isspace():
        return " "
    return "" if unicodedata.category(character) in INVISIBLE else character


@cache
def example_sentences() -> frozenset[str]:
    """The sentences of the built-in prompts' examples, true and false ones: an answer that holds
    one of them is about the prompt, not the picture."""
    prompts = "\n".join(path.read_text("utf-8") for path in BUILT_IN.glob("*.txt"))
    answers = [json.loads(line) for line in prompts.splitlines() if line.startswith('{"')]
    return frozenset(text for a in answers for text in (*a["desc"], *a["neg_desc"]))
