"""What a vision-language model is to the rest: questions go in, answers come out in any order.

A backend holds the model (vLLM in this process) or the way to it (a server). It works on many
requests at once and never decides what an answer is worth: that is `refine.parse`'s.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from PIL import Image

RETRY_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_tokens: of an answer; one that reaches it is cut and tried again.
        temperature: 0 takes the likeliest token.
        top_p: the nucleus.
        seed: of the draws; each request adds its own.
        structured: the engine is held to the JSON schema of the four fields.
        retries: how often an answer that does not pass is asked for once more.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    structured: bool = False
    retries: int = 2

    def at(self, attempt: int) -> "Sampling":
        """The settings of a request's n-th try: the first as given, later ones warmer and with
        another seed, because the same question at temperature 0 has the same answer."""
        if not attempt:
            return self
        warmer = max(self.temperature, RETRY_TEMPERATURE)
        return replace(self, temperature=warmer, seed=self.seed + attempt)


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        key: names it among those under way; its answer carries it.
        caption: the alt-text, fenced by `refine.prompts.fence`.
        image: RGB, of at most the run's `max_pixels`.
        attempt: 0 at first, one more at each retry.
    """

    key: str
    caption: str
    image: Image.Image
    attempt: int = 0


@dataclass(frozen=True)
class Reply:
    """What came of a request.

    Attributes:
        key: the request's.
        text: the raw output; may be anything.
        failure: why there is no text, as a reason to count ("refused_by_server"), or "".
        detail: the failure in words.
        truncated: the output ended at `max_tokens`.
        prompt_tokens: of the question, the image's among them.
        output_tokens: of the answer.
    """

    key: str
    text: str = ""
    failure: str = ""
    detail: str = ""
    truncated: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0


class Backend(Protocol):
    """A model at work. One thread uses it.

    Attributes:
        slots: requests that it works on at the same time; it is kept at twice as many, so that it
            never waits.
        note: a line for the user on what was opened, or "".
    """

    slots: int
    note: str

    def submit(self, request: Request) -> None:
        """Takes a request; does not wait for its answer."""

    def replies(self) -> list[Reply]:
        """Answers that are finished, each as soon as it is; waits a moment (a step of the engine,
        a tenth of a second) for some where there are none.

        Raises:
            RefineError: the model is out of reach or refuses all work; what is under way is lost,
                what was answered is not.
        """

    def counters(self) -> dict[str, float]:
        """Sums to report beside the answers, such as {"http_429": 3}; may be empty."""

    def close(self) -> None:
        """Gives the model back; requests under way are dropped."""
