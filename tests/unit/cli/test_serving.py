"""Ending an endpoint that was left running."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli import serving
from plumbline.errors import UserError


@pytest.mark.parametrize(("on_term", "number"), [("SIG_DFL", signal.SIGTERM), ("SIG_IGN", signal.SIGKILL)])
def test_an_endpoint_that_does_not_end_is_ended_by_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], on_term: str, number: int
) -> None:
    """One whose Ray answers no more waits for ever."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(serving, "STOP_S", 1.0)
    code = f"import signal, time; signal.signal(signal.SIGTERM, signal.{on_term}); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, "serve"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (tmp_path / serving.PID).write_text(str(process.pid))
        (tmp_path / serving.LOG).write_text("serving base on http://127.0.0.1:8000/v1 (Ctrl-C ends)\n")
        assert serving.stop(tmp_path) == 0
        assert process.wait(10) == -number
    assert capsys.readouterr().out == f"the endpoint over {tmp_path} on http://127.0.0.1:8000/v1 has ended\n"
    with pytest.raises(UserError, match="is not served by a detached process"):
        serving.stop(tmp_path)
