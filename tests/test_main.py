"""`__main__.py`: the verbs, and how every exception ends the process."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megads import __main__ as top
from megads.errors import ConfigError, NumericsError, RankError


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megads", *argv], capture_output=True, text=True, check=False
    )


def test_help_needs_no_torch_and_names_every_verb() -> None:
    code = (
        "import sys; from megads.__main__ import main; sys.exit(main(['--help']) or 'torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0
    for verb in top.VERBS:
        assert f"\n  {verb} " in ended.stdout


def test_explain_needs_no_torch() -> None:
    code = "import sys; from megads.__main__ import main; main(['explain']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("verb", top.VERBS)
def test_every_verb_is_there(verb: str) -> None:
    module, _, function = top.VERBS[verb][0].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_a_wrong_input_is_one_message_and_code_2() -> None:
    for argv, told in (
        (["trian"], "did you mean train?"),
        (["explain", "parallel.tensr"], "parallel.tensor"),
    ):
        ended = run(*argv)
        assert ended.returncode == 2
        assert told in ended.stderr
        assert "Traceback" not in ended.stderr
        assert ended.stdout == ""


ENDINGS = {
    "wrong input": (ConfigError("run.x: bad", found=3), 2, "run.x: bad\n  found:   3\n"),
    "not finite": (NumericsError("loss is nan"), 1, "loss is nan\n"),
    "another rank": (RankError("rank 3 is gone"), 1, "rank 3 is gone\n"),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted\n"),
    "bug": (ZeroDivisionError("oops"), 1, "Traceback"),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("is_launched", [False, True])
def test_how_a_process_ends(
    ending: str,
    is_launched: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error, code, told = ENDINGS[ending]
    file = tmp_path / "error.json"
    for name in ("TORCHELASTIC_ERROR_FILE", "MEGADS_LAUNCHER"):
        monkeypatch.delenv(name, raising=False)
    if is_launched:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        _become_rank_3(monkeypatch)
    _verb(monkeypatch, error)
    assert top.main(["act"]) == code
    said = capsys.readouterr().err
    if not is_launched or ending == "bug":
        assert said.startswith(told)
    if is_launched:
        last = {"interrupt": "", "bug": "rank 3: ZeroDivisionError: oops\n"}.get(ending, f"rank 3: {told}")
        assert said.endswith(last)
        assert ending != "interrupt" or said == ""
    assert ("Traceback" in said) == (ending == "bug")
    assert file.exists() == is_launched
    if is_launched:
        message = json.loads(file.read_text())["message"]
        assert message["message"].startswith("rank 3: ")
        assert (str(error) or "interrupted") in message["message"]
        assert int(message["extraInfo"]["timestamp"]) > 0
        assert message["extraInfo"]["code"] == code


def test_torchs_agent_reads_what_a_rank_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("torch.distributed.elastic.multiprocessing.errors")
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    _become_rank_3(monkeypatch)
    _verb(monkeypatch, ConfigError("run.x: bad"))
    top.main(["act"])
    failure = errors.ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(file))
    assert "run.x: bad" in str(errors.ChildFailedError("train", {1: failure}))


def test_deepspeeds_local_rank_is_no_argument_of_a_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for word in ("--local_rank=3", "--local-rank=0"):
        assert top.main([word, "explain", "run.seed"]) == 0  # where deepspeed puts it
        assert top.main(["explain", "run.seed", word]) == 0
    with pytest.raises(SystemExit):
        top.main(["explain", "run.seed", "--local_rank=x"])
    capsys.readouterr()


def _become_rank_3(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def _verb(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """A verb `act` that raises `error`."""

    def act(argv: list[str]) -> int:
        raise error

    module = ModuleType("act_of_a_test")
    module.main = act  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "act_of_a_test", module)
    monkeypatch.setattr(top, "VERBS", {"act": ("act_of_a_test:main", "")})
