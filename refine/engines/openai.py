"""A model behind an OpenAI-compatible server: `vllm serve`, or a hosted teacher."""

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

from refine.engines.backend import Sampling
from refine.engines.chat import ServerBackend
from refine.engines.cost import Prices
from refine.errors import RefineError

if TYPE_CHECKING:
    from refine.prompts import Prompt

OPENAI = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Server:
    """A model on a server, a `refine.engines.lvlm.Model`.

    The key comes from the environment, OPENAI_API_KEY, when it is opened; a server of one's own
    needs none.

    Attributes:
        model: its name, as the server knows it.
        base_url: the server's address, most often up to /v1; None for OPENAI_BASE_URL or OpenAI.
        slots: requests on their way at the same time.
        requests_per_minute: at most, or None.
        tokens_per_minute: of prompts and answers, at most, or None.
        timeout: seconds that one request may take in all.
        patience: seconds to go on while the server answers nothing at all.
        price_in: USD for a million tokens of prompts.
        price_out: USD for a million tokens of answers.
        max_cost: USD to be spent at most, or None.

    Raises:
        RefineError: the address is none, or a limit of cost has no prices.
    """

    engine: ClassVar[str] = "openai"

    model: str
    base_url: str | None = None
    slots: int = 32
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 120.0
    patience: float = 3600.0
    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.address)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise RefineError(
                f"--base-url {self.shown_address}: no address such as http://localhost:8000/v1"
            )
        if self.max_cost is not None and not self.price_in + self.price_out:
            raise RefineError("--max-cost needs --price-in and --price-out, USD per 10^6 tokens")

    @property
    def name(self) -> str:
        return self.model

    @property
    def address(self) -> str:
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI

    @property
    def shown_address(self) -> str:
        """Without a user and password that may be in it."""
        return re.sub(r"//[^/@]*@", "//", self.address)

    @property
    def prices(self) -> Prices:
        return Prices(self.price_in, self.price_out, self.max_cost)

    def identity(self) -> dict:
        """The name alone: a run may go on with another server of the same model."""
        return {"engine": self.engine, "name": self.model}

    def open(self, prompt: "Prompt", sampling: Sampling, max_pixels: int) -> "ServerBackend":
        return ServerBackend(self, prompt, sampling)
