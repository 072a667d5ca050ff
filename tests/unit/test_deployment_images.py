"""The images and the compose file: their linters pass, their commands are ones that splitfl takes, and nothing is left open.

What no linter sees, that an image builds and runs, is not tested here.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from splitfl.cli import build_parser
from tests.unit.deployment import DEPLOY, DOCKERFILE, ROOT, instructions, linter, serve_config

COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


# --- linters --------------------------------------------------------------------------------------------------------------------


def test_hadolint():
    linter("hadolint", DOCKERFILE)


def test_yamllint():
    linter("yamllint", "--strict", DEPLOY)


def test_compose_follows_the_specification():
    linter("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


# --- the images -----------------------------------------------------------------------------------------------------------------


def test_the_build_is_given_what_it_copies_and_no_more():
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    let_through = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines
    assert lines.index("*") < min(lines.index(f"!{name}") for name in let_through)
    copied = [line.split()[:-1] for line in instructions("COPY") if not line.startswith("--from")]
    assert {name.rstrip("/") for names in copied for name in names} == let_through
    assert all((ROOT / name).exists() for name in let_through)
    wheel = re.search(r'^packages = (\[.*"benchmarks"\])$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert wheel
    assert set(ast.literal_eval(wheel[1])) <= let_through
    for secret in ("deploy/keys/trunk.key", "runs/trial/config.toml", "clinic.key"):
        assert not any(fnmatch.fnmatch(secret, name) or secret.startswith(f"{name}/") for name in let_through)


def test_the_extras_of_the_images_are_ones_there_are():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"EXTRAS=([a-z,]+)", DOCKERFILE.read_text())
    assert named
    assert {extra for names in named for extra in names.split(",")} <= known.keys()


def test_commands_of_the_images():
    for command in instructions("CMD"):
        words = ast.literal_eval(command)
        with pytest.raises(SystemExit) as end:
            build_parser(words).parse_args(words)
        assert end.value.code == 0  # --help


# --- compose --------------------------------------------------------------------------------------------------------------------


def test_commands_of_compose():
    services = COMPOSE["services"]
    config = serve_config(services["trunk"]["command"])
    clients = {name: service for name, service in services.items() if name != "trunk"}
    assert config.clients == len(clients)
    (health,) = (line.partition("CMD")[2].strip() for line in instructions("HEALTHCHECK") if line != "NONE")
    assert f"127.0.0.1:{config.metrics}/status.json" in health
    for name, service in clients.items():
        words = [re.sub(r"\$\{SPLITFL_JOIN:\?.*\}", "splitfl://key@trunk:7100/trial", word) for word in service["command"]]
        args = build_parser(words).parse_args(words)
        assert args.identity == f"/run/secrets/{name}-key"
        targets = {volume.split(":")[1] for volume in service["volumes"]}
        assert {args.model, args.data, str(Path(args.out).parent)} <= targets


def test_compose_opens_nothing_to_the_world():
    assert COMPOSE["networks"]["run"]["internal"] is True
    for name, service in COMPOSE["services"].items():
        assert "ports" not in service
        assert service["networks"] == ["run"]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["secrets"] == [f"{name}-key"]
    assert {secret["file"] for secret in COMPOSE["secrets"].values()} == {f"./keys/{name}.key" for name in COMPOSE["services"]}


def test_what_an_operator_puts_beside_the_files_is_never_committed():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {f"deploy/{name}" for name in (".env", "data/", "keys/", "model/", "operator/")} <= set(ignored)
