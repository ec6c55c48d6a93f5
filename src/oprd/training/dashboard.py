"""Where a run's numbers are watched: trackio on this machine, where it is installed and the recipe asks for nothing else."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers.integrations import TrackioCallback

logger = get_logger(__name__)

PROJECT = "oprd"
ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # trackio's own variables; whoever sets one wants it there


def choose_dashboard(args: Any, created: str) -> None:
    """Settle ``report_to`` where it was left open, and name a trackio run, so that a resumed one goes on in the same curves.

    Nothing leaves this machine unless ``trackio_space_id``, or a variable of trackio's, says so. What is chosen here is in no
    record: a run is the same with and without a dashboard.

    Args:
        created: when the run began first, as in its manifest.
    """
    is_open = args.report_to_is_open
    if is_open:
        args.report_to = ["trackio"] if find_spec("trackio") is not None else []
    if "trackio" not in args.report_to:
        return
    if args.project == "huggingface":  # transformers' default, for every project of everyone
        args.project = PROJECT
    if args.run_name is None:
        folder = Path(args.output_dir)
        name = f"{folder.parent.name}/{folder.name}" if folder.name == "then" else folder.name
        args.run_name = f"{name} {created[:16].replace('T', ' ')}"
    if args.trackio_static_space_id is None and args.trackio_space_id is None:
        args.trackio_static_space_id = False  # else push_to_hub would publish the curves too
    remote = args.trackio_space_id or next((os.environ[name] for name in ELSEWHERE if os.environ.get(name)), None)
    where = remote or f"this machine: trackio show --project {args.project}"
    off = " (report_to: none in the recipe turns it off)" if is_open else ""
    logger.info(f"Dashboard on {where}{off}.")


class Dashboard(TrackioCallback):
    """trackio's callback without its words on standard output, which is for the command's result.

    It stays open after the last update, until `finish`: scores of the finished student follow, and TRL's profiling writes there
    without asking.
    """

    def setup(self, args, state, model, **kwargs):
        with redirect_stdout(io.StringIO()):
            super().setup(args, state, model, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        pass

    def finish(self, trainer: Any) -> None:
        """No more numbers come."""
        with redirect_stdout(io.StringIO()):
            super().on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
