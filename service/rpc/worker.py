"""One of several workers: a server whose HTTP is a unix socket, and that ends with the supervisor that started it.

The supervisor writes one line to standard input and keeps it open; its end is the supervisor's end. One JSON object
comes back on standard output: what is served, or why nothing is.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import uvloop

from service.config import Settings
from service.errors import ConfigError
from service.logs import log_to_stderr
from service.repository import load_repository
from service.rpc import server
from service.rpc.announcement import announcement_of
from service.rpc.fleet import from_rows
from service.rpc.peers import Place


def main() -> None:
    """Serve until SIGTERM or SIGINT, then drain."""
    with os.fdopen(0, "rb", buffering=0, closefd=False) as orders:
        line = orders.readline()
    if not line:
        sys.exit(1)  # the supervisor is gone already
    order = json.loads(line)
    place = Place(Path(order["folder"]), order["index"], order["num_workers"])
    threading.Thread(target=_end_with_supervisor, args=(place.folder,), daemon=True).start()
    report_to = os.dup(1)
    os.dup2(2, 1)  # what else is printed must not be taken for the report

    def report(**content: Any) -> None:
        with os.fdopen(report_to, "w", encoding="utf-8") as report_file:
            json.dump(content, report_file)

    settings = Settings(**order["settings"])
    if (store := settings.spill_store) is not None:  # each has a file of its own
        settings = settings.model_copy(update={"spill_store": store.with_name(f"{store.name}.{place.index}")})
    log_to_stderr(settings.log_level, settings.log_format, who=f"worker {place.index}")
    try:
        wanted = from_rows(order["wanted"]) if "wanted" in order else None
        loaded = load_repository(settings, wanted=wanted)
        retired = from_rows(order.get("retired", []))
        uvloop.run(server.run(settings, loaded, lambda _: report(**asdict(announcement_of(loaded))), place, retired))
    except ConfigError as error:
        report(error=str(error), field=error.field)
        sys.exit(1)


def _end_with_supervisor(folder: Path) -> NoReturn:
    """Wait for the end of the supervisor, and end at once: nobody is left to answer to."""
    while os.read(0, 1):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main()
