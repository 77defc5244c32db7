"""A server in this process, without a socket: what a model folder answers over HTTP."""

import asyncio
import contextlib
import json
from types import SimpleNamespace

import httpx

from dllm.engines.kinds import make_engine
from dllm.engines.limits import Limits
from dllm.engines.streams import LocalStreams
from dllm.inference.loaded_model import LoadedModel
from dllm.peers.peers import Peers
from dllm.serving.app import App
from dllm.serving.log import Log
from dllm.serving.service import Service
from dllm.serving.tokens import Clients

LIMIT = 60  # seconds, of any test
OPTIONS = {"slots": 8, "queue": 64, "cache": 1 << 20, "precision": "fp32", "max_source": 64}


def client_of(served, tokens=(), **limits):
    """A client of a rank that is alone, with models and their engines. In the event loop."""
    bounds, services = Limits(source=64, **limits), []
    gossip = SimpleNamespace(rank=0, size=1, table=dict, known={})
    for model, engine in served:
        local = LocalStreams(engine, asyncio.get_running_loop())
        services.append(Service(model, local, Peers(gossip, local, None, bounds), bounds))
    application = App(services, gossip, bounds, Log(0)).asgi(Clients(tokens))
    return httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://here")


class Asked:
    """A model that is served. asked(path, body): the response to a POST, or without a body to a GET."""

    def __init__(self, folder, **options):
        self.model = LoadedModel.open(folder)
        self.engine = make_engine(self.model, SimpleNamespace(**OPTIONS | options), 1)
        self.engine.start()

    def __call__(self, path, body=None, **limits):
        return self.together((path, body), **limits)[0]

    def together(self, *asked, **limits):
        """The responses to several requests at once, each (path, body)."""

        async def work():
            async with client_of([(self.model, self.engine)], **limits) as client:
                return await asyncio.gather(
                    *(client.get(path) if body is None else client.post(path, content=json.dumps(body)) for path, body in asked)
                )

        return asyncio.run(asyncio.wait_for(work(), LIMIT))

    def choices(self, prompt, **body):
        """Those of a completion."""
        return answered(self("/v1/completions", {"prompt": prompt, **body}))["choices"]

    def text(self, prompt, **body):
        """The text of the only one."""
        (choice,) = self.choices(prompt, **body)
        return choice["text"]

    def streamed(self, prompt, **body):
        """The text of the only one as it comes."""
        events = self("/v1/completions", {"prompt": prompt, "stream": True, **body}).text
        parts = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
        return "".join(choice["text"] for part in parts for choice in part["choices"])


@contextlib.contextmanager
def served(folder, **options):
    """An Asked, while a block lasts."""
    asked = Asked(folder, **options)
    yield asked
    asked.engine.stop()


def answered(response):
    """The JSON of an answer."""
    assert response.status_code == 200, response.text
    return response.json()


def refusal(response, status=400):
    """What a refusal says, in one line."""
    assert response.status_code == status, response.text
    message = response.json()["error"]["message"]
    assert "\n" not in message
    return message
