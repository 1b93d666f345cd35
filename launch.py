"""Starts Preference Lab: opens the storage, serves the page, keeps the workers alive. `python launch.py --help`."""

import argparse
from pathlib import Path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.py", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--password")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-workers", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    import platformdirs
    import uvicorn

    import storage
    from app.lab import Lab, Settings
    from app.server import create_app

    data_dir = (arguments.data_dir or Path(platformdirs.user_data_dir("preference-lab"))).expanduser().resolve()
    settings = Settings(
        data_dir=data_dir, host=arguments.host, port=arguments.port, password=arguments.password,
        device=arguments.device, workers=not arguments.no_workers,
    )
    lab = Lab(storage.open(data_dir), settings)
    lab.current_study()
    print(f"Preference Lab: http://{settings.host}:{settings.port}", flush=True)
    uvicorn.run(create_app(lab), host=settings.host, port=settings.port, log_level="warning")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
