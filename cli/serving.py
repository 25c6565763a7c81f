"""`plumbline serve`, `promote` and `rollback`."""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from plumbline.errors import RunError, UserError
from plumbline.importing import HOME

PATIENCE_S, STOP_S = 600, 60
LOG, PID = "serve.log", "serve.pid"


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Their options."""
    one = commands.add_parser("serve", help="answer OpenAI clients from a run's policies, or from a model")
    one.add_argument("target", metavar="RUN_DIR", help="or a model's directory or hub name")
    one.add_argument("--host", help="default: the config's, 127.0.0.1")
    one.add_argument("--port", type=int, help="default: the config's, 8000")
    one.add_argument("--api-keys", metavar="FILE", help="a key a line; default: PLUMBLINE_API_KEYS")
    one.add_argument("--replicas", type=int, nargs="+", metavar="N", help="engines; two numbers are bounds")
    one.add_argument("--detach", action="store_true", help="return once it answers, and leave it running")
    one.add_argument("--stop", action="store_true", help="end the one that was left running over RUN_DIR")
    one.set_defaults(command=serve_command)

    one = commands.add_parser("promote", help="make an alias mean a version from now on, such as ple@12")
    one.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    one.add_argument("version", metavar="VERSION", help="such as ple@12; ple is its newest")
    one.set_defaults(command=promote_command)

    one = commands.add_parser("rollback", help="make an alias mean what it meant before")
    one.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    one.add_argument("policy", metavar="POLICY", help="such as ple")
    one.set_defaults(command=rollback_command)


def serve_command(options: argparse.Namespace) -> int:
    """`plumbline serve`."""
    from plumbline.runs.hub import named_model

    target = Path(named_model(options.target, "MODEL")).absolute()
    if options.stop:
        return stop(target)
    if options.detach:
        return detach(options, target)
    from cli.display import Display
    from cli.guard import guarded
    from serve.target import read_target, serve_target

    given = {"host": options.host, "port": options.port, "api_keys": options.api_keys}
    overrides: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    if options.replicas:
        if len(options.replicas) > 2:
            raise UserError(f"--replicas takes one number or two bounds, not {len(options.replicas)}")
        overrides["replicas"] = options.replicas[0] if len(options.replicas) == 1 else options.replicas
    read = read_target(target, overrides)
    with guarded("endpoint", f"start it again by: plumbline serve {options.target}"), Display() as display:
        display({"message": f"starting an engine for {options.target}"})

        def ready(url: str) -> None:
            if f":{read.settings.port}" not in url:
                display({"message": f"port {read.settings.port} is not used: Ray Serve of this cluster has its own"})
            display({"message": f"serving {', '.join(read.names)} on {url}/v1 (Ctrl-C ends)"})
            display({"message": f"try: plumbline chat --url {url}/v1"})

        serve_target(read, ready)
    return 0


def detach(options: argparse.Namespace, target: Path) -> int:
    """Serve from a process of its own, and wait until it answers."""
    pid_file = target / PID
    if running(pid_file):
        raise UserError(f"{options.target}: is served already (process {pid_file.read_text()}); --stop ends that")
    arguments = [a for a in sys.argv[1:] if a != "--detach"]
    # Not `-m cli`, which would be the working directory's own, where it has one.
    code = f"import sys; sys.path.append({HOME!r}); from cli.main import main; sys.exit(main())"
    try:
        pid_file.write_text("")  # before there is a process whose number could not be kept
        log = (target / LOG).open("wb")
    except OSError as error:
        raise UserError(
            f"{target}: `--detach` keeps {PID} and {LOG} there, which cannot be written ({error.strerror}); "
            "make room, or serve without it"
        ) from None
    with log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    pid_file.write_text(str(process.pid))
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        said = (target / LOG).read_text("utf-8", errors="replace")
        if _address(said):
            print(said.strip())
            print(f"end it with: plumbline serve {options.target} --stop")
            return 0
        time.sleep(0.5)
    pid_file.unlink()
    lines = (target / LOG).read_text("utf-8", errors="replace").strip().splitlines()
    if process.poll() is None:
        process.terminate()
        raise RunError(f"the endpoint did not answer within {PATIENCE_S} s; its log is {target / LOG}")
    said = lines[-1].removeprefix("plumbline: ") if lines else f"exit code {process.returncode}"
    raise (UserError if process.returncode == 2 else RunError)(said)


def stop(target: Path) -> int:
    """End what `--detach` left running, or any process on the cluster of RAY_ADDRESS, over this directory alone."""
    pid_file, address = target / PID, None
    found = running(pid_file)
    if found:
        address = _address((target / LOG).read_text("utf-8", errors="replace"))
        _end(pid_file)
        pid_file.unlink()
    if os.environ.get("RAY_ADDRESS"):
        from serve.target import stop_target

        left = stop_target(target)
        found, address = found or left is not None, left or address
    if not found:
        raise UserError(f"{target}: is not served by a detached process{_elsewhere()}")
    print(f"the endpoint over {target}{f' on {address}/v1' if address else ''} has ended")
    return 0


def _end(pid_file: Path) -> None:
    """As Ctrl-C does; by force where the Ray under it answers no more."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):  # it ended just now
            os.kill(int(pid_file.read_text()), number)
        deadline = time.monotonic() + STOP_S
        while running(pid_file) and time.monotonic() < deadline:
            time.sleep(0.2)
        if not running(pid_file):
            return


def _elsewhere() -> str:
    where = os.environ.get("RAY_ADDRESS")
    return f", nor on the cluster at {where}" if where else "; for one on a cluster, set RAY_ADDRESS"


def _address(log: str) -> str | None:
    """Where a detached process has said that it answers, before `/v1`."""
    found = re.search(r" on (http\S+)/v1", log)
    return found[1] if found else None


def running(pid_file: Path) -> bool:
    """Whether the process that the file names is there, and is ours."""
    import psutil

    if not pid_file.exists():
        return False
    try:
        process = psutil.Process(int(pid_file.read_text()))
        return "serve" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, OSError):
        return False


@contextlib.contextmanager
def no_run_to_resume() -> Iterator[None]:
    """What would end a run is told by itself here, without the line that continues one."""
    try:
        yield
    except RunError as error:
        raise UserError(str(error)) from None


def promote_command(options: argparse.Namespace) -> int:
    """`plumbline promote`."""
    from plumbline.runs.policies import parse_ref
    from plumbline.runs.promotions import Promotion, policy_named, promote

    name, at, version = options.version.partition("@")
    ref = parse_ref(options.run_dir, policy_named(options.run_dir, name) + at + version)
    with no_run_to_resume():
        promote(options.run_dir, Promotion(ref=ref, by="hand"))
    print(f"{name} means {ref} from now on")
    return 0


def rollback_command(options: argparse.Namespace) -> int:
    """`plumbline rollback`."""
    from plumbline.runs.promotions import policy_named, rollback

    with no_run_to_resume():
        ref = rollback(options.run_dir, policy_named(options.run_dir, options.policy))
    print(f"{options.policy} means {ref} again")
    return 0
