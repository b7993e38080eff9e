"""`jlrm judge serve`: a judge behind HTTP.

    1  open      the port, where another server may listen already; then the model
    2  serve     until Ctrl-C or SIGTERM; then what has come is finished, and nothing more is taken

What HTTP needs is an extra, and is imported when it is known to be there.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import pathlib
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

from jlrm.config import RunError, UsageError
from jlrm.data.tokenizer import token_bytes
from jlrm.evaluation import rubrics
from jlrm.evaluation.prompting import prompting
from jlrm.evaluation.reading import PARSERS, check_rubric, reader
from jlrm.judgement import prompts
from jlrm.judges import local, options
from jlrm.rl.distribution import Distribution
from jlrm.sampling.slots import SlotSettings
from jlrm.sampling.stops import ends, stop_tables
from jlrm.sampling.writer import DecodingSettings, check_decoding
from jlrm.server.bodies import MOST_VOTES, Defaults
from jlrm.server.engine import Engine
from jlrm.server.service import Service
from jlrm.serving import calibration

# Of the options of a local judge, those of a server; others are its clients', or of a batch.
SIZES = ("max_prompt_tokens", "max_new_tokens")  # whose defaults are the server's own
OPTIONS = (
    *("prompt", "scale", "temperature", "top_p", "votes"),
    *("stop", "compute_dtype", "mesh"),
)
KEYS = "JLRM_API_KEY"
MOST_NEW, MOST_PROMPT = 1024, 4096  # tokens, where the model has positions for them


def main(words: Sequence[str]) -> None:
    """Parse the command line, and serve until a signal comes.

    Raises:
      UsageError: anything the user can mend.
    """
    args = _parser().parse_args(words)
    if not args.model:
        raise UsageError("--model is missing: name a run, a directory or a hub id.")
    if args.model.startswith(("http://", "https://")):
        raise UsageError(f"--model {args.model}: an endpoint is served already. Name a model.")
    for name in ("slots", "block", "max_waiting", "max_connections", "max_body_kib", "drain"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}={getattr(args, name)}: at least 1.")
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{error.name} is missing. Do: pip install 'jlrm[serve]'") from None
    listening = _bound(args.host, args.port)
    try:
        _serve(args, listening)
    finally:
        listening.close()


def _serve(args: argparse.Namespace, listening: socket.socket) -> None:
    import uvicorn

    from jlrm.server import app
    from jlrm.server.metrics import Metrics
    from jlrm.server.protocol import Announced, Impatient

    keys = _keys(args.api_key_env)
    service = open_service(args)
    host, port = listening.getsockname()[:2]
    is_local = ipaddress.ip_address(host).is_loopback
    if not is_local and not keys:
        print(
            f"warning: {args.host} can be reached from other machines, and nobody is asked for a "
            f"key. Set the variable {args.api_key_env or KEYS}.",
            file=sys.stderr,
        )
    # A page of others can let a browser ask a local server by a name of its own.
    local = ("localhost", "127.0.0.1", "[::1]", "::1", args.host, host, *args.allow_host)
    hosts = tuple(dict.fromkeys(local)) if is_local else ("*",)
    limits = app.Limits(2**10 * args.max_body_kib, keys, tuple(args.allow_origin), hosts)
    service.engine.start()
    settings = service.engine.settings
    shown = f"[{host}]" if ":" in host else host
    said = (
        f"Serving {service.defaults.model} at http://{shown}:{port} ({settings.num_slots} slots of "
        f"{settings.max_prompt_tokens} + {settings.max_new_tokens} tokens, "
        f"{service.engine.gib:.2f} GiB; prompt {service.prompt}). Routes: /docs. Ctrl-C ends it."
    )
    config = uvicorn.Config(
        app.make(service, limits, Metrics(service.engine)),
        log_level="warning",
        access_log=False,
        lifespan="off",
        http=Impatient,
        limit_concurrency=args.max_connections,
        timeout_graceful_shutdown=args.drain,
        server_header=False,
    )

    server = Announced(config, said)
    threading.Thread(target=_watch, args=(service.engine, server), daemon=True).start()
    server.run([listening])
    service.engine.close()
    done = service.engine.counters
    print(f"Ended: {done.completions} judgements, {done.tokens} tokens.", file=sys.stderr)
    if service.engine.failure:
        raise RunError(service.engine.failure)


def _watch(engine: Engine, server: Any) -> None:
    """End the server when its engine has failed, so that whoever looks after it hears of it."""
    engine.wait()
    if engine.failure:
        server.should_exit = True


def open_service(args: argparse.Namespace) -> Service:
    """Open the model, and make ready what serves it."""
    model = options.pinned(options.JLRM, args.model)
    given = {
        name: getattr(args, name) if name in (*OPTIONS, *SIZES) else None
        for name in options.OPTIONS
    }
    chosen = options.options(argparse.Namespace(backend=options.JLRM, model=args.model, **given))
    positions = options.num_positions(model)
    sizes = chosen["max_prompt_tokens"], chosen["max_new_tokens"]
    longest = options.limits(positions, sizes, (MOST_PROMPT, MOST_NEW))
    votes, temperature, top_p = (chosen[each] for each in ("votes", "temperature", "top_p"))
    check_decoding(DecodingSettings(longest[1], 1, 0, temperature, top_p, votes))
    if votes > min(MOST_VOTES, args.slots):
        raise UsageError(f"--votes {votes}: at most {MOST_VOTES}, and one for each of --slots.")
    grid = options.mesh(chosen["mesh"])
    policy, weights = local.open_model(model, grid, chosen["compute_dtype"], longest)
    most, after = prompts.MOST_LISTED, prompts.reasoning_end(chosen["prompt"])
    strings = dict.fromkeys(local.STOP, most) if chosen["stop"] else {}
    spelled = token_bytes(policy.tokenizer) if strings else []
    stops = stop_tables(strings, spelled, policy.model.vocab_size, after)
    shards = policy.decoding.num_shards("P")
    settings = SlotSettings(
        -(-args.slots // shards) * shards,
        *longest,
        policy.end_ids,
        Distribution(top_p=top_p, num_ids=policy.num_ids),
        args.block,
    )
    low, high = chosen["scale"]
    read, rubric = reader(args.parser, (low, high), args.tie_margin), None
    judging = options.judging(options.JLRM, args.model)
    if judging == "single":
        read = read._replace(judging=judging)
    if args.rubric:
        rubric = rubrics.read(args.rubric)
        check_rubric(read, rubric)
    name = args.name or pathlib.PurePath(args.model).name or args.model
    return Service(
        policy,
        Engine(policy, weights, settings, stops, ends(strings, most, after), args.max_waiting),
        local.game_encoder(policy.tokenizer, prompting(chosen["prompt"], (low, high))),
        local.make_expectation(policy, (low, high)),
        read,
        Defaults(name, temperature, votes, longest[1], args.seed % 2**31, rubric, judging),
        chosen["prompt"],
        calibration.find(args.calibration, args.model),
    )


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket at an address, not yet listening: a client is refused until all is ready.

    Raises:
      UsageError: no such address, or it is taken.
    """
    try:
        if not 0 <= port < 2**16:  # some systems take the rest of the division
            raise OverflowError("port must be 0-65535")
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--host {host} --port {port}: {reason}.") from None
    return bound


