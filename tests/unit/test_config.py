"""Flags over environment over file over defaults, every value checked; and the page made from the same list."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from mullama.cli.config_docs import configuration_page
from mullama.config import ServeConfig, default_of, load_config, option_type, options
from mullama.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mullama.toml"
    path.write_text(text)
    return path


def test_the_defaults_are_those_of_the_class() -> None:
    assert load_config({}, env={}) == ServeConfig()


def test_every_default_passes_its_own_check() -> None:
    given = {opt.name: default_of(opt) for opt in options() if opt.name != "admin_key"}  # no key is no text
    assert load_config(given, env={}) == ServeConfig()


def test_precedence(tmp_path: Path) -> None:
    path = file(tmp_path, "port = 1\nparallel = 2\nthreads = 3\n")
    env = {"MULLAMA_PORT": "10", "MULLAMA_PARALLEL": "20"}
    config = load_config({"port": "100"}, env=env, file=path)
    assert (config.port, config.parallel, config.threads) == (100, 20, 3)


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    path = file(tmp_path, 'ctx-size = 4096\nmodel = ["a", "b=c"]\nmmap = false\ndrain_timeout = 2\n')
    config = load_config(env={"MULLAMA_CONFIG": str(path)})
    assert (config.ctx_size, config.model, config.mmap, config.drain_timeout) == (4096, ["a", "b=c"], False, 2.0)


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("ON", True), ("1", True), ("0", False), ("False", False)])
def test_switches_in_the_environment(text: str, value: bool) -> None:
    assert load_config(env={"MULLAMA_MMAP": text}).mmap is value


def test_lists_in_the_environment_are_split_at_commas() -> None:
    assert load_config(env={"MULLAMA_MODEL": "a, b=c,,"}).model == ["a", "b=c"]


def test_values_with_a_comma_are_a_json_list_in_the_environment(tmp_path: Path) -> None:
    wanted = ["/models/a,b.gguf", "n=/x=y, z.gguf"]
    assert load_config(env={"MULLAMA_MODEL": json.dumps(wanted)}).model == wanted
    assert load_config({"model": wanted}, env={}).model == wanted
    file = tmp_path / "m.toml"
    file.write_text(f"model = {json.dumps(wanted)}\nallowed-host = '[::1], box'\n")
    loaded = load_config(env={}, file=file)
    assert (loaded.model, loaded.allowed_host) == (wanted, ["[::1]", "box"])
    with pytest.raises(ConfigError, match="MULLAMA_MODEL: expected a list of texts"):
        load_config(env={"MULLAMA_MODEL": '["a", 5]'})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": "x"}, "--port: 'x' is not a whole number"),
        ({"port": "65536"}, "--port: 65536 is out of range; it must be between 0 and 65535"),
        ({"ctx_size": -1}, "--ctx-size: -1 is out of range"),
        ({"ctx_size": 1 << 40}, "--ctx-size: 1099511627776 is out of range"),
        ({"ctx_size": 4096.5}, "--ctx-size: '4096.5' is not a whole number"),
        ({"ctx_size": math.inf}, "--ctx-size: 'inf' is not a whole number"),
        ({"ctx_size": True}, "--ctx-size: 'True' is not a whole number"),
        ({"drain_timeout": "nan"}, "--drain-timeout: nan is out of range"),
        ({"mmap": "perhaps"}, "--mmap: 'perhaps' is not true or false"),
        ({"flash_attn": "maybe"}, "--flash-attn: 'maybe' is not one of auto, on, off"),
        ({"gpu_layers": "all"}, "it must look like auto|N"),
        ({"gpu_layers": "-1"}, "it must look like auto|N"),
        ({"tensor_split": "1;2"}, "it must look like N,N"),
        ({"model": [1]}, "--model: expected a list of texts"),
        ({"host": 1.5}, "--host: expected a text"),
        ({"deterministic": True, "kv_layout": "unified"}, "deterministic needs kv_layout streams"),
    ],
)
def test_wrong_values_name_the_option_and_what_is_right(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(flags, env={})
    assert message in raised.value.message
    assert raised.value.param == next(iter(flags))


@pytest.mark.parametrize(("flags", "value"), [({"gpu_layers": 12}, "12"), ({"gpu_layers": "auto"}, "auto")])
def test_layers_on_the_gpu(flags: dict[str, Any], value: str) -> None:
    assert load_config(flags, env={}).gpu_layers == value


@pytest.mark.parametrize("value", ["", "1", "3,1", "0.5,0.25,0.25"])
def test_tensor_splits(value: str) -> None:
    assert load_config({"tensor_split": value}, env={}).tensor_split == value


def test_the_source_of_a_wrong_value_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^MULLAMA_PORT: 'x'"):
        load_config(env={"MULLAMA_PORT": "x"})
    path = file(tmp_path, "port = 'x'")
    with pytest.raises(ConfigError, match=f"^{path}: port: 'x'"):
        load_config(env={}, file=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "unknown option 'prot'"),
        ("port = ", "not valid TOML"),
        ("[server]\nport = 1", "unknown option 'server'"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(env={}, file=file(tmp_path, text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(env={}, file=tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b"host = '\xe9'")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(env={}, file=tmp_path / "latin.toml")


def test_every_option_has_a_type_that_is_understood_and_a_help() -> None:
    for opt in options():
        assert option_type(opt) in (str, int, float, bool, list[str])
        assert opt.metadata["help"]
        assert "pattern" not in opt.metadata or "metavar" in opt.metadata


def test_lists_are_not_shared() -> None:
    load_config(env={}).model.append("x")
    assert load_config(env={}).model == []


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == configuration_page(), (
        "run: python -m mullama.cli.config_docs docs/configuration.md"
    )


# -- keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "env"),
    [
        ({"api_key": [""]}, {}),
        ({"api_key": ["one", " "]}, {}),
        ({"admin_key": ""}, {}),
        ({}, {"MULLAMA_API_KEY": ""}),
        ({}, {"MULLAMA_API_KEY": "one,"}),  # KEYS="$A,$B" without B
        ({}, {"MULLAMA_ADMIN_KEY": ""}),
    ],
)
def test_a_variable_that_is_not_set_opens_no_server(flags: dict[str, Any], env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="it is empty, as a variable that is not set") as caught:
        load_config(flags, env=env)
    assert caught.value.message.startswith(("--api-key", "--admin-key", "MULLAMA_API_KEY", "MULLAMA_ADMIN_KEY"))


def test_an_empty_key_in_the_file_is_refused(tmp_path: Path) -> None:
    for text in ('admin_key = ""', 'api_key = [""]', 'api_key = ["one", ""]', 'api_key = ""'):
        with pytest.raises(ConfigError, match=r"mullama\.toml: .*_key: it is empty"):
            load_config(env={}, file=file(tmp_path, text))
    assert load_config(env={}, file=file(tmp_path, "api_key = []")).api_key == []


def test_no_key_is_that_of_two() -> None:
    with pytest.raises(ConfigError, match="two keys are equal"):
        load_config({"api_key": ["same-one", "same-one"]}, env={})
    with pytest.raises(ConfigError, match="it is also an --api-key"):
        load_config({"api_key": ["same-one", "other"]}, env={"MULLAMA_ADMIN_KEY": "same-one"})
    with pytest.raises(ConfigError, match="two keys are equal"):
        ServeConfig(api_key=["same-one", "same-one"])
    for key in ("two words", "line\nbreak", "nul\0"):
        with pytest.raises(ConfigError, match="no white space and no control characters"):
            ServeConfig(api_key=[key])


def test_keys_from_a_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# tenants\none\n\n two \n")
    config = load_config({"api_key": [f"@{keys}", "three"]}, env={})
    assert config.api_key == ["one", "two", "three"]
    with pytest.raises(ConfigError, match="must hold one key, it has 2"):
        load_config({"admin_key": f"@{keys}"}, env={})
    keys.write_text("alone\n")
    assert load_config(env={"MULLAMA_ADMIN_KEY": f"@{keys}"}).admin_key == "alone"
    keys.write_text("\n")
    with pytest.raises(ConfigError, match="holds no key"):
        load_config({"api_key": [f"@{keys}"]}, env={})
    with pytest.raises(ConfigError, match="cannot read the key file"):
        load_config({"api_key": [f"@{tmp_path}/none"]}, env={})


def test_no_text_of_ours_shows_a_key(tmp_path: Path) -> None:
    secret = "s3cret-key"
    shown = repr(ServeConfig(api_key=[secret], admin_key=f"{secret}-2"))
    keys = tmp_path / "keys"
    keys.write_text(f"{secret} with spaces")
    for flags in (
        {"api_key": [secret, secret]},
        {"api_key": [f"{secret}\t"]},
        {"api_key": [secret], "admin_key": secret},
        {"api_key": [f"@{keys}"]},
        {"admin_key": f"{secret} {secret}"},
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(flags, env={})
        shown += caught.value.message
    assert secret not in shown


# -- made in Python ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"ctx_size": -5}, "ctx_size: -5 is out of range; it must be between 0 and"),
        ({"threads": 2.5}, "threads: '2.5' is not a whole number"),
        ({"mmap": "perhaps"}, "mmap: 'perhaps' is not true or false"),
        ({"kv_type_k": "q4"}, "kv_type_k: 'q4' is not one of f32, f16"),
        ({"device": 5}, "device: expected a list of texts"),
        ({"tensor_split": "3;1"}, "tensor_split: '3;1' does not fit"),
        ({"page_dir": 5.5}, "page_dir: expected a text"),
    ],
)
def test_a_config_made_in_python_is_checked(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServeConfig(**values)
    assert caught.value.message.startswith(reason)
    assert caught.value.param == next(iter(values))


def test_a_config_made_in_python_is_brought_to_its_types(tmp_path: Path) -> None:
    config = ServeConfig(page_dir=tmp_path, device=("CUDA0",), plan_timeout_ms=50)  # type: ignore[arg-type]
    assert (config.page_dir, config.device, config.plan_timeout_ms) == (str(tmp_path), ["CUDA0"], 50.0)
    assert dataclasses.replace(config, ctx_size=64).ctx_size == 64
    with pytest.raises(ConfigError, match="parallel"):
        dataclasses.replace(config, parallel=-1)


def test_a_dict_of_options_names_what_is_unknown() -> None:
    assert load_config({"ctx-size": 64, "mmap": False}, env={}, where="config: ").ctx_size == 64
    with pytest.raises(ConfigError, match=r"config: ctx_sise: there is no such option; did you mean 'ctx_size'\?"):
        load_config({"ctx_sise": 64}, env={}, where="config: ")
    with pytest.raises(ConfigError, match=r"config: ctx_size: -5 is out of range"):
        load_config({"ctx_size": -5}, env={}, where="config: ")
