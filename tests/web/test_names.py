"""Names that clients ask for, and what holds where a request says nothing: the server's and the model's defaults."""

from __future__ import annotations

import pytest

from mullama.config import ServeConfig, load_config
from mullama.errors import ConfigError
from mullama.serving.manager import ModelManager
from mullama.serving.served_models import Names
from mullama.web.app import create_app
from mullama.web.openai.sampling import SamplingDefaults
from mullama.web.services import Services

from .conftest import Client
from .fake_engine import FakeEngine

HI = {"messages": [{"role": "user", "content": "hi"}]}


def served(config: ServeConfig) -> tuple[Client, FakeEngine, FakeEngine]:
    first, second = FakeEngine("fake"), FakeEngine("other")
    names = Names.of(config.alias, any_is_first=config.any_model, is_required=config.require_model)
    services = Services(config, ModelManager([("fake", first), ("other", second)], names=names))
    return Client(create_app(config, services.models, services), services), first, second


def test_an_alias_is_answered_by_its_model_and_listed() -> None:
    client, _, second = served(ServeConfig(alias=["GPT-4o=Other"]))
    reply = client.post("/v1/chat/completions", HI | {"model": "gpt-4O"})
    assert (reply.status, reply.json["model"]) == (200, "other")
    assert len(second.requests) == 1
    listed = {one["id"]: one.get("root") for one in client.get("/v1/models").json["data"]}
    assert listed == {"fake": None, "other": None, "gpt-4o": "other"}
    assert client.get("/v1/models/gpt-4o").json["id"] == "other"
    assert client.post("/v1/chat/completions", HI | {"model": "gpt-5"}).status == 404


def test_any_name_is_the_first_model_s_only_for_requests() -> None:
    client, first, _ = served(ServeConfig(any_model=True))
    for path, body in (
        ("chat/completions", HI),
        ("completions", {"prompt": "x"}),
        ("messages", HI | {"max_tokens": 5}),
    ):
        assert client.post(f"/v1/{path}", body | {"model": "gpt-5+turbo"}).json["model"] == "fake"
    assert client.post("/api/chat", HI | {"model": "llama3:latest", "stream": False}).json["model"] == "fake"
    assert len(first.requests) == 4
    assert client.get("/internal/models/gpt-5").status == 404


def test_a_request_without_a_name_is_refused_where_it_must_have_one() -> None:
    client, _, _ = served(ServeConfig(require_model=True))
    reply = client.post("/v1/chat/completions", HI)
    assert (reply.status, reply.error["param"]) == (400, "model")
    assert client.post("/v1/chat/completions", HI | {"model": "fake"}).status == 200


@pytest.mark.parametrize(
    "options", [{"alias": ["a=b", "A=c"]}, {"alias": ["a"]}, {"any_model": True, "require_model": True}]
)
def test_names_that_contradict_each_other_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        served(ServeConfig(**options))  # type: ignore[arg-type]


def test_defaults_are_the_server_s_and_those_of_the_model_over_them(tmp_path: object) -> None:
    config = ServeConfig(temperature=0.3, max_tokens=7, sampling=["Other temperature=0 top_k=5 max_tokens=-1"])
    client, first, second = served(config)
    for model in ("fake", "other"):
        assert client.post("/v1/chat/completions", HI | {"model": model, "top_p": 0.5}).status == 200
    one, two = first.requests[0].sampling, second.requests[0].sampling
    assert (one.temperature, one.top_k, one.top_p, one.max_tokens) == (0.3, 40, 0.5, 7)
    assert (two.temperature, two.top_k, two.top_p, two.max_tokens) == (0.0, 5, 0.5, None)
    shown = client.get("/props", query="model=other").json["default_generation_settings"]["params"]
    assert (shown["temperature"], shown["top_k"]) == (0, 5)
    assert client.post("/v1/chat/completions", HI | {"temperature": 1.5, "max_tokens": -1}).status == 200
    assert (first.requests[1].sampling.temperature, first.requests[1].sampling.max_tokens) == (1.5, None)


def test_defaults_of_a_model_are_a_table_of_the_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "mullama.toml"
    file.write_text('temperature = 0.5\n[sampling."a:1b"]\ntemperature = 0.25\nmirostat = 2\n')
    defaults = SamplingDefaults(load_config(env={}, file=file))
    assert defaults.of("A:1b")["temperature"] == 0.25
    assert defaults.of("A:1b")["mirostat"] == 2
    assert defaults.of("b")["temperature"] == 0.5


@pytest.mark.parametrize("text", ["a temperature=9", "a stop=1", "a top_k=x", "a top_k=1.5", "a min_tokens=5"])
def test_a_default_that_no_request_could_have_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--sampling"):
        SamplingDefaults(ServeConfig(sampling=[text]))


def test_without_options_the_defaults_are_the_core_s() -> None:
    client, first, _ = served(ServeConfig())
    client.post("/v1/chat/completions", HI)
    from mullama.types import SamplingParams

    assert first.requests[0].sampling == SamplingParams()
