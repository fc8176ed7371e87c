"""One vLLM server over HTTP: requests, what it says about itself, and when it counts as gone. Does not import vllm."""

import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

CONCURRENT = 512  # most requests at a time, of all servers: each is an open file
CONNECT_SECONDS = 10
# The kernel probes a silent connection, so that an answer of a machine that is gone is not waited for forever.
KEEP_ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
]
# Options that a request without them would take from the generation_config of the served model.
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class Unreachable(Exception):
    """No answer, or one of a server that is starting or ending: it may help to ask again."""


class Refused(Exception):
    """The server's own error message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Served:
    """What a server says about itself.

    version: of its weights. untied: it serves a tied model with a head of its own. max_lora_rank: None if it serves no
    adapters. extended: its workers have the methods of WeightSums.
    """

    version: str
    dtype: str
    longest: int
    log_probs_mode: str
    has_tokenizer: bool
    on_cpu: bool
    untied: bool
    max_lora_rank: int | None
    swaps_adapters: bool
    has_nccl: bool
    extended: bool


class Client:
    """url: without a path."""

    def __init__(self, url: str):
        self.url = url
        self.session = requests.Session()
        self.session.trust_env = False  # a proxy of the environment does not lead into the cluster
        self.session.headers["Connection"] = "close"
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, _KeptAlive(pool_maxsize=CONCURRENT))

    def get(self, path: str) -> Any:
        return self._request("GET", path, None)

    def post(self, path: str, **body: Any) -> Any:
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        try:
            response = self.session.request(method, self.url + path, json=body, timeout=(CONNECT_SECONDS, None))
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            raise Unreachable(type(error).__name__) from None
        if response.status_code in (502, 503, 504) or (response.status_code == 500 and not self._is_healthy()):
            raise Unreachable(f"status {response.status_code}")
        if not response.ok:
            raise Refused(response.status_code, _message(response))
        return response.json() if "json" in response.headers.get("Content-Type", "") else None

    def _is_healthy(self) -> bool:
        try:
            return self.session.get(self.url + "/health", timeout=CONNECT_SECONDS).ok
        except requests.RequestException:
            return False

    def weight_version(self) -> str:
        return self.get("/weight_info")["weight_version"]

    def call_workers(self, method: str, **kwargs: Any) -> list[Any]:
        return self.post("/collective_rpc", method=method, kwargs=kwargs)["results"]

    def describe(self) -> Served:
        info = self.get("/server_info?config_format=json")
        config, variables = info["vllm_config"], info["vllm_env"]
        model, lora, transfer = config["model_config"], config["lora_config"], config["weight_transfer_config"]
        return Served(
            version=self.weight_version(),
            dtype=model["dtype"].removeprefix("torch."),
            longest=model["max_model_len"],
            log_probs_mode=model["logprobs_mode"],
            has_tokenizer=not model["skip_tokenizer_init"],
            on_cpu=config["device_config"]["device"] == "cpu",
            untied=(model["hf_overrides"] or {}).get("tie_word_embeddings") is False,
            max_lora_rank=lora and lora["max_lora_rank"],
            swaps_adapters=bool(variables.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING")),
            has_nccl=bool(transfer) and transfer["backend"] == "nccl",
            extended=config["parallel_config"]["worker_extension_cls"].endswith(".WeightSums"),
        )

    def complete(self, prompt: list[int], parameters: dict[str, Any], adapter: str | None) -> tuple[list[int], Any]:
        """(token ids, log-probability of each) of one completion. Raises Refused for what cannot be written as JSON:
        log-probabilities that are not finite."""
        body = {**NEUTRAL, **parameters, "prompt": prompt, "return_token_ids": True, "skip_special_tokens": False}
        body |= {"model": adapter} if adapter else {}
        choice = self.post("/v1/completions", **body)["choices"][0]
        if choice["finish_reason"] not in ("stop", "length"):
            raise Unreachable(f"a request ended by {choice['finish_reason']!r}")
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]


class _KeptAlive(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, socket_options=KEEP_ALIVE)


def _message(response: requests.Response) -> str:
    """The error's text on one line."""
    try:
        about = response.json()
    except requests.exceptions.JSONDecodeError:
        about = response.text
    if isinstance(about, dict):
        about = about.get("error", about.get("detail", about))
    if isinstance(about, dict):
        about = about.get("message", about)
    return f"{response.status_code}: {' '.join(str(about).split())[:500]}"


def in_background(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Future]:
    """A future of work(item) for each item, by threads that do not keep the program from ending."""
    futures = [(Future(), item) for item in items]
    waiting = deque(futures)

    def run() -> None:
        while True:
            try:
                future, item = waiting.popleft()
            except IndexError:
                return
            try:
                future.set_result(work(item))
            except BaseException as error:
                future.set_exception(error)

    for _ in range(min(len(futures), CONCURRENT)):
        threading.Thread(target=run, daemon=True).start()
    return [future for future, _ in futures]


def is_here(url: str) -> bool:
    """Whether the address is one of this machine."""
    _, theirs = _family_and_address(url)
    return theirs.startswith("127.") or theirs == address_towards(url)


def address_towards(url: str) -> str:
    """This machine's address as the server reaches it."""
    family, theirs = _family_and_address(url)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((theirs, 9))  # sends nothing
        return probe.getsockname()[0]


def _family_and_address(url: str) -> tuple[int, str]:
    family, _, _, _, address = socket.getaddrinfo(urlsplit(url).hostname, None, type=socket.SOCK_DGRAM)[0]
    return family, address[0]
