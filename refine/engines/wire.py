"""What goes to an OpenAI-compatible server and what comes back, apart from when and how often."""

import base64
import io
import json
import time
import zlib
from typing import TYPE_CHECKING, Any

from PIL import Image

from refine.engines.backend import Reply, Request, Sampling
from refine.engines.pace import retry_after
from refine.errors import RefineError
from refine.parse import SCHEMA

if TYPE_CHECKING:
    from openai import APIConnectionError, APIStatusError

    from refine.prompts import Prompt

JPEG_QUALITY = 92
WORDS = 300  # characters kept of what a server says; it may send the whole question back
FATAL = (401, 402, 403, 404, 405)
FAULTS = ("http_429", "http_5xx", "timeouts", "connection_errors", "half_answers")
LIMITS = ("max_tokens", "max_completion_tokens")  # some servers know the first, some the second


class Fault(Exception):
    """A request that came to nothing and is worth another try.

    Attributes:
        kind: one of FAULTS.
        wait_s: seconds that the server asks to be left alone.
    """

    def __init__(self, kind: str, detail: str, wait_s: float = 0.0) -> None:
        super().__init__(detail)
        self.kind, self.wait_s = kind, wait_s


class Refused(Exception):
    """A request that the server will never answer, in its words.

    Attributes:
        parameter: the setting that it does not know, or "".
    """

    def __init__(self, detail: str, parameter: str = "") -> None:
        super().__init__(detail)
        self.parameter = parameter


def data_uri(image: Image.Image) -> str:
    """A picture as text, encoded as JPEG."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def question(
    model: str, prompt: "Prompt", request: Request, picture: str, sampling: Sampling, limit: str
) -> dict[str, Any]:
    """The arguments of a chat completion.

    Args:
        model: its name on the server.
        prompt: what is asked.
        request: about what.
        picture: the request's, by `data_uri`.
        sampling: of a first attempt.
        limit: one of LIMITS, what `max_tokens` is called.
    """
    shown = {"type": "image_url", "image_url": {"url": picture}}
    messages = [
        message
        | {"content": [shown if part["type"] == "image" else part for part in message["content"]]}
        for message in prompt.messages(request.caption)
    ]
    asked = sampling.at(request.attempt)
    body = {
        "model": model,
        "messages": messages,
        limit: asked.max_tokens,
        "temperature": asked.temperature,
        "seed": (asked.seed + zlib.crc32(request.key.encode())) & 0x7FFFFFFF,
    }
    if asked.top_p < 1:
        body["top_p"] = asked.top_p
    if asked.structured:
        schema = {"name": "refinement", "schema": SCHEMA, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def read_reply(key: str, data: bytes) -> Reply:
    """The reply in a body of status 200.

    Raises:
        Fault: the body is not whole, or holds no answer.
    """
    try:
        answer = json.loads(data)
        choice = answer["choices"][0]
        message, ending = choice["message"], choice.get("finish_reason")
        text = message.get("content") or message.get("refusal") or ""
        usage = answer.get("usage") or {}
        used = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        silent = message.get("content") is None and not text
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:
        raise Fault("half_answers", f"no answer in {data[:80]!r}") from e
    counted = {"prompt_tokens": used[0], "output_tokens": used[1]}
    if ending == "content_filter":
        return Reply(key, failure="refused_by_server", detail="its content filter", **counted)
    if not isinstance(text, str) or (silent and ending != "length"):
        raise Fault("half_answers", f"an answer without text, ended by {ending!r}")
    return Reply(key, text, truncated=ending == "length", **counted)


def broken(error: "APIConnectionError", key: str) -> Fault:
    """The fault behind a connection that failed or broke."""
    cause = error.__cause__
    words = redacted(f"{type(cause).__name__}: {cause}" if cause else str(error), key)
    # A body cut short has no class of its own, neither in the client nor in what it builds on.
    cut = "message body" in words
    return Fault("half_answers" if cut else "connection_errors", words)


def refusal(error: "APIStatusError", where: str, model: str, key: str) -> Exception:
    """What a status other than 200 means: a `Fault`, `Refused`, or RefineError for all requests.

    Args:
        error: of the client.
        where: the server's address.
        model: what it was asked for.
        key: not to be told.
    """
    status = error.status_code
    words = redacted(_words(error), key)
    if error.code == "insufficient_quota" or status in FATAL:
        return RefineError(f"{where} answers {status} ({words}): {_mend(status, model)}")
    if status == 429 or status >= 500:
        wait_s = retry_after(error.response.headers, time.time())
        return Fault("http_429" if status == 429 else "http_5xx", f"{status}: {words}", wait_s)
    if status == 408:
        return Fault("timeouts", f"{status}: {words}")
    return Refused(f"{status}: {words}", error.param or "")


def redacted(text: str, key: str) -> str:
    """A server's words, cut to a length and without the key: servers repeat it in errors."""
    return (text.replace(key, "[key]") if key else text)[:WORDS]


def _words(error: "APIStatusError") -> str:
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(message or error.message).split())


def _mend(status: int, model: str) -> str:
    if status in (401, 403):
        return "set OPENAI_API_KEY to a key that may use it"
    if status in (402, 429):
        return "the account has no credit left; the same command goes on when it has"
    return f"is --base-url right, most often up to /v1, and is --model {model} served there?"
