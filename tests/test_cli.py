import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import modeprobe
from modeprobe.cli import app

pytestmark = pytest.mark.rung("reference")


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments), prog_name="modeprobe", env={"COLUMNS": "100"})


def test_help_names_every_command():
    result = invoke("--help")
    assert result.exit_code == 0
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert f" {name} " in result.stdout
        assert invoke(name, "--help").exit_code == 0


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"modeprobe {modeprobe.__version__}\n")


def test_info():
    result = invoke("info")
    assert result.exit_code == 0
    for name in ("native", "triton", "reference", "automatic choice"):
        assert name in result.stdout


def test_info_as_json_is_json_alone():
    result = invoke("info", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == modeprobe.info().as_dict()


def test_an_unknown_command_is_an_error():
    result = invoke("probee")
    assert result.exit_code == 2
    assert "No such command" in result.output


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "modeprobe", "--version"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, f"modeprobe {modeprobe.__version__}\n")
