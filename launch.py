"""Starts Preference Lab: opens the data folder, serves the page, and keeps the workers behind the buttons alive.

    python launch.py                                        the lab on this machine, http://127.0.0.1:7860
    python launch.py --host 0.0.0.0 --password SECRET       also for the phone in the same network

Ctrl-C saves what is training, so that it can be resumed, and ends. Were this process killed, running jobs would go on,
and the next start would find them again. Installs nothing and sends nothing anywhere.
"""

import argparse
import errno
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

HTTP_GRACE = 2  # seconds that open connections get at the end; a page's event stream never ends by itself


class LaunchError(ValueError):
    """Why the lab cannot start, in one sentence."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default %(default)s: this machine "
                        "only; 0.0.0.0 is every network; anything but this machine needs --password)")  # fmt: skip
    parser.add_argument("--password", help="asked once per browser; the environment variable PREFERENCE_LAB_PASSWORD "
                        "says the same without showing it in the list of processes")  # fmt: skip
    parser.add_argument("--port", type=int, default=7860, help="port to serve at (default %(default)s)")
    parser.add_argument("--data-dir", type=Path, help="folder of the database, pictures and runs (default: a folder "
                        "of your user account, %(default)s)", default=default_data_dir())  # fmt: skip
    parser.add_argument("--device", default="auto", help="what the jobs compute on: auto, cpu, cuda, cuda:1, mps "
                        "(default %(default)s: a GPU if there is one)")  # fmt: skip
    parser.add_argument("--no-workers", action="store_true", help="serve the page only; jobs wait in the queue")
    return parser.parse_args(argv)


def default_data_dir() -> Path:
    import platformdirs

    return Path(platformdirs.user_data_dir("preference-lab", appauthor=False))


def check(arguments: argparse.Namespace) -> None:
    """Refuses what cannot work, before anything is opened."""
    from app.security import is_loopback

    if not is_loopback(arguments.host) and not arguments.password:
        raise LaunchError(
            f"--host {arguments.host} lets other machines in: choose a --password too, or leave --host out to serve "
            "this machine only."
        )
    if not 1 <= arguments.port <= 65535:
        raise LaunchError(f"--port is {arguments.port}, but a port is a number from 1 to 65535.")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the slow imports so that a taken port is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise LaunchError(f"Port {port} is already taken by another program; choose another --port.") from error
        why = error.strerror or str(error)
        raise LaunchError(f"Cannot serve at {host}:{port} ({why}); choose another --host or --port.") from error
    return listener


def lock(data_dir: Path):
    """Holds the data folder for this process; the system lets go of it however the process ends."""
    import filelock

    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(data_dir / "launch.lock")
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise LaunchError(
            f"The data folder {data_dir} is already open in another Preference Lab{_other(data_dir)}; use that one, or "
            "choose another --data-dir."
        ) from None
    except OSError as error:
        why = error.strerror or str(error)
        raise LaunchError(f"Cannot use {data_dir} as the data folder ({why}); choose another --data-dir.") from error
    return held


def _other(data_dir: Path) -> str:
    try:
        other = json.loads((data_dir / "launch.json").read_text())
        return f" at {other['url']} (process {other['pid']})"
    except (OSError, ValueError, KeyError):  # it has just started and not yet said where it is
        return ""


def serve(arguments: argparse.Namespace) -> int:
    """Runs the lab until a signal; returns the exit status."""
    started = time.monotonic()
    data_dir = arguments.data_dir.expanduser().resolve()
    # Kept for as long as this function runs: they hold the folder and the port.
    held, listener = lock(data_dir), listen(arguments.host, arguments.port)
    # Before the imports that read them: nothing is sent anywhere, and uploads stay in the data folder.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
    os.environ["GRADIO_TEMP_DIR"] = str(data_dir / "cache" / "gradio")

    import uvicorn

    import storage
    from app.lab import Lab, Settings
    from app.server import create_app
    from app.supervisor import Supervisor

    settings = Settings(
        data_dir=data_dir,
        host=arguments.host,
        port=arguments.port,
        password=arguments.password,
        device=arguments.device,
        workers=not arguments.no_workers,
    )
    lab = Lab(storage.open(data_dir), settings)
    lab.current_study()
    stop = stop_event()
    config = uvicorn.Config(
        create_app(lab), log_level="warning", timeout_graceful_shutdown=HTTP_GRACE, server_header=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.01)
    (data_dir / "launch.json").write_text(json.dumps({"pid": os.getpid(), "url": lab.url()}))
    print(f"Preference Lab is at {lab.url()} ({time.monotonic() - started:.1f} s). Data folder: {data_dir}", flush=True)

    # Only now, so that their imports do not slow down the page's first answer.
    supervisor = Supervisor(lab) if settings.workers else None
    if supervisor:
        supervisor.start()
    while thread.is_alive() and not stop.wait(0.5):
        pass
    print("Stopping: what is running is saved, so that it can be resumed.", flush=True)
    if supervisor:
        supervisor.stop()
    # An open page's event stream never ends by itself: of each, uvicorn would print that it had to be cut off.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    server.should_exit = True
    thread.join(HTTP_GRACE + 3)
    lab.store.close()
    held.release()
    return 0 if stop.is_set() else 1


def stop_event() -> threading.Event:
    """Set by Ctrl-C, SIGTERM or a closed terminal; a second Ctrl-C ends this process only and leaves jobs running."""
    stop = threading.Event()

    def handler(signum: int, frame: object) -> None:
        if stop.is_set() and signum == signal.SIGINT:
            os._exit(130)
        stop.set()

    names = ("SIGINT", "SIGTERM", "SIGHUP")
    for number in (getattr(signal, name) for name in names if name in dir(signal)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` means to survive the terminal
            signal.signal(number, handler)
    return stop


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    arguments.password = arguments.password or os.environ.pop("PREFERENCE_LAB_PASSWORD", None)
    try:
        check(arguments)
        return serve(arguments)
    except ValueError as error:  # LaunchError, StorageError: a sentence for a person
        print(f"Preference Lab cannot start: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # the disk is full, say, or a file lies where a folder belongs
        where = f" {error.filename}" if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room" if full else "correct that, or choose another --data-dir"
        print(f"Preference Lab cannot start: cannot write{where} ({error.strerror}); {remedy}.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
