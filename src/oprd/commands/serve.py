"""``oprd serve-teacher``: hold a teacher here for runs elsewhere."""

from __future__ import annotations

import argparse

from oprd.commands.shared import show_events


def add_serve(commands) -> None:
    """Its words."""
    parser = commands.add_parser(
        "serve-teacher",
        help="hold a frozen teacher for runs elsewhere (teacher_url)",
        description="Hold a frozen teacher and answer what the loss needs of it over HTTP: projected states at the compared positions, "
        "the LM head once, the tokenizer's files. A run names it with teacher_url. Every request needs the token, which is taken from "
        "OPRD_TEACHER_TOKEN or --token_file; without one, a new one is made and printed. Stops with SIGTERM or Ctrl-C after "
        "the forward in progress.",
        allow_abbrev=False,  # --token would be taken for --token_file
    )
    add = parser.add_argument
    add("--model", required=True, metavar="PATH_OR_HUB_ID", help="the teacher")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; another one than loopback is reachable for others (default: %(default)s)",
    )
    add("--port", type=int, default=8765, help="port to listen on; 0 takes a free one (default: %(default)s)")
    add("--token_file", metavar="FILE", help="file that holds the token (default: OPRD_TEACHER_TOKEN, else a new one)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "auto"), help="of the weights; float32 is what "
        "a teacher inside a run has, auto the checkpoint's own (default: %(default)s)")  # fmt: skip
    add("--attn_implementation", metavar="NAME", help="of the teacher (packed rows need sdpa, transformers' default)")
    add("--revision", help="revision of a Hub model")
    add("--device", help="such as cuda:1 (default: the first accelerator, else cpu)")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add(
        "--max_tokens",
        type=int,
        default=65_536,
        help="most tokens, padding included, of one forward (default: %(default)s)",
    )
    parser.set_defaults(run_command=run_serve)


def run_serve(options: argparse.Namespace) -> int:
    """Serve until told to stop."""
    if options.max_tokens < 1:
        raise ValueError(f"--max_tokens must be at least 1, got {options.max_tokens}.")
    show_events()
    from oprd.serving.server import serve

    given = vars(options)
    names = ("host", "port", "token_file", "revision", "trust_remote_code", "dtype", "attn_implementation", "device")
    serve(options.model, max_tokens=options.max_tokens, **{name: given[name] for name in names})
    return 0