def _keys(variable: str) -> tuple[str, ...]:
    """Return the keys in a variable, or in `KEYS` if none is named.

    Raises:
      UsageError: one is named that holds no key: a server without keys is not what was meant.
    """
    listed = os.environ.get(variable or KEYS, "").split(",")
    keys = tuple(key.strip() for key in listed if key.strip())
    if variable and not keys:
        raise UsageError(f"--api-key-env {variable}: this variable holds no key.")
    return keys


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.judge serve",
        description="Serve a judge over HTTP: /v1/judge, /v1/chat/completions, /v1/rerank; a page.",
    )
    add = parser.add_argument
    add("--model", default="", metavar="M", help="RUN[@STEP], directory or hub id")
    add("--name", default="", help="of the model, for clients (the last part of --model)")
    add("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
    add("--port", type=int, default=8000, help="0: any that is free (8000)")
    shown = f"variable with keys, parted by commas; clients must show one ({KEYS}, if set)"
    add("--api-key-env", default="", metavar="NAME", help=shown)
    named = "further name that this machine's own server is asked by, as a proxy's; repeatable"
    add("--allow-host", action="append", default=[], metavar="NAME", help=named)
    add("--allow-origin", action="append", default=[], metavar="URL",
        help="whose pages may ask from a browser (none); repeatable")  # fmt: skip
    add("--slots", type=int, default=32, help="completions that are decoded together (32)")
    add("--block", type=int, default=8, help="tokens between two looks at who has come (8)")
    add("--max-waiting", type=int, default=512, help="completions that may wait for a slot (512)")
    add("--max-connections", type=int, default=1000, help="connections at a time (1000)")
    add("--max-body-kib", type=int, default=1024, help="largest body, in KiB (1024)")
    add("--drain", type=int, default=60, help="seconds to finish what has come, at the end (60)")
    parsers = "; ".join(f"{name}: {what}" for name, what in PARSERS.items())
    add("--parser", choices=PARSERS, default="lenient", help=f"how texts are read. {parsers}")
    add("--tie-margin", type=float, default=0.0, metavar="POINTS",
        help="scores of a pair that differ by no more are a tie (0)")  # fmt: skip
    add("--calibration", default="", metavar="FILE",
        help="map of the confidence, or none (calibration.json of the model)")  # fmt: skip
    shown = "what requests that name no rubric are judged by: a text, or criteria (YAML, JSON)"
    add("--rubric", default="", metavar="FILE", help=shown)
    add("--seed", type=int, default=0, help="of random orders and of sampling (0)")
    positions = "fewer where the model has no positions for them"
    add(
        "--max-prompt-tokens",
        type=int,
        metavar="N",
        help=f"longest prompt ({MOST_PROMPT}; {positions})",
    )
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"longest judgement ({MOST_NEW}; {positions})",
    )
    options.add_options(parser, OPTIONS)
    return parser
